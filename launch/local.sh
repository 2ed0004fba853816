#!/usr/bin/env bash
# The same run with N processes on this machine: launch/local.sh [--requeue] N COMMAND [arguments of scalepeft COMMAND]
#   launch/local.sh 2 train configs/runs/demo.yaml engine.name=fsdp2 run_dir=runs/demo
#   launch/local.sh 2 accelerate --config_file configs/accelerate/ddp.yaml SCRIPT ...   (your own, with PreemptionCallback)
# Signals (Ctrl-C, TERM, USR1) reach every rank; the exit code is that of the ranks: 0 finished, 75 stopped and saved.
# A rank that fails takes the others with it. PYTHON picks the interpreter (default: .venv's, else python3).
# Of several machines, each runs this line with SCALEPEFT_NODES=2 SCALEPEFT_NODE=0 (1, ...) MASTER_ADDR=HOST, the machine of
# rank 0, MASTER_PORT (29500): there is no folder then that they share, so the ranks meet at that port (docs/security.md).
#   --requeue   as under Slurm: USR1 is a preemption, after which the run comes back by itself (until
#               SCALEPEFT_MAX_RESTARTS starts in a row gain nothing); Ctrl-C and TERM end it, as scancel does
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/job.sh
source "$here/launch/job.sh"

requeue=
if [ "${1:-}" = --requeue ]; then requeue=yes; shift; fi
case ${1:-} in
'' | *[!0-9]* | 0) echo "usage: launch/local.sh [--requeue] N COMMAND [ARGUMENTS]   (N: number of processes, got '${1:-}')" >&2; exit 2 ;;
esac
n=$((10#$1)); shift
nodes=${SCALEPEFT_NODES:-1} node=${SCALEPEFT_NODE:-0}
case $nodes,$node in
*[!0-9,]* | ,* | *, | 0,*) echo "local.sh: SCALEPEFT_NODES=$nodes SCALEPEFT_NODE=$node: expected whole numbers, the second from 0" >&2; exit 2 ;;
esac
if [ "$node" -ge "$nodes" ]; then echo "local.sh: SCALEPEFT_NODE=$node of SCALEPEFT_NODES=$nodes: the first is 0" >&2; exit 2; fi
if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then echo "local.sh: SCALEPEFT_NODES=$nodes needs MASTER_ADDR=HOST, the machine of rank 0" >&2; exit 2; fi
if [ "$nodes" -gt 1 ] && [ -n "$requeue" ]; then echo "local.sh: --requeue is for one machine; leave it out with SCALEPEFT_NODES=$nodes" >&2; exit 2; fi
module=scalepeft
if [ "${1:-}" = accelerate ]; then module=scalepeft.integrations.trainer; shift; fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3; [ ! -x "$here/.venv/bin/python" ] || PYTHON=$here/.venv/bin/python
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then OMP_NUM_THREADS=$(( $(nproc) / n )); [ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1; fi

# The traps only take note; the loop below passes on what came, once a rank has its handlers: before, the signal would
# kill it unsaved. With two signals, the one that ends the run for good counts.
signals=()
ends_for_good=
trap 'signals+=(USR1)' USR1
trap 'signals+=(INT); ends_for_good=yes' INT
trap 'signals+=(TERM); ends_for_good=yes' TERM HUP
takes() {  # takes SIGNAL PID: true once the process handles the signal
    local name mask number
    number=$(kill -l "$1")
    while read -r name mask; do
        case $name in SigCgt:) (( 16#$mask >> (number - 1) & 1 )) && return 0 ;; esac
    done < "/proc/$2/status"
    return 1
} 2>/dev/null

# run_ranks ARGUMENTS: one start of the run; sets code.
run_ranks() {
    local meet rank left still pid ended rc i sent
    local -A passed=()  # how many of the signals a rank has got
    # The ranks meet in a folder that nobody else may enter, new for each start: docs/security.md.
    meet=
    if [ "$nodes" -eq 1 ]; then meet=$(mktemp -d) || exit 2; MASTER_ADDR=127.0.0.1; fi
    local pids=()
    exec 3</dev/null 4</dev/null
    # Prompts of a pipe are rank 0's; a terminal, from which no process in the background may read, is nobody's.
    if [ "${1:-}" = generate ] && [ ! -t 0 ]; then exec 4<&0; fi
    set -m  # own process groups: a Ctrl-C comes here alone and is passed on once
    for ((rank = 0; rank < n; rank++)); do
        RANK=$((node * n + rank)) LOCAL_RANK=$rank WORLD_SIZE=$((nodes * n)) LOCAL_WORLD_SIZE=$n SCALEPEFT_RENDEZVOUS=$meet \
            MASTER_ADDR=$MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} \
            OMP_NUM_THREADS=$OMP_NUM_THREADS "$PYTHON" -m $module "$@" <&$((node * n + rank ? 3 : 4)) 3<&- 4<&- &
        pids+=($!)
    done
    set +m
    code=0
    left=("${pids[@]}")
    while [ ${#left[@]} -gt 0 ]; do
        for pid in "${left[@]}"; do
            sent=${passed[$pid]:-0}
            if [ "$sent" -lt ${#signals[@]} ] && takes "${signals[$sent]}" "$pid"; then
                kill -"${signals[$sent]}" "$pid" 2>/dev/null
                passed[$pid]=$((sent + 1))
            fi
        done
        ended=
        sleep 0.2 & tick=$!
        wait -n -p ended "${left[@]}" $tick; rc=$?
        case ${ended:-$tick} in "$tick") continue ;; esac   # time to look again, or a signal came
        still=(); for pid in "${left[@]}"; do [ "$pid" = "$ended" ] || still+=("$pid"); done
        left=("${still[@]}")
        if [ $rc -ne 0 ] && [ $rc -ne 75 ] && [ ${#left[@]} -gt 0 ]; then
            # Give the others a moment to end by themselves, with the same error.
            for ((i = 0; i < 50; i++)); do kill -0 "${left[@]}" 2>/dev/null || break; sleep 0.1; done
            kill -KILL "${left[@]}" 2>/dev/null
            wait "${left[@]}" 2>/dev/null
            left=()
            code=$rc
        fi
        if [ $rc -ne 0 ] && { [ $code -eq 0 ] || [ $code -eq 75 ]; }; then code=$rc; fi
    done
    [ -z "$meet" ] || rm -rf "$meet"
}

if [ -z "$requeue" ]; then run_ranks "$@"; exit "$code"; fi

state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
while :; do
    begin_start "$state" || exit 2
    ! gains_nothing || exit 1
    run_ranks "$@"
    [ -f "$state/stopped" ] || exit "$code"
    [ -z "$ends_for_good" ] || exit 75
    signals=()
    say "stopped and saved ($(cat "$state/stopped")): comes back"
done
