"""Which methods a benchmark compares, at equal parameters: settings of ours and of HF PEFT's."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from scalepeft.adapters.base import Adapter
from scalepeft.core import errors, registry
from scalepeft.core.errors import UserError

Layer = tuple[str, int, int]
"""(last part of the name, in, out) of a linear layer."""

STRUCTURES = ("circulant", "toeplitz", "kronecker", "ldr")  # of surm
NEIGHBOURS = {
    "hoft": ("hra",),
    "shoft": ("hra",),
    "goft": ("boft", "oft"),
    "qgoft": ("boft", "oft"),
    "circulant": ("c3a",),
    "hut-r1": ("ia3", "hira"),
    "hadamard": ("ia3",),
}


def choose(
    methods: str, layers: list[Layer], rank: int, what: str, bf16: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(ours, PEFT's) by label with their settings; of PEFT's its LoRA and the neighbours of ours.

    Raises:
        UserError: an unknown method, or an odd rank where reflections come in pairs.
    """
    ours, theirs = _our_settings(layers, rank, what), _peft_settings(layers, rank, bf16)
    chosen = {name.strip() for name in methods.split(",") if name.strip()}
    if methods == "all":
        chosen = {*ours, *theirs}
    for group, members in (("surm", set(STRUCTURES)), ("hut", {n for n in ours if "hut-" in n})):
        if group in chosen:
            chosen = chosen - {group} | members
    if not chosen:
        raise UserError(f"--methods '{methods}': names none; there are {', '.join(sorted(ours))}")
    for name in sorted(chosen - {*ours, *theirs}):
        raise errors.unknown("method (--methods)", name, [*ours, *theirs])
    if rank % 2 and {"hoft", "shoft"} & chosen:
        raise UserError(
            f"--rank {rank}: HOFT and SHOFT pair their reflections, so it must be even; take"
            f" {rank + 1}, or leave them out of --methods"
        )
    near = {n for name in chosen for n in neighbours(name)}
    ours = {name: settings for name, settings in ours.items() if name in chosen}
    theirs = {
        name: settings
        for name, settings in theirs.items()
        if name in chosen | near or name.startswith("peft-lora")
    }
    return ours, theirs


def neighbours(name: str) -> list[str]:
    """PEFT's methods that one of ours is held against."""
    if name.startswith("peft-"):
        return []
    default = "hira" if name.startswith("hut-") else name
    near = NEIGHBOURS.get(name, (default,))
    return [f"peft-{n}" for n in near if n in PEFT]


def names_of(layers: list[Layer]) -> list[str]:
    """Each name once."""
    return list(dict.fromkeys(name for name, _, _ in layers))


def _block_size(layers: list[Layer], rank: int, count: Callable[[int, int, int], float]) -> int:
    """The even block b that makes ``count(b, in, out)`` over all layers nearest to LoRA's.

    It divides every width; where it can be, so does 2 b (BOFT's second factor).
    """
    target = sum(rank * (width + out) for _, width, out in layers)
    common = math.gcd(*(width for _, width, _ in layers))
    fits = [b for b in range(2, common // 2 + 1, 2) if common % (2 * b) == 0]
    return min(
        fits, key=lambda b: abs(sum(count(b, i, o) for _, i, o in layers) - target), default=2
    )


def _our_settings(layers: list[Layer], rank: int, what: str) -> dict[str, dict[str, Any]]:
    """label -> settings for ``inject``; new methods come in by their file."""
    names = names_of(layers)
    found: dict[str, dict[str, Any]] = {}
    for name in registry.available("adapters.methods"):
        fields = {
            f.name
            for f in dataclasses.fields(
                registry.find_class("adapters.methods", name, "adapter", Adapter).Config
            )
        }
        settings: dict[str, Any] = {"name": name, "target_modules": names}
        if "rank" in fields:
            settings["rank"] = 2 * rank if name == "hra" else rank  # reflections of one side
        if "block_size" in fields:
            count = _boft_count if name == "boft" else _oft_count
            settings["block_size"] = _block_size(layers, rank, count)
        if name == "hadamard":
            settings |= {"train_norm": False} if what == "layer" else {"target_modules": ["o_proj"]}
        found[name] = settings
    if surm := found.pop("surm", None):
        found |= {s: {**surm, "structure": s} for s in STRUCTURES}
    if hut := found.pop("hut", None):
        common = math.gcd(*(size for _, *sizes in layers for size in sizes))
        largest = max(r for r in range(1, rank + 1) if common % r == 0)
        found |= {f"hut-r{r}": {**hut, "rank": r} for r in sorted({1, largest})}
    return found


def _oft_count(b: int, width: int, out: int) -> float:
    return width * (b - 1) / 2


def _boft_count(b: int, width: int, out: int) -> float:
    return width * (b - 1) + out  # two factors


def _peft_boft_count(b: int, width: int, out: int) -> float:
    return width * b + out  # PEFT stores whole blocks, of which the skew part counts


# Of PEFT's BOFT the form with one factor: more need its CUDA extension, and cost more.
PEFT = ("lora", "lora-bf16", "dora", "oft", "oftv2", "boft", "hra", "ia3", "hira", "c3a")


def _peft_settings(layers: list[Layer], r: int, bf16: bool) -> dict[str, dict[str, Any]]:
    """label -> name of PEFT's config class and its fields."""
    oft = {"config": "OFTConfig", "r": 0, "oft_block_size": _block_size(layers, r, _oft_count)}
    lora = {"config": "LoraConfig", "r": r, "lora_alpha": 2 * r}
    blocks = {name: math.gcd(width, out) for name, width, out in layers}
    block = _block_size(layers, r, _peft_boft_count)
    boft = {"boft_block_size": block, "boft_n_butterfly_factor": 1}
    feedforward = [name for name in names_of(layers) if name == "down_proj"]
    found: dict[str, dict[str, Any]] = {
        "lora": lora,
        "lora-bf16": lora,
        "dora": {**lora, "use_dora": True},
        "oft": {**oft, "use_cayley_neumann": False},
        "oftv2": {**oft, "use_cayley_neumann": True},
        "boft": {"config": "BOFTConfig", **boft},
        "hra": {"config": "HRAConfig", "r": 2 * r},
        "ia3": {"config": "IA3Config", "feedforward_modules": feedforward},
        "hira": {"config": "HiraConfig", "r": r},
        "c3a": {"config": "C3AConfig", "block_size_pattern": blocks, "init_weights": True},
    }
    return {f"peft-{name}": found[name] for name in PEFT if bf16 or name != "lora-bf16"}
