#!/usr/bin/env bash
# Adds llama.cpp to .venv-vllm: its Python package, compiled here (a C++ compiler, half an hour on two cores), and the source it
# comes with, of which convert_hf_to_gguf.py makes GGUF files of checkpoints. For docs/integrations/llama-cpp.md and its test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/vllm.sh

version=0.3.36
[ ! -f .venv-vllm/llama.cpp/convert_hf_to_gguf.py ] || exit 0
python=.venv-vllm/bin/python
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
echo "llama-cpp: compiling llama-cpp-python $version"
$python -m pip download -qq --no-deps --no-binary llama-cpp-python --dest "$parts" "llama-cpp-python==$version"
tar -xzf "$parts"/*.tar.gz -C "$parts"
source=$parts/llama_cpp_python-$version
$python -m pip install -qq --constraint .venv-vllm/constraints.txt "$source"
mv "$source/vendor/llama.cpp" .venv-vllm/llama.cpp
echo "llama-cpp: llama-cpp-python $version in .venv-vllm, its source in .venv-vllm/llama.cpp"
