"""A rank of test_plan.py: real steps of several configs, bytes and collectives by torch's profiler.

Called with the settings of each config, configs apart by ``--``.
"""

import gc
import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scalepeft.build import build, start_ranks
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.data.loader import MicroBatch
from scalepeft.data.packing import padded
from scalepeft.models.hub import open_base
from scalepeft.models.weights import resident_bytes
from scalepeft.parallel.base import local_part
from scalepeft.parallel.ranks import Ranks
from scalepeft.trainer import Trainer


def measure(config: cfg.RunConfig, ranks: Ranks) -> dict[str, Any]:
    """The third step: by then the optimiser has its state."""
    built = build(config, open_base(config.model, ranks), ranks, lambda: None)
    trainer = Trainer(config, ranks, built, "")
    mine = config.train.global_batch // ranks.world_size
    rows = min(mine, config.train.micro_batch)
    ids = torch.ones(rows, padded(config.data.cutoff), dtype=torch.int64)
    batches = [MicroBatch(ids, ids.clone(), torch.zeros(rows, dtype=torch.int64))] * (mine // rows)
    built.model.train()
    for _ in range(2):
        trainer.step(batches, ids.numel(), 1e-4)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        ranks.any(False)
        trainer.step(batches, ids.numel(), 1e-4)
    live = peak = 0
    calls: Counter[str] = Counter()
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
        elif event.name().startswith("c10d::"):
            calls[event.name().removeprefix("c10d::").strip("_")] += 1
    state = [v for held in trainer.optimizer.state.values() for v in held.values()]
    held = resident_bytes(built.model) + sum(local_part(v).data.nbytes for v in state)
    trained = sum(p.numel() for p in trainer.trained.values())
    return {
        "held": held,
        "peak": held + peak,
        "calls": calls,
        "trained": trained,
        "bytes_read": built.bytes_read,
    }


if __name__ == "__main__":
    cases: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            cases.append([])
        else:
            cases[-1].append(word)
    configs = [config_files.load(None, case)[0] for case in cases]
    together = start_ranks(configs[0])
    found = [measure(config, together) for config in configs]
    if together.is_main:
        print("MEASURED", json.dumps(found), flush=True)
    together.finish()
