"""What DeepSpeed's ZeRO adds to one process' step, by arithmetic: it is not simulated.

Stages 1 and 2 hold base and adapter whole, stage 3 gathers parameters as they are used and keeps
those that it will use again soon, up to ``LIVE`` of them.
"""

import math
from typing import Any

from torch import nn

from scalepeft.cluster.plan.tracker import Figures
from scalepeft.parallel.zero import BUCKET

LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
PREFETCHED = 50_000_000  # its stage3_prefetch_bucket_size


def hold(engine: Any, resident: dict[str, float], part: float) -> None:
    """Adds what stays between steps; what is on the host goes under ``KIND on the host``.

    Args:
        engine: the config's.
        resident: bytes by kind, changed in place.
        part: bytes of 1/N of what is trained.
    """
    resident["optimizer"] += part  # the copy that the optimiser changes
    if engine.stage > 1:
        resident["gradients"] = part
    offloaded = ["optimizer", "gradients"] if engine.offload_optimizer else []
    offloaded += ["base", "adapter"] if engine.offload_parameters else []
    for kind in offloaded:
        resident[f"{kind} on the host"] = resident.pop(kind, 0)


def add(figures: Figures, engine: Any, step: Any, model: nn.Module, world: int, each: int) -> None:
    """Puts ZeRO's parts in the place of the whole ones, at every moment, and its collectives."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    whole = sum(p.nbytes for p in trained)
    bucket = 4 * min(BUCKET, sum(p.numel() for p in trained))
    gathered = 0.0
    if engine.stage == 3:
        held = sum(p.nbytes for p in parameters)
        mean = held / sum(p.numel() for p in parameters)
        largest = max(p.nbytes for p in parameters)
        gathered = min(held, max(largest, LIVE * mean) + PREFETCHED * mean)
    gradients = bucket + (whole if engine.stage == 1 else step.resident.get("gradients", 0))
    for kinds in figures.moments.values():
        kinds |= {kind: step.resident.get(kind, 0) for kind in ("base", "adapter", "optimizer")}
        kinds |= {"gradients": gradients, "gathered": gathered}
    nodes = -(-world // each)
    exchanges = [("all-gather", "control", 1, whole), ("all-reduce", "last", 1, whole)]
    if engine.stage == 2:
        exchanges[1:] = [("reduce-scatter", part, 1, whole) for part in ("last", "other")]
    if engine.stage == 3:
        modules = sum(any(True for _ in m.parameters(recurse=False)) for m in model.modules())
        exchanges = [
            (name, part, count, size)
            for part in ("last", "other")
            for name, count, size in (
                ("all-gather", 2 * modules, 2 * sum(p.nbytes for p in parameters)),
                ("reduce-scatter", math.ceil(4 * whole / bucket / 4), whole),
            )
        ]
    for name, part, count, size in exchanges:
        found = figures.exchanges.setdefault(part, {})
        before = found.get((name, world, nodes), (0.0, 0.0))
        found[name, world, nodes] = before[0] + count, before[1] + size
