#!/usr/bin/env bash
# What both recipes do in the image, from the folder above this one: install.sh EXTRAS [TORCH_INDEX]
# makes /opt/venv ($VENV) with scalepeft[EXTRAS] at the versions of constraints.txt; torch is taken from TORCH_INDEX, as pip's
# -i takes it (default: PyPI's, for CUDA). Nothing is cached in the image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-/opt/venv}
if ! command -v cc > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    # triton and torch.compile compile with it
    apt-get update -qq && apt-get install -qq -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
fi
python3 -m venv "$venv"
case ${2:-default} in
default) ;;
*) "$venv/bin/python" -m pip install --no-cache-dir --constraint constraints.txt -i "$2" torch ;;
esac
"$venv/bin/python" -m pip install --no-cache-dir --constraint constraints.txt ".[$1]"
"$venv/bin/scalepeft" --version
