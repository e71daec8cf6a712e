#!/usr/bin/env bash
# OSUM-Pangu from Whisper and openPangu to a score: instructions, three stages, evaluation. The same command goes on after an
# interruption. The data are three labelled manifests instead of the sources that the recipes name.
#
#   recipes/osum_pangu/run.sh TRAIN.jsonl DEV.jsonl TEST.jsonl [OUT]
#
# DEVICES                  processes on this machine, one a device, started by scripts/torchrun_train.sh; by default one, by itself
# STAGE1, STAGE2, STAGE3   more layers and dotted.key=value of that stage, e.g. STAGE1="mine.yaml model.llm.path=/weights/pangu"
# INTENTS, EVAL            more words for `osum-npu data intents` and for each `osum-npu eval`, e.g. INTENTS="--train 20000"
set -euo pipefail
train=$1 dev=$2 test=$3 out=${4:-runs/osum_pangu}
here=$(dirname "$0")
data=$out/data tags=$here/tags.yaml
learn=(osum-npu train)
[[ ! ${DEVICES:-} ]] || learn=("$here/../../scripts/torchrun_train.sh" --devices "$DEVICES")
eval=(osum-npu eval --data "$test" --data "$data/intents/test.jsonl" --natural
    --tasks asr,timestamps,event,emotion,style,gender,age,chat,intent)

# STAGE1 and the like are words, not one word: layers and overrides are several
# shellcheck disable=SC2086
osum-npu data intents "$data/intents" --train 80000 --test 4000 ${INTENTS:-}

# shellcheck disable=SC2086
"${learn[@]}" "$here/stage1.yaml" prompts="$tags" \
    data.train="{all: {path: '$train'}}" data.dev="{all: {path: '$dev'}}" out="$out/stage1" ${STAGE1:-}
# shellcheck disable=SC2086
"${learn[@]}" "$here/stage2.yaml" model.path="$out/stage1/model" data.train.intents.path="$data/intents/train.jsonl" \
    data.dev.intents.path="$data/intents/dev.jsonl" out="$out/stage2" ${STAGE2:-}
# shellcheck disable=SC2086
"${learn[@]}" "$here/stage3.yaml" model.path="$out/stage2/model" \
    data.train="{all: {path: '$train'}, intents: {path: '$data/intents/train.jsonl'}}" \
    data.dev="{all: {path: '$dev'}, intents: {path: '$data/intents/dev.jsonl'}}" \
    out="$out/stage3" ${STAGE3:-}

# the stages before, in short: how well each follows instructions; tags are the only fixed wordings that they know
for stage in stage1 stage2; do
    # shellcheck disable=SC2086
    "${eval[@]}" --model "$out/$stage/model" --prompts "$tags" --limit 200 --out "$out/report_$stage" ${EVAL:-}
done
# shellcheck disable=SC2086
"${eval[@]}" --model "$out/stage3/model" --out "$out/report" \
    --stage stage1="$out/report_stage1/report.json" --stage stage2="$out/report_stage2/report.json" ${EVAL:-}
