#!/usr/bin/env bash
# N processes on this machine. Usage: launch/local.sh N COMMAND [key=value ...]
#   launch/local.sh 2 train experiment=quickstart resume=auto
# PYTHON chooses the interpreter (default: .venv/bin/python, else python3). SAILPLAN_DRY_RUN=1 prints the command instead.
set -euo pipefail

usage() { echo "sailplan: $1; usage: launch/local.sh N COMMAND [key=value ...]" >&2; exit 64; }
[[ $# -ge 2 ]] || usage "expected a number of processes and a command, found $# argument(s)"
[[ $1 =~ ^[1-9][0-9]*$ ]] || usage "N is '$1', expected a number of processes of at least 1"
processes=$1
shift

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$home/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "${PYTHON:-python3}") || usage "PYTHON is '${PYTHON:-python3}', which is not an executable"
# A stop signal reaches the ranks, which save and leave with 75; only after this many seconds are they killed.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

line=("$python" -m sailplan.runtime.torchrun --standalone --nproc-per-node "$processes"
      --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" -m sailplan "$@")
if [[ ${SAILPLAN_DRY_RUN:-0} == 1 ]]; then printf '%q ' "${line[@]}"; echo; exit 0; fi
exec "${line[@]}"
