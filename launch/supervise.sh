#!/usr/bin/env bash
# Keep a launch command going on a machine without a scheduler: run this on each of a pair, or a few, of machines.
#
#   NNODES=2 NODE_RANK=0 HEAD=10.0.0.1 launch/supervise.sh launch/torchrun.sh ffhq1024 run=/shared/mine
#
# Acts on the command's exit code: 0 the run is done, and so is this; 2 bad usage, nothing to be mended by trying again;
# 75 to be continued, so it is started again; 1 (or a signal) a fault: started again after PAUSE seconds, at most
# TRIES times in a row. Environment:
#   TRIES    faults in a row after which this gives up, with 1 (10)
#   PAUSE    seconds before the next start (10)
#   HEALTHY  seconds after which a start counts as good, and faults are counted anew (600)
# TERM, INT, USR1 and HUP stop the command (with a checkpoint) and then this, with its code.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1:-} in '' | -h | --help) help_and_leave "$0" ;; esac

demand_numbers TRIES HEALTHY
stopping='' child='' faults=0
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
    stopping=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT USR1 HUP
while :; do
    started=$SECONDS
    set -m # Ctrl-C reaches the command through here alone
    "$@" &
    child=$!
    set +m
    [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null || true
    await "$child"
    code=$status child=''
    [ -z "$stopping" ] || exit "$code"
    case $code in
    0 | 2) exit "$code" ;;
    75) faults=0 ;;
    *)
        [ $((SECONDS - started)) -lt "${HEALTHY:-600}" ] || faults=0
        faults=$((faults + 1))
        if [ "$faults" -ge "${TRIES:-10}" ]; then
            echo "supervise: giving up after $faults faults in a row (the last exit code was $code)" >&2
            exit 1
        fi
        ;;
    esac
    echo "supervise: exit code $code; starting again in ${PAUSE:-10} s" >&2
    sleep "${PAUSE:-10}" &
    wait $! || true
    [ -z "$stopping" ] || exit 75
done
