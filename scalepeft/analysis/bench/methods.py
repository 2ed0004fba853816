"""Which methods a benchmark compares, at equal parameters: ours and, of HF PEFT's, their like."""

import math
from collections import Counter
from contextlib import suppress
from typing import Any

from torch import nn

from scalepeft.adapters import inject, sizing
from scalepeft.adapters.layout import common_fields
from scalepeft.analysis.bench.entries import REFERENCE, Entry, Layer
from scalepeft.core import errors, registry
from scalepeft.core.errors import UserError
from scalepeft.models import quant

STRUCTURES = ("circulant", "toeplitz", "kronecker", "ldr")  # of surm


def choose(methods: str, layers: list[Layer], rank: int, bf16: bool) -> list[Entry]:
    """Return the base, PEFT's LoRA and ``methods`` (by comma; ``all``, ``surm``, ``hut``), at the
    size of LoRA's ``rank`` if they can. Under bf16 PEFT's run under autocast, but for
    ``peft-lora-bf16``, its cheapest form. Raises UserError: an unknown method, an odd rank where
    reflections are pairs.
    """
    ours, theirs = _settings(layers, rank)
    if bf16:
        theirs[f"{REFERENCE}-bf16"] = theirs[REFERENCE]
    hut = [name for name in ours if name.startswith("hut-")]
    names = [name.strip() for name in methods.split(",")]
    groups = {"all": [*ours, *theirs], "surm": list(STRUCTURES), "hut": hut}
    chosen = {n for name in names for n in groups.get(name, [name])}
    for name in sorted(chosen - {*ours, *theirs}):
        raise errors.unknown("method (--methods)", name, [*ours, *theirs])
    if rank % 2 and {"hoft", "shoft"} & chosen:
        fix = f"take {rank + 1}, or leave them out of --methods"
        raise UserError(f"--rank {rank}: HOFT and SHOFT need it even; {fix}")
    entries = [Entry("base", "base")]
    entries += [Entry(n, "scalepeft", s) for n, s in ours.items() if n in chosen]
    for n, s in theirs.items():
        if n in chosen or n.startswith(REFERENCE):
            entries.append(Entry(n, "peft", s, autocast=bf16 and not n.endswith("bf16")))
    return entries


def _settings(layers: list[Layer], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Label -> settings for ``inject``, and label -> fields of PEFT's config, by ``to_peft``."""
    targets = list(dict.fromkeys(name for name, _, _ in layers))
    shapes = Counter((width, out) for _, width, out in layers)
    target = sum(rank * (i + o) for _, i, o in layers)
    ours: dict[str, dict[str, Any]] = {}
    for name in registry.available("adapters.methods"):
        settings: dict[str, Any] = {"name": name, "target_modules": targets}
        key = sizing.size_key(inject.adapter_config(settings))
        if name == "hadamard":
            settings["target_modules"] = ["o_proj"]
        if name == "surm":
            ours |= {s: {**settings, "structure": s} for s in STRUCTURES}
        elif name == "hut":
            ranks = {1, sizing.fit(settings, "rank", shapes, target)["rank"]}
            ours |= {f"hut-r{r}": {**settings, "rank": r} for r in sorted(ranks)}
        elif key == "rank":
            settings["rank"] = 2 * rank if name == "hra" else rank  # reflections of one side
            settings |= {"dropout": 0.0} if name in ("lora", "dora") else {}
        elif key == "block_size":
            with suppress(UserError):  # its entry says why none fits
                settings = sizing.fit(settings, key, shapes, target)
        if name not in ("surm", "hut"):
            ours[name] = settings

    def stored(b: int) -> int:  # PEFT's BOFT has whole blocks, of which the skew part counts
        return sum(number * (width * b + out) for (width, out), number in shapes.items())

    common = math.gcd(*(width for width, _ in shapes))
    blocks = [b for b in range(2, common // 2 + 1, 2) if common % (2 * b) == 0] or [2]
    block = min(blocks, key=lambda b: abs(stored(b) - target))
    # More factors than one need PEFT's CUDA extension, and cost more.
    twins = {**ours, "boft": {**ours["boft"], "factors": 1, "block_size": block}}
    return ours, {f"peft-{n}": f for n, s in twins.items() if (f := _twin(s, layers))}


def _twin(settings: dict[str, Any], layers: list[Layer]) -> dict[str, Any] | None:
    """Return the config of PEFT's form of one of our methods; None where there is none."""
    net = nn.ModuleDict({name: nn.Linear(width, out, device="meta") for name, width, out in layers})
    with suppress(UserError):
        return peft_fields(inject.inject(net, settings))
    return None


def peft_fields(model: nn.Module) -> dict[str, Any] | None:
    """Return the config of PEFT's form of the method that is on a model; None without one."""
    found = {n: m.adapter.to_peft(quant.Frozen(m)) for n, m in inject.adapted_layers(model)}
    fields = {name: twin[0] for name, twin in found.items() if twin is not None}
    return common_fields(model, fields) if fields and len(fields) == len(found) else None
