#!/usr/bin/env bash
# OSUM-Pangu in small: corpus, three stages, scores after each of them, and the third without the second.
# Usage: recipes/osum_pangu/small/run.sh [RECORDINGS]. Run again after an interruption, it goes on.
# RECORDINGS holds train.jsonl and dev.jsonl of real recordings in this project's row form, as `osum-npu data prepare fsdd`
# makes them: stages 1 and 3 learn them beside the synthesized corpus, and transcripts of dev are scored at the end.
set -euo pipefail
recordings=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../../.."
here=recipes/osum_pangu/small out=runs/osum_pangu_small
tasks=asr,timestamps,event,emotion,style,gender,age,chat
sources=()  # an empty list is an error of old bash, hence the +
[[ -z $recordings ]] || for part in train dev; do sources+=("data.$part.recordings.path=$recordings/$part.jsonl"); done
[[ -e $out/corpus/test.jsonl ]] || osum-npu data synthesize "$out/corpus" --test 3600
[[ -e $out/intents/test.jsonl ]] || osum-npu data intents "$out/intents" --train 120000 --tasks "$tasks"

# two processes of one thread are faster than one of two
learn() { OMP_NUM_THREADS=1 scripts/torchrun_train.sh "$here/$1.yaml" --devices 2 -- "${@:2}"; }
learn understand ${sources[@]+"${sources[@]}"}
learn intents
learn follow ${sources[@]+"${sources[@]}"}
learn follow ${sources[@]+"${sources[@]}"} model.path="$out/understand/model" out="$out/follow_without_stage2"

evaluate() { osum-npu eval --model "$out/$1/model" --data "$out/corpus/test.jsonl" --tasks "$tasks" --natural "${@:2}"; }
stages=()
for stage in understand intents follow_without_stage2; do
    short=(--limit 100 --out "$out/report_$stage")
    # before stage 3 a model knows no fixed wordings but tags
    [[ $stage == follow* ]] || short+=(--prompts recipes/osum_pangu/tags.yaml)
    evaluate "$stage" "${short[@]}"
    stages+=(--stage "$stage=$out/report_$stage/report.json")
done
evaluate follow --limit 1000 "${stages[@]}" --out "$out/report"
osum-npu eval --model "$out/follow/model" --data "$out/intents/test.jsonl" --tasks intent --out "$out/report_intent"
osum-npu eval --model "$out/follow/model" --data "$here/free.jsonl" --tasks intent --out "$out/report_free"
[[ -z $recordings ]] || osum-npu eval --model "$out/follow/model" --data "$recordings/dev.jsonl" --tasks asr --natural \
    --out "$out/report_recordings"
