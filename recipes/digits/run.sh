#!/usr/bin/env bash
# Connected digits, from recordings to a score. Usage: recipes/digits/run.sh FSDD_FOLDER [OUT]
# FSDD_FOLDER holds train.jsonl and dev.jsonl in this project's row form (`osum-npu data prepare fsdd` makes them).
set -euo pipefail
fsdd=$1 out=${2:-runs/digits}
cd "$(dirname "$0")/../.."
python recipes/digits/make_data.py "$fsdd" "$out/data"
osum-npu train recipes/digits/recipe.yaml out="$out" \
    data.train.digits.path="$out/data/train.jsonl" data.dev.digits.path="$out/data/dev.jsonl"
osum-npu eval --model "$out/model" --data "$out/data/dev.jsonl" --tasks asr --out "$out/report"
