#!/usr/bin/env bash
# Set-up, linter, type checker, tests. launch/test.sh -m "not slow" runs the fast part; other pytest arguments too.
# The Slurm tests start a cluster of their own: Slurm is installed here where this is root and apt is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

export PATH=$PATH:/usr/sbin:/sbin
lacking() { for program in slurmctld slurmd srun munged shellcheck; do command -v $program > /dev/null || echo -n "$program "; done; }
if [ -n "$(lacking)" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "test: installing Slurm and shellcheck for the tests"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends \
        slurmctld slurmd slurm-client munge shellcheck util-linux procps; } > .venv/slurm-packages.log 2>&1 ||
        tail -n 5 .venv/slurm-packages.log >&2
fi
skipped=$(lacking)
warn() { [ -z "$skipped" ] || echo "test: WARNING: no $skipped here and no root with apt: the tests that need them ARE SKIPPED" >&2; }
warn
[ -z "$skipped" ] || [ -z "${CI:-}" ] || { echo "test: with CI set that is a failure" >&2; exit 1; }

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
code=0
if [ $# -gt 0 ]; then
    .venv/bin/python -m pytest -rs "$@" || code=$?
else
    # Two halves of about the same time, one beside the other: the fast part and these, mostly of one process at a time;
    # and the others, which begin with the Slurm tests: those wait a lot.
    second_half=(tests/{analysis/test_compare,adapters/test_conformance,test_pipeline,cluster/test_plan,test_readme,run/test_resume}.py)
    fast_log=$(mktemp)
    {
        beside=0
        .venv/bin/python -m pytest -rs -m "not slow" || beside=$?
        .venv/bin/python -m pytest -rs -m slow "${second_half[@]}" || beside=$?
        exit $beside
    } > "$fast_log" 2>&1 &
    fast=$!
    trap 'kill $fast 2>/dev/null || true; rm -f "$fast_log"' EXIT  # it has ended on the good path: kill fails then
    mapfile -t others < <(printf '%s\n' tests/test_*.py tests/*/test_*.py | grep -v -x -F -e tests/cluster/test_slurm.py -f <(printf '%s\n' "${second_half[@]}"))
    .venv/bin/python -m pytest -rs -m slow tests/cluster/test_slurm.py "${others[@]}" || code=$?
    fast_code=0
    wait $fast || fast_code=$?
    echo "test: beside them, the fast part (-m \"not slow\") and ${second_half[*]}:"
    cat "$fast_log"
    [ $code -ne 0 ] || code=$fast_code
fi
warn
exit $code
