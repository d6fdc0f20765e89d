#!/usr/bin/env bash
# Checks configuration, data and ranks before a long run. Usage: launch/preflight.sh N [key=value ...]
#   launch/preflight.sh 2 experiment=quickstart
# Across nodes, run `launch/torchrun.sh check [key=value ...]` on each of them instead.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "sailplan: expected a number of processes, found none; usage: launch/preflight.sh N [key=value ...]" >&2; exit 64; }
processes=$1
shift
exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$processes" check "$@"
