#!/usr/bin/env bash
# All methods against each other on tiny bases, on a CPU: makes the bases and rows of launch/league.yaml, runs its
# comparisons and writes docs/league.md with its pictures. The same command goes on with what is left.
#   launch/league.sh DATA OUT [--list launch/league.yaml] [--jobs 2] [--docs docs]
# DATA: a folder with models/stories260K, llm_adapters, alma_wmt and gsm8k as the list names their files.
# Exit code 75: stopped by SIGTERM or Ctrl-C; 1: a comparison broke (its log is named).
set -euo pipefail
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 exec "${PYTHON:-$root/.venv/bin/python}" "$root/launch/league.py" "$@"
