# shellcheck shell=bash
# Sourced by the other scripts: help, this node's Python and devices, and a child process that can be stopped.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The ranks end when one of their parent scripts is killed.
export STYLEGAN_PG_SCRIPTS="${STYLEGAN_PG_SCRIPTS:+$STYLEGAN_PG_SCRIPTS }$$"

# Until there are processes to stop, a signal simply ends the script with 75.
trap 'exit 75' TERM INT USR1 HUP

# Prints the comment at the beginning of a script as its help.
help_and_leave() {
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "$1"
    exit 0
}

# Sets PYTHON, to the checkout's virtual environment if it exists, and makes the checkout importable.
find_python() {
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=$here/../.venv/bin/python
        [ -x "$PYTHON" ] || PYTHON=$(command -v python3 || command -v python) || PYTHON=python3
    fi
    export PYTHON PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
}

# Kubeflow describes the pods in torchrun's own variables, PET_*. They are used for variables that are not set. torchrun
# itself must not see them, because it would use them for options that the scripts leave at their defaults.
take_pet() {
    local name names=("${!PET_@}")
    [ "${#names[@]}" -gt 0 ] || return 0
    [[ ! ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] || NPROC=${NPROC:-$PET_NPROC_PER_NODE}
    if [ -n "${NNODES:-}" ] && [ -n "${PET_NNODES:-}" ] && [ "$NNODES" != "$PET_NNODES" ]; then
        echo "note: PET_NNODES=$PET_NNODES has no effect, because NNODES=$NNODES" >&2
    fi
    NNODES=${NNODES:-${PET_NNODES:-1}}
    if [ "$NNODES" != 1 ]; then
        [[ ${PET_RDZV_ENDPOINT:-} =~ ^(.+):([0-9]+)$ ]] || BASH_REMATCH=()
        NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-}}
        HEAD=${HEAD:-${PET_MASTER_ADDR:-${BASH_REMATCH[1]:-}}}
        PORT=${PORT:-${PET_MASTER_PORT:-${BASH_REMATCH[2]:-}}}
    fi
    for name in "${names[@]}"; do
        case $name in
        PET_NNODES | PET_NODE_RANK | PET_NPROC_PER_NODE | PET_MASTER_ADDR | PET_MASTER_PORT | PET_RDZV_ENDPOINT) ;;
        *) echo "note: $name has no effect here: the script gives torchrun its options itself" >&2 ;;
        esac
        unset "$name"
    done
}

# demand_numbers NAME...: checks that those of these variables that are set are whole numbers.
demand_numbers() {
    local name
    for name; do
        [[ ${!name:-0} =~ ^[0-9]+$ ]] || bad_usage "$name=${!name} is no whole number"
    done
}

# Prints the number of GPUs that PyTorch finds.
count_gpus() {
    if [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then
        "$PYTHON" -c 'import torch; print(torch.cuda.device_count())' || echo 0
    else
        echo 0
    fi
}

# Sets NPROC, by default to the number of GPUs or 1, and the number of threads, so that the processes share the cores.
find_devices() {
    if [ -z "${NPROC:-}" ]; then
        NPROC=$(count_gpus)
        [ "$NPROC" != 0 ] || NPROC=1
    fi
    case $NPROC in
    '' | *[!0-9]* | 0) bad_usage "NPROC=$NPROC is not a number of processes" ;;
    esac
    local cores
    cores=$("$PYTHON" -m stylegan_pg.processors 2>/dev/null || nproc 2>/dev/null || echo 1)
    export NPROC OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / NPROC > 0 ? cores / NPROC : 1))}"
}

bad_usage() {
    echo "error: $1" >&2
    exit 2
}

# find_nodes: sets NNODES, NODE_RANK, HEAD and PORT, and reports values that cannot be right.
find_nodes() {
    NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}} PORT=${PORT:-29500}
    [[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || bad_usage "NNODES=$NNODES is no number of nodes, such as 2 or 1:4"
    [[ $NODE_RANK =~ ^[0-9]+$ ]] || bad_usage "NODE_RANK=$NODE_RANK is no number: 0 on HEAD, others elsewhere"
    [[ $PORT =~ ^[1-9][0-9]{0,4}$ ]] && [ "$PORT" -lt 65536 ] || bad_usage "PORT=$PORT is no port: 1 to 65535"
    if [ "$NNODES" = 1 ]; then
        HEAD=${HEAD:-127.0.0.1} NODE_RANK=0
        return
    fi
    [ -n "${HEAD:-}" ] || bad_usage "NNODES=$NNODES without HEAD: give the address of the node with NODE_RANK=0"
    wait_for_name "$HEAD" ||
        bad_usage "HEAD=$HEAD is not known on $(hostname): give the address of the node with NODE_RANK=0"
    [ "$NODE_RANK" != 0 ] || check_port
}

# Checks HEAD and PORT on the first node.
check_port() {
    local found=0
    "$PYTHON" - "$HEAD" "$PORT" <<'END' || found=$?
import errno, socket, sys
try:
    family, _, _, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_STREAM)[0]
except OSError:
    sys.exit(5)
s = socket.socket(family, socket.SOCK_STREAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    s.bind(address)
except OSError as error:
    sys.exit({errno.EADDRINUSE: 3, errno.EACCES: 4}.get(error.errno, 5))
END
    case $found in
    0) ;;
    3) bad_usage "PORT=$PORT is taken on $(hostname): another run? Take another, the same on all nodes" ;;
    4) bad_usage "PORT=$PORT is not for this user: take one from 1024 on, the same on all nodes" ;;
    *) bad_usage "NODE_RANK=0, but HEAD=$HEAD is not an address of $(hostname): two nodes with NODE_RANK=0?" ;;
    esac
}

# Prints a free port, for runs on this node only.
free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Compiles the kernels once on this node, before the ranks start. Otherwise they would wait for each other.
prepare_node() {
    if [ -z "${STYLEGAN_PG_CACHE:-}" ]; then
        STYLEGAN_PG_CACHE=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/stylegan_pg-$(id -u)
        mkdir -m 700 "$STYLEGAN_PG_CACHE" 2>/dev/null || true
        # Libraries are loaded from this folder, so other users must not be able to write to it.
        if [ -L "$STYLEGAN_PG_CACHE" ] || ! [ -O "$STYLEGAN_PG_CACHE" ] ||
            [ -n "$(find "$STYLEGAN_PG_CACHE" -maxdepth 0 -perm /022)" ]; then
            bad_usage "$STYLEGAN_PG_CACHE could be written by others: name a folder of your own in STYLEGAN_PG_CACHE"
        fi
    fi
    export STYLEGAN_PG_CACHE
    mkdir -p "$STYLEGAN_PG_CACHE"
    "$PYTHON" -m stylegan_pg kernels build ||
        echo "warning: the kernels could not be built on $(hostname); plain PyTorch operations are used instead" >&2
}

# wait_for_name NAME: waits until the name resolves to an address. The names of pods resolve only some time after their
# start.
wait_for_name() {
    local end=$((SECONDS + ${NAME_TIMEOUT:-60}))
    until getent ahosts "$1" >/dev/null; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 1
    done
}

# await PID: waits for the end of a child, even if signals arrive meanwhile. Its exit code is in `status`.
await() {
    while :; do
        wait "$1" || true
        kill -0 "$1" 2>/dev/null || break
    done
    status=0
    wait "$1" || status=$?
}

agent='' # the folder through which this script and the ranks communicate (stylegan_pg/distributed/launcher.py)
make_agent() {
    agent=$(mktemp -d "${TMPDIR:-/tmp}/stylegan_pg-agent.XXXXXX")
    export STYLEGAN_PG_AGENT="$agent"
}

# run_ranks COMMAND...: runs a launcher, and exits with 0 for success, 1 for an error, 2 for bad usage, 75 if stopped.
#
# TERM, INT, USR1 and HUP request the ranks to stop (all at the same step, with a checkpoint). The request is a file, and a
# signal in case they are waiting for data. If there are no ranks yet, because the launcher waits for other nodes, the
# launcher is terminated. It is also terminated after STOP_GRACE seconds, if that is set.
run_ranks() {
    local child='' killer='' codes early=''
    [ -n "$agent" ] || make_agent
    stopping=''
    # shellcheck disable=SC2317,SC2329 # the trap calls it
    ask() {
        [ -z "$stopping" ] || return 0
        stopping=1
        echo "stopping: the ranks finish their step and write a checkpoint" >&2
        touch "$agent/stop"
        for file in "$agent"/pid.*; do
            if [ -r "$file" ]; then
                kill -USR1 "$(cat "$file")" 2>/dev/null || true
            elif ! compgen -G "$agent/exit.*" >/dev/null; then
                early=1 # there are no ranks yet
            fi
        done
        [ -z "$child" ] || limit
    }
    limit() {
        if [ -n "$early" ]; then
            kill -TERM -- "-$child" 2>/dev/null || true
            (sleep 5 && kill -KILL -- "-$child") >/dev/null 2>&1 & # it may ignore signals while it connects
            killer=$!
        elif [ -n "${STOP_GRACE:-}" ]; then
            (for ((i = 0; i < STOP_GRACE; i++)); do sleep 1; done && kill -TERM -- "-$child") >/dev/null 2>&1 &
            killer=$!
        fi
    }
    trap ask TERM INT USR1 HUP
    set -m # the launcher gets its own process group, so that signals reach it only through this script
    # Slurm sends signals to all processes of a step. USR1 would kill torchrun, while the ranks handle it.
    (trap '' USR1 && exec "$@") &
    child=$!
    set +m
    [ -z "$stopping" ] || [ -n "$killer" ] || limit
    await "$child"
    [ -z "$killer" ] || kill "$killer" 2>/dev/null || true
    codes=" $({ cat "$agent"/exit.* 2>/dev/null || true; } | tr '\n' ' ')"
    rm -rf "$agent"
    case $codes in
    *" 2 "*) exit 2 ;;
    *" 75 "*) exit 75 ;;
    *" 1 "*) exit 1 ;;
    esac
    [ -z "$early" ] || exit 75
    # All codes are zero, or there are none.
    [ "$status" -eq 0 ] || [ "$(echo "$codes" | wc -w)" -eq "${NPROC:-1}" ] || exit 1
    exit 0
}
