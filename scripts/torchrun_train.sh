#!/usr/bin/env bash
# Train under torchrun. On each node:
#
#   scripts/torchrun_train.sh recipe.yaml --devices 8 --nodes 3 --node-rank 1 --master host0 [-- dotted.key=value …]
#
# scripts/torchrun_train.sh --help lists the options; docs/cluster.md tells the whole way.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

parse 29500 "$@"
run python -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$devices" --node-rank="$node_rank" \
    --master-addr="$master" --master-port="$port" --log-dir="$logs" --tee=3 \
    -m osum_npu train "${words[@]}"
