#!/usr/bin/env bash
# Train on this machine, with a process for each of its GPUs.
#
#   launch/single.sh ffhq1024 run=runs/mine
#
# Arguments are those of `stylegan-pg train`. Environment: NPROC, MAX_RESTARTS, STOP_GRACE and PYTHON as for
# launch/torchrun.sh. TERM, INT, USR1 and HUP stop the run with a checkpoint. Exit codes: 0 success, 1 error, 2 bad usage,
# 75 stopped.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1:-} in '' | -h | --help) help_and_leave "$0" ;; esac
NNODES=1 exec "$here/torchrun.sh" "$@"
