#!/usr/bin/env bash
# Set-up, linter, type checker, tests.
#   launch/test.sh                  what every change must pass
#   launch/test.sh -m "not slow"    the fast part; other pytest arguments too (-n 0: one process)
#   launch/test.sh --full           whole products of methods, storages, shapes and engines, more kills
# HF PEFT's own tests run on our methods: those of the installed version are fetched once into .venv.
# The Slurm tests start a cluster of their own: Slurm is installed here where this is root and apt is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh test

export PATH=$PATH:/usr/sbin:/sbin
lacking() { for program in slurmctld slurmd srun munged shellcheck; do command -v $program > /dev/null || echo -n "$program "; done; }
if [ -n "$(lacking)" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "test: installing Slurm and shellcheck for the tests"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends \
        slurmctld slurmd slurm-client munge shellcheck util-linux procps; } > .venv/slurm-packages.log 2>&1 ||
        tail -n 5 .venv/slurm-packages.log >&2
fi
peft=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("peft"))')
pefts_tests=${SCALEPEFT_PEFT_TESTS:-.venv/peft-tests-$peft}
if [ ! -d "$pefts_tests" ]; then
    fetched=$(mktemp -d .venv/peft-tests.XXXXXX)
    .venv/bin/python -m pip download -qq --no-deps --no-binary peft --dest "$fetched" "peft==$peft" 2>&1 | tail -n 3 >&2 || true
    if tar -xzf "$fetched/peft-$peft.tar.gz" -C "$fetched" --strip-components=1 "peft-$peft/tests" 2> /dev/null; then
        mv "$fetched/tests" "$pefts_tests"
    fi
    rm -rf "$fetched"
fi
skipped=$(lacking)
[ -d "$pefts_tests" ] || skipped+="tests of peft $peft "
warn() { [ -z "$skipped" ] || echo "test: WARNING: no $skipped here, and they could not be fetched (Slurm: needs root and apt; PEFT's tests: its source distribution): the tests that need them ARE SKIPPED" >&2; }
warn
[ -z "$skipped" ] || [ -z "${CI:-}" ] || { echo "test: with CI set that is a failure" >&2; exit 1; }

workers=${SCALEPEFT_TEST_WORKERS:-$(($(nproc) * 2))}  # before nproc, too, takes OMP_NUM_THREADS for all there is
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
code=0
# Each worker begins with neighbours, the longest first (tests/conftest.py), and takes some of another's when it is done. Tests
# of Slurm and of several ranks wait more than they compute: two workers a core.
.venv/bin/python -m pytest -rsf -n "$workers" --dist worksteal "$@" || code=$?
warn
exit $code
