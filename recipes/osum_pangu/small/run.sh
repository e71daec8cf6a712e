#!/usr/bin/env bash
# OSUM-Pangu in small: corpus, three stages, scores after the first and the third, and the third without the second.
# Usage: recipes/osum_pangu/small/run.sh. Run again after an interruption, it goes on.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=recipes/osum_pangu/small out=runs/osum_pangu_small
tasks=asr,timestamps,event,emotion,style,gender,age,chat
[[ -e $out/corpus/test.jsonl ]] || osum-npu data synthesize "$out/corpus" --test 3600
[[ -e $out/intents/test.jsonl ]] || osum-npu data intents "$out/intents" --tasks "$tasks"
osum-npu train "$here/understand.yaml"
osum-npu train "$here/intents.yaml"
osum-npu train "$here/follow.yaml"
osum-npu train "$here/follow.yaml" model.path="$out/understand/model" out="$out/follow_without_intents"
stages=()
for stage in understand intents follow_without_intents follow; do
    osum-npu eval --model "$out/$stage/model" --data "$out/corpus/test.jsonl" --tasks "$tasks" --limit 1000 --natural \
        "${stages[@]}" --out "$out/report_$stage"
    stages+=(--stage "$stage=$out/report_$stage/report.json")
done
osum-npu eval --model "$out/follow/model" --data "$out/intents/test.jsonl" --tasks intent --out "$out/report_intent"
