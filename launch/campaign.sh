#!/usr/bin/env bash
# Disturbs real runs at random and counts what became of them: a row of docs/reliability.md.
#   launch/campaign.sh kills|damage|slurm|disks|launches [--minutes 20] [--seed 0] [--dry-run]
# slurm needs Slurm and root (launch/test.sh installs it), disks root. Exit code 1: something was not survived.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
paths=$PWD
for folder in support run cluster campaigns; do paths+=:$PWD/tests/$folder; done
PYTHONPATH=$paths:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 exec "${PYTHON:-.venv/bin/python}" tests/campaigns "$@"
