#!/usr/bin/env bash
# Six packs of real recordings, from sound to a score in runs/small_real. Usage: recipes/small_real/run.sh PACKS
# PACKS holds the unpacked packs side by side, in this project's row form. Run again after an interruption, it goes on.
set -euo pipefail
packs=$(realpath "$1") out=runs/small_real
cd "$(dirname "$0")/../.."
python recipes/small_real/make_data.py "$packs" "$out/data"
for stage in hear understand; do
    OMP_NUM_THREADS=1 scripts/torchrun_train.sh "recipes/small_real/$stage.yaml" --devices 2
done
lists=()
for manifest in "$out"/data/dev/*.jsonl; do lists+=(--data "$manifest"); done
osum-npu eval --model "$out/understand/model" "${lists[@]}" --tasks asr,timestamps,event-only,gender-only,age-only --out "$out/report"
OMP_NUM_THREADS=1 python recipes/small_real/probe.py "$out/data" --predictions "$out/report/predictions.jsonl" --out "$out/comparison.json"
