#!/usr/bin/env bash
# The main job, end to end, on a machine with nothing but Python: a small base in NF4 is tuned with HOFT on two fsdp2
# ranks, stopped by SIGUSR1 half-way, resumed by the same command, and scored before and after.
# launch/demo.sh [RUN_DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh demo

run=${1:-runs/demo-$(date +%Y%m%d-%H%M%S)}
[ ! -e "$run" ] || { echo "demo: $run exists; name another folder: launch/demo.sh RUN_DIR" >&2; exit 2; }
steps() { if [ -f "$run/metrics.jsonl" ]; then wc -l < "$run/metrics.jsonl"; else echo 0; fi; }

echo "demo: 1/5 train on 2 ranks (first the built-in base is made, about a minute), SIGUSR1 after 150 of 300 steps"
launch/local.sh 2 train configs/runs/demo.yaml "run_dir=$run" &
job=$!
trap 'kill -TERM $job 2>/dev/null' INT TERM
while kill -0 $job 2>/dev/null && [ "$(steps)" -lt 150 ]; do sleep 0.2; done
kill -USR1 $job 2>/dev/null || true
code=0; wait $job || code=$?
# bash answers a trapped signal with 128+n once; the job's own code comes with the next wait
[ $code -le 128 ] || { code=0; wait $job || code=$?; }
trap - INT TERM
[ $code -eq 75 ] || { echo "demo: expected exit code 75 (stopped and saved), got $code" >&2; exit 1; }

echo "demo: 2/5 the same command again: resumes at step $(steps)"
launch/local.sh 2 train configs/runs/demo.yaml "run_dir=$run"

echo "demo: 3/5 score the base, then the tuned model, on 200 questions about things the tuning never asked about"
launch/local.sh 2 evaluate "$run" --base
launch/local.sh 2 evaluate "$run"

echo "demo: 4/5 base and adapter as one checkpoint for stock transformers"
.venv/bin/python -m scalepeft merge "$run" "$run/merged" --base dequantized

echo "demo: 5/5 report"
.venv/bin/python -m scalepeft report "$run"
