"""HOFT and SHOFT as their YAML files have them learn as LoRA does, at equal size."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

import scalepeft
from scalepeft.adapters.inject import trainable
from scalepeft.config.files import named_file

TASKS = ("ARC-Easy", "ARC-Challenge", "openbookqa")
STEPS, WARMUP, ROWS, HELD_OUT = 60, 6, 8, 96


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[torch.Tensor]:
    """Tokens of the training sets in an order of their own, 144 of a row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models/stories260K/hf")
    found = []
    for task in TASKS:
        with gzip.open(shared_data / f"llm_adapters/dataset/{task}/train.json.gz") as file:
            found += [f"{row['instruction']}\n{row['output']}" for row in json.load(file)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    texts = [found[i] for i in order[: HELD_OUT + STEPS * ROWS]]
    return [torch.tensor(ids[:144]) for ids in tokenizer(texts)["input_ids"]]


def loss(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    logits = model(input_ids=ids, attention_mask=(labels >= 0).long()).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def held_out(base: Path, rows: list[torch.Tensor], name: str, lr: float) -> float:
    """Loss of 96 rows after 60 steps of AdamW at one rate for all parameters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = {**named_file("adapter", name)["adapter"], "rank": 4}
    adapter |= {"alpha": 8, "dropout": 0.0} if name == "lora" else {}
    trained = list(trainable(scalepeft.inject(model, adapter)).values())
    assert sum(p.numel() for p in trained) == (17_660 if name == "shoft" else 15_840)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    for step in range(STEPS):
        at = HELD_OUT + step * ROWS
        loss(model, rows[at : at + ROWS]).backward()
        clip_grad_norm_(trained, 1.0)
        decay = (STEPS - step) / (STEPS - WARMUP)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / WARMUP, decay)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return loss(model, rows[:HELD_OUT]).item()


@pytest.mark.slow
def test_rotations_learn_as_lora_does(shared_data: Path, rows: list[torch.Tensor]) -> None:
    """Each at its best of .01, .015 and .02: measured 0.03 ahead; pairs are 0.08 behind."""
    base = shared_data / "models/stories260K/hf"
    lora = held_out(base, rows, "lora", 0.015)
    assert held_out(base, rows, "hoft", 0.01) < lora + 0.03
    assert held_out(base, rows, "shoft", 0.01) < lora + 0.02
