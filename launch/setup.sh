#!/usr/bin/env bash
# Makes .venv with scalepeft and what its tests need, and nothing else. Run again after a change of
# pyproject.toml or constraints.txt; otherwise it returns at once. PYTHON=python3.12 picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.scalepeft-setup
want=$(cat pyproject.toml constraints.txt launch/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "setup: $("$python" --version 2>&1) found; scalepeft is tested on Python 3.11 and 3.12." \
         "Set PYTHON=python3.12 and run again." >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "setup: installing into .venv (about a minute, 2.7 GB)"
.venv/bin/python -m pip install -qq --constraint constraints.txt --editable '.[quant,deepspeed,track,eval,lm-eval,dev]'
echo "$want" > "$stamp"
.venv/bin/python - <<'PY'
import importlib.metadata as m
print("setup:", ", ".join(f"{n} {m.version(n)}" for n in ("torch", "transformers", "bitsandbytes", "scalepeft")))
PY
