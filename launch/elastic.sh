#!/usr/bin/env bash
# One node of a job that goes on with fewer or more nodes. The same line on every node, in any order. Usage: launch/elastic.sh COMMAND [key=value ...]
#   NODES=2:4 RENDEZVOUS=node-a:29400 JOB=big PROCESSES_PER_NODE=8 launch/elastic.sh train experiment=... name=big
# Needed: NODES (MIN:MAX), RENDEZVOUS (HOST:PORT on the node whose launcher keeps the list of nodes: without that node the job ends).
# Optional: JOB (a name that only this job's nodes share, "sailplan"), RESTARTS (3: starts after a lost rank or node; a stop or a
# node that joins costs none), WAIT (30: seconds for more nodes once MIN are there), SILENCE (15: seconds until a silent node is
# given up), PROCESSES_PER_NODE (1), PYTHON. SAILPLAN_DRY_RUN=1 prints the command instead.
# For `train`, resume=auto is added unless `resume=` is given: every start goes on from the newest checkpoint.
set -euo pipefail

fail() { echo "sailplan: $1" >&2; exit 64; }
for name in NODES RENDEZVOUS; do
  [[ -n ${!name:-} ]] || fail "$name is not set, expected NODES=MIN:MAX and RENDEZVOUS=HOST:PORT: export $name on this node (see docs/cluster.md)"
done
if ! [[ $NODES =~ ^([1-9][0-9]*):([1-9][0-9]*)$ ]] || ((BASH_REMATCH[1] > BASH_REMATCH[2])); then
  fail "NODES is '$NODES', expected MIN:MAX such as 2:4: export the least and the most nodes"
fi
[[ $RENDEZVOUS =~ ^.+:[0-9]+$ ]] || fail "RENDEZVOUS is '$RENDEZVOUS', expected HOST:PORT such as node-a:29400"
[[ ${SILENCE:-15} =~ ^[1-9][0-9]*$ ]] && ((${SILENCE:-15} >= 3)) || fail "SILENCE is '${SILENCE:-15}', expected seconds, at least 3"
[[ $# -ge 1 ]] || fail "no command given, expected one such as train: launch/elastic.sh COMMAND [key=value ...]"
if [[ $1 == train && " $* " != *" resume="* ]]; then set -- "$@" resume=auto; fi

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$home/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "${PYTHON:-python3}") || fail "PYTHON is '${PYTHON:-python3}', which is not an executable: set its path"
# A stop signal reaches the ranks, which save and leave with 75; only after this many seconds are they killed.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

line=("$python" -m sailplan.runtime.torchrun --nnodes "$NODES" --nproc-per-node "${PROCESSES_PER_NODE:-1}" --max-restarts "${RESTARTS:-3}"
      --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${JOB:-sailplan}"
      --rdzv-conf "last_call_timeout=${WAIT:-30},keep_alive_interval=$((${SILENCE:-15} / 3)),keep_alive_max_attempt=3"
      --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" -m sailplan "$@")
if [[ ${SAILPLAN_DRY_RUN:-0} == 1 ]]; then printf '%q ' "${line[@]}"; echo; exit 0; fi
exec "${line[@]}"
