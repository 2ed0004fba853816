#!/usr/bin/env bash
# The same run with N processes on this machine: launch/local.sh N COMMAND [arguments of scalepeft COMMAND]
#   launch/local.sh 2 train configs/runs/demo.yaml engine.name=fsdp2 run_dir=runs/demo
# Signals (Ctrl-C, TERM, USR1) reach every rank; the exit code is that of the ranks: 0 finished, 75 stopped and saved.
# A rank that fails takes the others with it. PYTHON picks the interpreter (default: .venv's, else python3).
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case ${1:-} in
'' | *[!0-9]* | 0) echo "usage: launch/local.sh N COMMAND [ARGUMENTS]   (N: number of processes, got '${1:-}')" >&2; exit 2 ;;
esac
n=$1; shift
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3; [ ! -x "$here/.venv/bin/python" ] || PYTHON=$here/.venv/bin/python
fi
port=${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
if [ -z "${OMP_NUM_THREADS:-}" ]; then OMP_NUM_THREADS=$(( $(nproc) / n )); [ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1; fi

pids=()
set -m  # own process groups: a Ctrl-C comes here alone and is passed on once
for ((rank = 0; rank < n; rank++)); do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$n LOCAL_WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
        OMP_NUM_THREADS=$OMP_NUM_THREADS "$PYTHON" -m scalepeft "$@" </dev/null &
    pids+=($!)
done
set +m
pass_on() { kill -"$1" "${pids[@]}" 2>/dev/null; }
trap 'pass_on INT' INT; trap 'pass_on TERM' TERM; trap 'pass_on USR1' USR1; trap 'pass_on TERM' HUP

code=0
left=("${pids[@]}")
while [ ${#left[@]} -gt 0 ]; do
    wait -n -p ended "${left[@]}"; rc=$?
    [ -n "${ended:-}" ] || continue   # a signal interrupted the wait
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
    ended=
done
exit "$code"
