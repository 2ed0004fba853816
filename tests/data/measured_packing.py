"""Tokens a second of packed and of padded rows, and how long ranks would wait, as a table.

    python tests/data/measured_packing.py SHARED FOLDER [STEPS]

SHARED is the folder of real data beside a checkout, FOLDER gets a random LLaMA. Both ways take the
same rows in the same steps, in turns, in one process with one thread; tokens are counted without
padding, seconds are of the processor, figures are medians over steps. Rank time lost is by token
counts with padding, where 8 ranks with 64 rows a step move from micro-batch to micro-batch
together.
"""

import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scalepeft.adapters import inject as injection
from scalepeft.build import build, task_of
from scalepeft.config.files import load
from scalepeft.data import loader, token_file, tokens
from scalepeft.models.hub import open_base
from scalepeft.parallel.ranks import Ranks
from scalepeft.trainer import Trainer, batches

SETS = {
    "ARC-Easy": ["data=commonsense", "data.train=llm_adapters/dataset/ARC-Easy/test.json.gz"],
    "GSM8K": ["data=math", "data.train=gsm8k/train.jsonl.gz"],
    "WMT de-en": [
        "data=translation", "data.source_language=de", "data.target_language=en",
        "data.train=alma_wmt/human_written_data/deen/valid.de-en.json.gz",
    ],
}  # fmt: skip


def lost(rows: tokens.TokenSet, packed: bool, width: float) -> float:
    """Share of the time of 8 ranks that is padding or waiting for the longest micro-batch."""
    parts = []
    for rank in range(8):
        options: dict[str, Any] = {"micro_tokens": 2048, "width": width} if packed else {}
        made = loader.Loader(
            rows, Ranks(rank, 8, rank), 0, 8, global_batch=64, micro_batch=4, **options
        )
        parts.append([[m.input_ids.numel() for m in step.micro] for step in made])
    real = sum(step.tokens for step in made)
    taken = sum(sum(map(max, zip(*step, strict=True))) for step in zip(*parts, strict=True))
    return 1 - real / 8 / taken


def waited(rows: tokens.TokenSet) -> float:
    """Share of the time of 8 ranks that packed lines wait for each other, padding as work."""
    parts = []
    for rank in range(8):
        made = loader.Loader(
            rows, Ranks(rank, 8, rank), 0, 8, global_batch=64, micro_batch=4, micro_tokens=2048
        )
        parts.append([[m.input_ids.numel() for m in step.micro] for step in made])
    taken = sum(sum(map(max, zip(*step, strict=True))) for step in zip(*parts, strict=True))
    return 1 - sum(sum(map(sum, part)) for part in parts) / 8 / taken


def main(shared: Path, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer/mistral_v1")
    if not folder.is_dir():
        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer))).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
    print(
        "| rows | padded tokens/s | packed | ratio | of tokens | lost, padded |"
        " masked, 512 | 4096 | one line | waiting |"
    )
    print("|---|" + "---:|" * 9)
    for name, settings in SETS.items():
        settings = [s.replace("data.train=", f"data.train={shared}/") for s in settings]
        config, _ = load(None, [
            *settings, f"model.path={folder}", "run_dir=unused", "adapter=lora", "engine=single",
            "train.precision=fp32", "train.max_steps=1", "train.warmup_steps=0", "train.lr=1e-4",
            "train.global_batch=16", "train.micro_batch=16", "data.cutoff=512", "data.valid=[]",
            "data.duplicates=keep", "data.valid_size=0",
        ])  # fmt: skip
        ranks = Ranks()
        base = open_base(config.model, ranks)
        files = token_file.files(task_of(config), base.tokenizer, base.vocab_size, [])
        rows, _, _ = token_file.prepared(files, config.data, 0)
        trainer = Trainer(config, ranks, build(config, base, ranks, lambda: None), "")
        injection.train_mode(trainer.built.model)
        measured: list[tuple[int, dict[bool, float]]] = []
        sizes: list[float] = []
        for first in range(steps + 1):
            seconds = dict[bool, float]()
            for packed in (False, True) if first % 2 else (True, False):
                trainer.packed = packed
                (step,) = batches(trainer, rows, first, 1)
                clock = time.process_time()
                trainer.step(step.micro, step.label_tokens, 0.0)
                seconds[packed] = time.process_time() - clock
                if not packed:
                    sizes.append(sum(m.input_ids.numel() for m in step.micro) / step.tokens)
            measured.append((step.tokens, seconds))
        del measured[0]  # which warms up
        padded, best = (median(n / s[way] for n, s in measured) for way in (False, True))
        ratio = median(s[False] / s[True] for _, s in measured)  # of the same rows
        shares = [
            lost(rows, False, 0),
            *(lost(rows, True, 6 * hidden) for hidden in (512, 4096, math.inf)),
        ]
        print(
            f"| {name} | {padded:.0f} | {best:.0f} | {ratio:.2f} | {median(sizes[1:]):.2f} |"
            f" {' | '.join(f'{share:.1%}' for share in shares)} | {waited(rows):.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int((*sys.argv, 8)[3]))
