#!/usr/bin/env bash
# Train on one or more nodes with torchrun: run this on every node.
#
#   NNODES=2 NODE_RANK=0 HEAD=10.0.0.1 launch/torchrun.sh ffhq1024 run=/shared/mine     on 10.0.0.1
#   NNODES=2 NODE_RANK=1 HEAD=10.0.0.1 launch/torchrun.sh ffhq1024 run=/shared/mine     on the other
#
# Arguments are those of `stylegan-pg train`. The run's folder must be on a file system that all nodes share.
# Environment:
#   NNODES        number of nodes (1), or a minimum and a maximum such as 1:4, which allows nodes to leave and join
#   NODE_RANK     0 on HEAD, 1, 2, ... on the other nodes (0)
#   HEAD, PORT    address of the first node, as reached by the others, and a free port there (29500)
#   NPROC         processes on this node (its GPUs, or 1)
#   LOCAL_ADDR    this node's own address, if its name does not resolve to it
#   MAX_RESTARTS  number of times that the processes are restarted after a failure (3)
#   JOIN_TIMEOUT  seconds that nodes wait for each other (600)
#   NAME_TIMEOUT  seconds to wait until the name HEAD can be resolved (60)
#   JOB           a name for this run, the same on all nodes, if several runs share HEAD and PORT
#   STOP_GRACE    seconds from a request to stop until the processes are killed (default: no limit)
#   PYTHON        the interpreter (the checkout's .venv, or else python3)
# Kubeflow's PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR and PET_MASTER_PORT are used if NNODES,
# NODE_RANK, NPROC, HEAD and PORT are not set.
# TERM, INT, USR1 and HUP stop the whole run with a checkpoint. Exit codes: 0 success, 1 error, 2 bad usage, 75 stopped.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1:-} in '' | -h | --help) help_and_leave "$0" ;; esac
find_python
demand_numbers MAX_RESTARTS JOIN_TIMEOUT NAME_TIMEOUT STOP_GRACE
take_pet
find_devices
find_nodes
# Otherwise a node that joins again would find old keys in the store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-3}")
command+=(--monitor-interval 1)
if [ "$NNODES" = 1 ]; then
    command+=(--standalone)
    export STYLEGAN_PG_WORLD=$NPROC
else
    is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)
    conf="is_host=$is_host,join_timeout=${JOIN_TIMEOUT:-600},read_timeout=${JOIN_TIMEOUT:-600},last_call_timeout=5"
    command+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-conf "$conf")
    command+=(--rdzv-id "${JOB:-stylegan-pg}")
    [ -z "${LOCAL_ADDR:-}" ] || command+=(--local-addr "$LOCAL_ADDR")
    case $NNODES in *:*) ;; *) export STYLEGAN_PG_WORLD=$((NNODES * NPROC)) ;; esac
fi
[ "$NNODES" = 1 ] && [ -z "${SLURM_JOB_ID:-}" ] || prepare_node
run_ranks "${command[@]}" -m stylegan_pg train "$@"
