# shellcheck shell=bash
# Sourced by the scripts here: help, this node's Python and devices, and a child that can be stopped and understood.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The comment at a script's head, as its help.
help_and_leave() {
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "$1"
    exit 0
}

# Sets PYTHON, from the checkout's environment if it has one, and lets it find the checkout.
find_python() {
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=$here/../.venv/bin/python
        [ -x "$PYTHON" ] || PYTHON=$(command -v python3 || command -v python) || PYTHON=python3
    fi
    export PYTHON PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
}

# Sets NPROC, a process for each GPU, or one; and threads so that the processes share the cores.
find_devices() {
    if [ -z "${NPROC:-}" ]; then
        NPROC=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || NPROC=1
    fi
    case $NPROC in
    '' | *[!0-9]* | 0) bad_usage "NPROC=$NPROC is no number of processes" ;;
    esac
    local cores
    cores=$(nproc 2>/dev/null || echo 1)
    export NPROC OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / NPROC > 0 ? cores / NPROC : 1))}"
}

bad_usage() {
    echo "error: $1" >&2
    exit 2
}

# Compile the kernels once on this node, before the ranks start and wait for each other.
prepare_node() {
    export STYLEGAN_PG_CACHE="${STYLEGAN_PG_CACHE:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/stylegan_pg-$(id -u)}"
    mkdir -p "$STYLEGAN_PG_CACHE"
    "$PYTHON" -m stylegan_pg kernels build ||
        echo "warning: the kernels could not be built on $(hostname); plain PyTorch operations take their place" >&2
}

# await PID: wait for a child to its very end, however many signals arrive meanwhile; its exit code is in `status`.
await() {
    while :; do
        wait "$1" || true
        kill -0 "$1" 2>/dev/null || break
    done
    status=0
    wait "$1" || status=$?
}

# run_ranks COMMAND...: run a launcher, and leave with 0 done, 2 bad usage, 75 to be continued, 1 a fault.
#
# TERM, INT and USR1 ask the ranks to stop (all of them at the same step, with a checkpoint), through a file. After
# STOP_GRACE seconds, where that is given, the launcher itself is told to end.
run_ranks() {
    local child killer='' codes
    STYLEGAN_PG_AGENT=$(mktemp -d "${TMPDIR:-/tmp}/stylegan_pg-agent.XXXXXX")
    export STYLEGAN_PG_AGENT
    stopping=''
    set -m # a process group of its own: signals for this one reach the launcher through here alone
    # Slurm signals all processes of a step: torchrun would die of USR1, the ranks know what to do.
    (trap '' USR1 && exec "$@") &
    child=$!
    set +m
    # shellcheck disable=SC2317,SC2329 # the trap calls it
    ask() {
        [ -z "$stopping" ] || return 0
        stopping=1
        echo "stopping: the ranks finish their step and write a checkpoint" >&2
        touch "$STYLEGAN_PG_AGENT/stop"
        if [ -n "${STOP_GRACE:-}" ]; then
            (for ((i = 0; i < STOP_GRACE; i++)); do sleep 1; done && kill -TERM -- "-$child") >/dev/null 2>&1 &
            killer=$!
        fi
    }
    trap ask TERM INT USR1
    await "$child"
    [ -z "$killer" ] || kill "$killer" 2>/dev/null || true
    codes=" $({ cat "$STYLEGAN_PG_AGENT"/exit.* 2>/dev/null || true; } | tr '\n' ' ')"
    rm -rf "$STYLEGAN_PG_AGENT"
    case $codes in
    *" 2 "*) exit 2 ;;
    *" 75 "*) exit 75 ;;
    *" 1 "*) exit 1 ;;
    esac
    # Nothing but zeros, or nothing at all.
    [ "$status" -eq 0 ] || [ "$(echo "$codes" | wc -w)" -eq "${NPROC:-1}" ] || exit 1
    exit 0
}
