#!/usr/bin/env bash
# Train under msrun, the launcher of MindSpore's wheel. On each node:
#
#   scripts/msrun_train.sh recipe.yaml --devices 8 --nodes 3 --node-rank 1 --master host0 [-- dotted.key=value …]
#
# scripts/msrun_train.sh --help lists the options; docs/cluster.md tells the whole way.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

parse 8118 "$@"
command -v msrun >/dev/null || fail "there is no msrun in PATH; it comes with MindSpore (pip install mindspore," \
    "in an environment of its own whose bin folder comes last in PATH), or take scripts/torchrun_train.sh"
# without --join msrun would return at once and leave the run in the background
run msrun --worker_num=$((nodes * devices)) --local_worker_num="$devices" --node_rank="$node_rank" \
    --master_addr="$master" --master_port="$port" --log_dir="$logs" --join=True \
    python -m osum_npu train "${words[@]}"
