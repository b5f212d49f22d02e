#!/usr/bin/env bash
# Train on the nodes of a hostfile with DeepSpeed's launcher: run this on one node, which reaches the others by ssh.
#
#   HOSTFILE=hosts launch/deepspeed.sh ffhq1024 run=/shared/mine
#
# or, without ssh, run it on every node with its NODE_RANK. Arguments are those of `stylegan-pg train`. Environment:
#   HOSTFILE    lines like `node1 slots=8` (launch/hostfile)
#   HEAD, PORT  address of the first node, as reached by the others (the hostfile's first), and a free port there (29500)
#   NODE_RANK   this node's line in the hostfile, counted from 0; if set, no processes are started on other nodes
#   STOP_GRACE, PYTHON  as for launch/torchrun.sh
# It requires pip install stylegan-pg[deepspeed]. Exit codes, for this node's processes: 0 success, 1 error, 2 bad usage,
# 75 stopped. TERM, INT, USR1 and HUP stop the run with a checkpoint if it has processes on this node.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1:-} in '' | -h | --help) help_and_leave "$0" ;; esac
find_python
HOSTFILE=${HOSTFILE:-$here/hostfile} PORT=${PORT:-29500}
demand_numbers NODE_RANK STOP_GRACE
[[ $PORT =~ ^[1-9][0-9]{0,4}$ ]] && [ "$PORT" -lt 65536 ] || bad_usage "PORT=$PORT is no port: 1 to 65535"
[ -f "$HOSTFILE" ] && [ -r "$HOSTFILE" ] ||
    bad_usage "there is no hostfile $HOSTFILE: name one in HOSTFILE, with lines like 'node1 slots=8'"
# Normalises the lines, whatever blanks, comments and line endings the file has. Invalid lines begin with a question mark.
nodes=$(tr -d '\r' <"$HOSTFILE" | LC_ALL=C awk '
    NR == 1 { sub(/^\357\273\277/, "") }
    { sub(/#.*/, ""); gsub(/[ \t]*=[ \t]*/, "="); $1 = $1 }
    /^$/ { next }
    NF != 2 || $2 !~ /^slots=0*[1-9][0-9]*$/ { print "? line " NR ": " $0; exit }
    seen[$1]++ { print "? line " NR ": " $1 " is there twice"; exit }
    { print }')
case $nodes in
'') bad_usage "$HOSTFILE has no line like 'node1 slots=8'" ;;
*\?*) bad_usage "$HOSTFILE, ${nodes##*\? }: a line is like 'node1 slots=8'" ;;
esac
STYLEGAN_PG_WORLD=$(echo "$nodes" | awk -F= '{ sum += $2 } END { print sum }')
NPROC=$(echo "$nodes" | sed -n "$((10#${NODE_RANK:-0} + 1))s/.*slots=0*//p")
[ -n "$NPROC" ] || bad_usage "NODE_RANK=$NODE_RANK, but $HOSTFILE has $(echo "$nodes" | wc -l) nodes, counted from 0"
HEAD=${HEAD:-${nodes%% *}}
[ "${NODE_RANK:-}" != 0 ] || check_port
make_agent
HOSTFILE=$agent/hostfile
echo "$nodes" >"$HOSTFILE"
export NPROC OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PDSH_RCMD_TYPE="${PDSH_RCMD_TYPE:-ssh}"
[ "$(count_gpus)" != 0 ] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" ACCELERATE_USE_CPU=true
export STYLEGAN_PG_WORLD
options=()
if [ -n "${NODE_RANK:-}" ]; then
    options+=(--no_ssh --node_rank "$NODE_RANK")
else
    # ssh passes on only those variables that DeepSpeed finds in this file.
    export DS_ENV_FILE="$agent/environment"
    cat "$HOME/.deepspeed_env" 2>/dev/null >"$DS_ENV_FILE" || true
    for name in STYLEGAN_PG_AGENT STYLEGAN_PG_WORLD OMP_NUM_THREADS DS_ACCELERATOR ACCELERATE_USE_CPU; do
        [ -z "${!name:-}" ] || echo "$name=${!name}" >>"$DS_ENV_FILE"
    done
fi
run_ranks "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --force_multi "${options[@]}" \
    --master_addr "$HEAD" --master_port "$PORT" --no_local_rank --module stylegan_pg train "$@"
