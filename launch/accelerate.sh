#!/usr/bin/env bash
# Train on one or more nodes with `accelerate launch`: run this on every node.
#
#   NNODES=2 NODE_RANK=0 HEAD=10.0.0.1 launch/accelerate.sh ffhq1024 run=/shared/mine
#
# Arguments are those of `stylegan-pg train`. Environment: NNODES (no range), NODE_RANK, HEAD, PORT, NPROC (the same on
# all nodes), MAX_RESTARTS, JOIN_TIMEOUT, STOP_GRACE and PYTHON as for launch/torchrun.sh, and
#   ACCELERATE_CONFIG  the configuration file (launch/accelerate/gpu.yaml if there are GPUs, otherwise cpu.yaml)
# On one node, PORT defaults to a free port.
# TERM, INT, USR1 and HUP stop the whole run with a checkpoint. Exit codes: 0 success, 1 error, 2 bad usage, 75 stopped.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1:-} in '' | -h | --help) help_and_leave "$0" ;; esac
find_python
demand_numbers MAX_RESTARTS JOIN_TIMEOUT NAME_TIMEOUT STOP_GRACE
take_pet
find_devices
case ${NNODES:-1} in *:*) bad_usage "NNODES=$NNODES: accelerate does not support ranges; use launch/torchrun.sh" ;; esac
[ "${NNODES:-1}" != 1 ] || PORT=${PORT:-$(free_port)}
find_nodes
if [ "$(count_gpus)" != 0 ]; then
    config=${ACCELERATE_CONFIG:-$here/accelerate/gpu.yaml}
else
    config=${ACCELERATE_CONFIG:-$here/accelerate/cpu.yaml}
    # Without this variable, accelerate assigns missing GPUs to ranks, and starts every process with a world size of one.
    export ACCELERATE_USE_CPU=true
fi
[ -r "$config" ] || bad_usage "there is no ACCELERATE_CONFIG=$config"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 STYLEGAN_PG_WORLD=$((NNODES * NPROC))
[ "$NNODES" = 1 ] && [ -z "${SLURM_JOB_ID:-}" ] || prepare_node
if [ "$STYLEGAN_PG_WORLD" = 1 ]; then
    unset RANK LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    WORLD_SIZE=1 run_ranks "$PYTHON" -m stylegan_pg train "$@" # accelerate refuses a world size of one with these files
fi
[ "$NNODES" != 1 ] || check_port
is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)
run_ranks "$PYTHON" -m accelerate.commands.launch --config_file "$config" \
    --num_machines "$NNODES" --num_processes "$STYLEGAN_PG_WORLD" --machine_rank "$NODE_RANK" \
    --main_process_ip "$HEAD" --main_process_port "$PORT" --max_restarts "${MAX_RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_conf "is_host=$is_host,join_timeout=${JOIN_TIMEOUT:-600},rdzv_id=${JOB:-stylegan-pg}" \
    -m stylegan_pg train "$@"
