"""vLLM itself, on the CPU, answers as transformers does: every method that merges, and HOFT as LoRA.

It lies in an environment of its own (launch/vllm.sh), in which scripts and commands are started.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import stock
from processes import ROOT, call, rows

from scalepeft.export import merge
from scalepeft.export import peft as export
from scalepeft.models import tiny

PYTHON = ROOT / ".venv-vllm/bin/python"


pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm here: launch/vllm.sh makes it"),
]


NO_MERGE = {"surm_adapter"}  # not affine
SHIFTED = {"hut": ["adapter.shift=true"]}


METHODS = sorted({file.stem for file in (ROOT / "configs/adapters").glob("*.yaml")} - NO_MERGE)


PROMPTS = [[0, 5, 6, 7], [0, 300, 20], [0, 67, 68, 69, 70, 400, 401]]


def in_vllm(*arguments: str, timeout: float = 900, **env: str) -> str:
    """What a command of .venv-vllm prints; it must end well, and nothing may complain."""
    variables = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **env,
    }  # fmt: skip
    done = subprocess.run(
        [str(PYTHON), *arguments], env=variables, capture_output=True, text=True, timeout=timeout,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "Traceback" not in printed, printed
    return printed


def random_model(folder: Path, architecture: str = "Llama", tokenizer: Path | None = None) -> Path:
    """Two layers with heads of 64, of which vLLM takes no fewer than 32, and tiny's tokenizer."""
    import transformers

    shutil.copytree(tokenizer or tiny.make(0), folder)
    kind = getattr(transformers, f"{architecture}Config")
    config = kind(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=32000 if tokenizer else 768,
        max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.save_pretrained(folder)
    return folder


def trained(folder: Path, model: Path, method: str, *settings: str) -> Path:
    done = call(
        "train", f"model.path={model}", "data=toy", f"adapter={method}", "adapter.rank=4",
        "data.train_size=60", "data.valid_size=4", "data.test_size=12", "train.precision=fp32",
        "train.epochs=null", "train.max_steps=8", "train.warmup_steps=0", "train.lr=1e-2",
        "train.global_batch=8", "train.micro_batch=4", f"run_dir={folder}", *settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@torch.no_grad()
def tokens(model: Any) -> list[list[int]]:
    """16 greedy tokens of each prompt by transformers."""
    found = []
    for ids in PROMPTS:
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
            max_new_tokens=16, min_new_tokens=16, pad_token_id=0,
        )  # fmt: skip
        found.append(out[0, len(ids) :].tolist())
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("vllm") / "base")
