#!/usr/bin/env bash
# Makes .venv with scalepeft and what a command needs, and nothing else: launch/setup.sh [demo|test]
#   demo   what launch/demo.sh needs: torch, transformers, bitsandbytes
#   test   what launch/test.sh needs, DeepSpeed and lm-eval among it (the default; has all of demo)
# Run again after a change of pyproject.toml or constraints.txt; otherwise it returns at once. PYTHON=python3.12 picks the
# interpreter; SCALEPEFT_TORCH=cpu|cu126|rocm6.4 SCALEPEFT_TORCH_INDEX=URL this build of torch from this index (as pip's
# -i; default: what pip finds, from PyPI for CUDA).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
die() { echo "setup: $*" >&2; exit 2; }

what=${1:-test} build=${SCALEPEFT_TORCH:-} index=${SCALEPEFT_TORCH_INDEX:-} log=.venv/setup.log
case $what in  # sizes with torch for a CPU and for CUDA
demo) have=(demo test) extras=quant size="1.7 or 5.5 GB, 2 to 10 minutes" ;;
test) have=(test) extras=quant,deepspeed,track,eval,lm-eval,dev size="3.2 or 6.3 GB, 4 to 12 minutes" ;;
*) die "$what: expected demo or test" ;;
esac
[[ $build =~ ^(cpu|cu[0-9]{3}|rocm[0-9]+(\.[0-9]+)+)?$ ]] || die "SCALEPEFT_TORCH=$build: expected cpu, or cu126, rocm6.4 and the like"
[ "${build:+set}" = "${index:+set}" ] || die "SCALEPEFT_TORCH=$build SCALEPEFT_TORCH_INDEX=$index: set both, the build and the index that has it, or none"
check_build() {  # that torch, where there is one, is what was asked for
    local found
    [ -n "$build" ] && found=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) || return 0
    [ "${found#*+}" = "$build" ] || die "torch $found is in .venv, not of $build${1:-}: remove .venv and run again"
}
check_build
want=$(cat pyproject.toml constraints.txt launch/setup.sh | sha256sum | cut -d' ' -f1)
for kind in "${have[@]}"; do
    if [ -x .venv/bin/python ] && [ "$(cat ".venv/.scalepeft-$kind" 2>/dev/null)" = "$want" ]; then exit 0; fi
done

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
    die "$("$python" --version 2>&1) found; scalepeft is tested on Python 3.11 and 3.12. Set PYTHON=python3.12 and run again."
.venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv .venv  # one that broke off has no pip
show() {  # of what pip says, a line every ten seconds
    local line='' last='' said=0
    while :; do
        if read -r -t 10 line; then case $line in Downloading* | Collecting* | Installing*) last=$line ;; esac
        elif [ $? -le 128 ]; then return 0; fi
        if ((SECONDS - said >= 10)); then said=$SECONDS; echo "setup: $said s, $(du -sm .venv | cut -f1) MB: ${last:0:80}"; fi
    done
}
install() {
    .venv/bin/python -m pip install --constraint constraints.txt "$@" 2>&1 | tee "$log" | show || { tail -n 12 "$log" >&2; die "pip failed: see above, or all of it in $log"; }
}
echo "setup: installing into .venv what $what needs ($size)"
[ -z "$build" ] || { install -i "$index" torch; check_build ", which $index gave"; }
install --editable ".[$extras]"
echo "$want" > ".venv/.scalepeft-$what"
.venv/bin/python -c 'import importlib.metadata as m
print("setup:", *(f"{n} {m.version(n)}" for n in ("torch", "transformers", "bitsandbytes", "scalepeft")))'
