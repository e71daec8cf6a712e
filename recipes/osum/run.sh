#!/usr/bin/env bash
# OSUM from Whisper to a score: stage 1, stage 2, evaluation. The same command goes on after an interruption.
#
#   recipes/osum/run.sh TRAIN.jsonl DEV.jsonl TEST.jsonl [OUT]
#
# DEVICES          processes on this machine, one a device, started by scripts/torchrun_train.sh; by default one, by itself
# STAGE1, STAGE2   more layers and dotted.key=value of that stage, e.g. STAGE2="mine.yaml model.llm.path=/weights/qwen2-7b"
# On one CPU, with random weights:
#   STAGE1=recipes/osum/tiny/stage1.yaml STAGE2=recipes/osum/tiny/stage2.yaml recipes/osum/run.sh …
set -euo pipefail
train=$1 dev=$2 test=$3 out=${4:-runs/osum}
here=$(dirname "$0")
data="data.train.all.path=$train data.dev.all.path=$dev"
learn=(osum-npu train)
[[ ! ${DEVICES:-} ]] || learn=("$here/../../scripts/torchrun_train.sh" --devices "$DEVICES")
# words, not one word: layers and overrides are several
# shellcheck disable=SC2086
"${learn[@]}" "$here/stage1.yaml" ${STAGE1:-} $data out="$out/stage1"
# shellcheck disable=SC2086
"${learn[@]}" "$here/stage2.yaml" ${STAGE2:-} $data out="$out/stage2" \
    model.encoder_weights="$out/stage1/model"
osum-npu eval --model "$out/stage2/model" --data "$test" --out "$out/report"
