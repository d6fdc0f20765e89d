#!/usr/bin/env bash
# One node of several: run the same line on every node, each with its own NODE_RANK. Usage: launch/torchrun.sh COMMAND [key=value ...]
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node-a PROCESSES_PER_NODE=8 launch/torchrun.sh train experiment=... resume=auto
# Needed: NODES, NODE_RANK (0..NODES-1), MASTER_ADDR (a node that all can reach). Optional: MASTER_PORT (29500),
# PROCESSES_PER_NODE (1), PYTHON. SAILPLAN_DRY_RUN=1 prints the command instead.
set -euo pipefail

fail() { echo "sailplan: $1" >&2; exit 64; }
for name in NODES NODE_RANK MASTER_ADDR; do
  [[ -n ${!name:-} ]] || fail "$name is not set, expected NODES, NODE_RANK and MASTER_ADDR: export $name on this node (see docs/cluster.md)"
done
[[ $NODES =~ ^[1-9][0-9]*$ ]] || fail "NODES is '$NODES', expected the number of nodes: export a number of at least 1"
if ! [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= NODES)); then
  fail "NODE_RANK is '$NODE_RANK', expected 0..$((NODES - 1)): export this node's own number"
fi
[[ $# -ge 1 ]] || fail "no command given, expected one such as train: launch/torchrun.sh COMMAND [key=value ...]"

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$home/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "${PYTHON:-python3}") || fail "PYTHON is '${PYTHON:-python3}', which is not an executable: set its path"
# A stop signal reaches the ranks, which save and leave with 75; only after this many seconds are they killed.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

line=("$python" -m sailplan.runtime.torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${PROCESSES_PER_NODE:-1}"
      --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}"
      --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" -m sailplan "$@")
if [[ ${SAILPLAN_DRY_RUN:-0} == 1 ]]; then printf '%q ' "${line[@]}"; echo; exit 0; fi
exec "${line[@]}"
