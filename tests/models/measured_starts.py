"""Bytes and CPU seconds of a first start and of a restart from the quantized copy, as a table.

    python tests/models/measured_starts.py FOLDER [RANKS]

Makes a random LLaMA of 1 GB in bf16 in FOLDER, and loads it twice as ``scalepeft train`` does, each
time in new processes, with caches of its own. docs/benchmarks/2026-11-29-quantized-copy.md has what
came out.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10,
         "num_attention_heads": 16, "num_key_value_heads": 16}  # fmt: skip


def make(folder: Path) -> None:
    """The base: random weights, the tokenizer of the built-in model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from scalepeft.models import tiny

    tokenizer = AutoTokenizer.from_pretrained(tiny.make(0))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300MB")
    tokenizer.save_pretrained(folder)


def read_characters() -> int:
    """Bytes that this process has read by system calls, from whatever file."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].split()[1])


def start(base: Path, cache: Path) -> None:
    """One start: what ``scalepeft train`` does up to the first step; prints its cost."""
    from scalepeft.build import build, start_ranks
    from scalepeft.config import schema as cfg
    from scalepeft.models.hub import open_base

    several = os.environ["WORLD_SIZE"] != "1"
    config = cfg.from_dict({
        "run_dir": "unused",
        "model": {"path": str(base), "quant": "nf4", "quantized_cache": str(cache)},
        "engine": {"name": "fsdp2" if several else "single", "device": "cpu"},
        "adapter": {"name": "lora", "rank": 4, "dropout": 0.0},
        "train": {"max_steps": 1, "precision": "bf16"},
    })  # fmt: skip
    ranks = start_ranks(config)
    wall, cpu, before = time.monotonic(), time.process_time(), read_characters()
    opened = open_base(config.model, ranks)
    built = build(config, opened, ranks, lambda: None)
    cost = {"loaded": built.bytes_read, "read": read_characters() - before,
            "cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}  # fmt: skip
    everyone = ranks.gather(cost)
    if ranks.is_main:
        print(json.dumps({key: sum(c[key] for c in everyone) for key in cost}))
    del built
    ranks.finish()


def measure(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Costs of the first start, and of the second."""
    base, results = folder / "base", []
    if not base.is_dir():
        make(base)
    for _ in range(2):
        env = os.environ | {"SCALEPEFT_CACHE": str(folder / f"cache-{ranks}")}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641", "WORLD_SIZE": str(ranks)}
        command = [sys.executable, __file__, "--start", str(base), str(folder / f"copies-{ranks}")]
        processes = [
            subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                             stdout=subprocess.PIPE, text=True)
            for r in range(ranks)
        ]  # fmt: skip
        printed = [p.communicate()[0] for p in processes]
        assert not any(p.returncode for p in processes)
        results.append(json.loads(printed[0].splitlines()[-1]))
    return results


if __name__ == "__main__":
    if sys.argv[1] == "--start":
        start(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        first, second = measure(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
        for key in first:
            ratio = second[key] / first[key]
            print(
                f"{key:8} first {first[key]:16,.2f} second {second[key]:16,.2f} ratio {ratio:.3f}"
            )
