#!/usr/bin/env bash
# Starts the ranks of one node; run it on every node with the same arguments, which are those of pretrain_vlm.py:
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=host0 scripts/torchrun_node.sh --config my_run.yaml
#   NODES=2 NODE_RANK=1 MASTER_ADDR=host0 scripts/torchrun_node.sh --config my_run.yaml
#
# NODES and NODE_RANK: how many nodes there are, and which of them this is, from 0 (default: 1 and 0).
# MASTER_ADDR and MASTER_PORT: host of node 0, and a port that is free there (default: 127.0.0.1 for a single node, and
# 29500).
# RANKS_PER_NODE: default: as many as nvidia-smi lists GPUs. PYTHON: default: .venv/bin/python of this checkout.
# RUN_IN: words before the command, as of a container: RUN_IN="apptainer exec --nv image.sif".
# TORCHRUN_OPTIONS: further options of torchrun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=}" "${MASTER_PORT:=29500}" "${PYTHON:=.venv/bin/python}"
[ -n "$MASTER_ADDR" ] || [ "$NODES" = 1 ] || { echo "MASTER_ADDR is not set: name the host of node 0" >&2; exit 2; }
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
if [ -z "${RANKS_PER_NODE:-}" ]; then
  RANKS_PER_NODE=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  [ "$RANKS_PER_NODE" -gt 0 ] || { echo "no GPU found on $(hostname): set RANKS_PER_NODE" >&2; exit 2; }
fi
# RUN_IN and TORCHRUN_OPTIONS are lists of words.
# shellcheck disable=SC2086
exec ${RUN_IN:-} "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --node-rank="$NODE_RANK" \
  --nproc-per-node="$RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  ${TORCHRUN_OPTIONS:-} pretrain_vlm.py "$@"
