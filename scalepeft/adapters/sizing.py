"""Methods at equal size: the rank or block size at which one trains so many parameters."""

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from scalepeft.adapters import inject
from scalepeft.adapters.base import AdapterConfig, on_meta
from scalepeft.core.errors import UserError

SHARED = tuple(f.name for f in dataclasses.fields(AdapterConfig) if f.name != "name")
"""Settings that every method has: which layers it adapts."""

Shapes = Mapping[tuple[int, int], int]
"""(in, out) of a linear layer -> how many such layers are adapted."""


def size_key(config: AdapterConfig) -> str | None:
    """Return the setting that makes a method larger or smaller, None if its size is fixed."""
    names = {f.name for f in dataclasses.fields(config)}
    if "structure" in names:  # of surm: balanced factors and circulants have one size
        return "ldr_rank" if getattr(config, "structure", None) == "ldr" else None
    return next((key for key in ("rank", "block_size") if key in names), None)


def resize(adapter: dict[str, Any], key: str, size: int) -> dict[str, Any]:
    """Return the settings at another size; the factor on LoRA's update stays as configured."""
    full = dataclasses.asdict(inject.adapter_config(adapter))
    resized = {**full, key: size}
    if key == "rank" and "alpha" in full:
        ratio = size / full["rank"]
        resized["alpha"] = full["alpha"] * (math.sqrt(ratio) if full.get("rslora") else ratio)
    return resized


def count_parameters(model: nn.Module, adapter: dict[str, Any]) -> int:
    """Count what a method would train on a model, which stays as it is; UserError: no fit."""
    net = inject.inject(copy.deepcopy(model), adapter)
    return sum(p.numel() for p in inject.trainable(net).values())


def adapted_shapes(model: nn.Module, adapter: dict[str, Any]) -> Counter[tuple[int, int]]:
    """Count the layers that settings adapt, by (in, out). Raise UserError for no match."""
    where = {key: adapter[key] for key in SHARED if key in adapter}
    net = inject.inject(copy.deepcopy(model), {"name": "lora", "rank": 1, "dropout": 0.0, **where})
    found: Counter[tuple[int, int]] = Counter()
    for _, m in inject.adapted_layers(net):
        found[m.in_features, m.out_features] += getattr(m, "num_experts", 1)
    return found


def fit(adapter: dict[str, Any], key: str, shapes: Shapes, target: int) -> dict[str, Any]:
    """The settings with that ``key`` (of ``size_key``) which trains nearest to ``target``
    parameters, the smaller of two. Raises UserError: the method's own, where no value fits.
    """
    distances: dict[int, int] = {}
    refusals: list[UserError] = []
    for size in range(1, 2 * max(map(max, shapes)) + 1):
        try:
            config = inject.adapter_config(resize(adapter, key, size))
            layers = {shape: on_meta(config, *shape).parameters() for shape in shapes}
        except UserError as error:
            refusals.append(error)
            continue
        count = sum(shapes[s] * p.numel() for s in shapes for p in layers[s] if p.requires_grad)
        distances[size] = abs(count - target)
        if count > 2 * target:  # it only grows from here
            break
    if not distances:
        raise refusals[0]
    return resize(adapter, key, min(distances, key=distances.__getitem__))
