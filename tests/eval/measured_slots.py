"""Idle decode slots and tokens a second of greedy answers, whole batches and slots, as a table.

    python tests/eval/measured_slots.py SHARED [COUNTED [TIMED]]

SHARED is the folder of real data beside a checkout. The first COUNTED rows of GSM8K (2,000), with
prompts and answers as long as they are under the tokenizer of Mistral 7B v0.1; a random LLaMA
answers random tokens of that number. A slot is idle where a decode forward makes no token in it
that counts. Tokens a second are of TIMED rows (200) of a larger one, by the CPU time of one thread.
"""

import gzip
import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scalepeft.config.schema import EvaluateConfig
from scalepeft.data.tasks.base import Example
from scalepeft.eval.generation import Generator, batches
from scalepeft.eval.slots import Row
from scalepeft.models import hub

Rows = list[tuple[list[int], int]]


def gsm8k(shared: Path, count: int) -> Rows:
    """Prompts of random tokens and the number of tokens of their answers, longest prompts first."""
    tokenizer = hub.load_tokenizer(hub.ModelConfig(), shared / "tokenizer" / "mistral_v1")
    with gzip.open(shared / "gsm8k" / "train.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line, _ in zip(f, range(count), strict=False)]
    asked, answers = (
        tokenizer([row[k] for row in rows])["input_ids"] for k in ("question", "answer")
    )
    rng = random.Random(1)
    made = [
        ([rng.randrange(3, 512) for _ in a], len(b)) for a, b in zip(asked, answers, strict=True)
    ]
    return sorted(made, key=lambda row: -len(row[0]))


def model(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), max_position_embeddings=2048,
    )  # fmt: skip
    found = LlamaForCausalLM(config).eval()
    found.lm_head.weight.data[511] = 0  # the end token, never the likeliest
    return found


def answer(made: Any, rows: Rows, size: int, whole: bool) -> tuple[float, float]:
    """Share of idle slots; tokens a second."""
    settings = EvaluateConfig(batch_size=size, max_new_tokens=1024)
    generator = Generator(
        made, SimpleNamespace(eos_token_id=2), settings, torch.device("cpu"), False
    )
    generator.ends = [511]
    forwards = []
    hook = made.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape[1] == 1), with_kwargs=True
    )
    examples = [Example(f"{i:05}", "", "") for i in range(len(rows))]
    lots = batches(examples, [len(ids) for ids, _ in rows], size) if whole else [examples]
    begin = time.process_time()
    for lot in lots:
        part = [rows[int(e.id)] for e in lot]
        ids, limits = map(list, zip(*part, strict=True))
        if whole:
            generator.generate(ids, limits)
        else:
            waiting = (Row(i, *row) for i, row in enumerate(zip(ids, limits, strict=True)))
            for _ in generator.slots().run(waiting):
                pass
    seconds = time.process_time() - begin
    hook.remove()
    tokens = sum(limit for _, limit in rows)
    return 1 - (tokens - len(rows)) / (sum(forwards) * size), tokens / seconds


def main(shared: str, counted: str = "2000", timed: str = "200") -> None:
    rows, tiny = gsm8k(Path(shared), int(counted)), model(64, 1)
    some = random.Random(2).sample(range(len(rows)), len(rows) // 50)
    long = [(ids, 512 if i in some else n) for i, (ids, n) in enumerate(rows)]
    print("| rows | slots | idle, whole batches | idle, slots |\n|---|---:|---:|---:|")
    for name, given in (("GSM8K", rows), ("2 % of them 512 tokens", long)):
        for size in (16, 32, 128):
            idle = [answer(tiny, given, size, whole)[0] for whole in (True, False)]
            print(f"| {name} | {size} | {idle[0]:.1%} | {idle[1]:.1%} |", flush=True)
    few, larger = rows[:: max(1, len(rows) // int(timed))], model(256, 4)
    print("\n| round | whole batches, tokens/s | slots, tokens/s |\n|---|---:|---:|")
    for number in (1, 2):
        speed = [answer(larger, few, 16, whole)[1] for whole in (True, False)]
        print(f"| {number} | {speed[0]:.0f} | {speed[1]:.0f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
