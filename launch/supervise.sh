#!/usr/bin/env bash
# Restart a launch command when necessary, on machines without a scheduler: run this on every machine.
#
#   NNODES=2 NODE_RANK=0 HEAD=10.0.0.1 launch/supervise.sh launch/torchrun.sh ffhq1024 run=/shared/mine
#
# What happens depends on the command's exit code. After 0 (success) and 2 (bad usage) this script ends as well. After 75
# (stopped) the command is restarted. After 1 or a signal (an error) it is restarted after PAUSE seconds, at most TRIES
# times in succession. Environment:
#   TRIES    number of successive errors after which this script gives up, with exit code 1 (10)
#   PAUSE    seconds before the next start (10)
#   HEALTHY  if the command ran for so many seconds, errors are counted from zero again (600)
# TERM, INT, USR1 and HUP stop the command (with a checkpoint) and then this script, with the same exit code.
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
    set -m # Ctrl-C reaches the command only through this script
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
