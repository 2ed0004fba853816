"""Which layers ``target_modules`` means: presets, and the default in families with other names."""

import re

from torch import nn

from scalepeft.adapters.base import AdapterConfig
from scalepeft.core.errors import UserError
from scalepeft.core.registry import names
from scalepeft.models import structure

PRESETS = ("all-linear", "attention", "mlp")
MLP = re.compile(r"mlp|feed_?forward|ffn|moe", re.I)
MIXER = re.compile(r"attn|attention|mixer|mamba|conv", re.I)  # of tokens: what stands in its place
OUTPUT = re.compile(r"(o|out|c)_proj|dense|proj|wo")  # behind the attention, by its last name
WHERE = "adapter.target_modules: "


def expand(model: nn.Module, config: AdapterConfig) -> list[str]:
    """``config.target_modules`` with full names in place of presets, and of a default that the
    model lacks a name of: what projects to queries, keys and values, into the feed-forward layer
    and out of it. Raises UserError: a preset without a layer, or a pattern of everything.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    routers = {name for name, layer in linear.items() if structure.is_router(name, layer)}
    plain = [name for name in linear if "experts" not in name.split(".") and name not in routers]
    read_directly = structure.layers_read_directly(model, values=True)  # Mamba's out_proj
    free = [name for name in plain if linear[name] not in read_directly]
    kinds = {name: kind for name in free if (kind := _kind(model, name))}
    patterns = config.target_modules
    if patterns == AdapterConfig(name="").target_modules and not all(
        any(names(pattern, name) for name in plain) for pattern in patterns
    ):
        return [name for name, kind in kinds.items() if _in_default(name, kind)] or patterns
    found: list[str] = []
    for pattern in patterns:
        fits = [n for n, kind in kinds.items() if pattern in ("all-linear", kind)]
        if pattern in PRESETS and not fits:
            raise UserError(
                f"{WHERE}'{pattern}' has no layer in this model; its linear layers are"
                f" {short(sorted(linear))}, and experts are taken by name alone (*.experts.*)"
            )
        if not re.search(r"\w", pattern):
            raise UserError(f"{WHERE}'{pattern}' names no layer; for those of all blocks take"
                            " all-linear")  # fmt: skip
        found += fits if pattern in PRESETS else [pattern]
    return found


def check(model: nn.Module, layers: list[str]) -> None:
    """Raise UserError for a router, a head that is the embedding, a weight read past its layer."""
    tied = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    read_directly = structure.layers_read_directly(model, values=True)
    for name in layers:
        layer, reason = model.get_submodule(name), ""
        if structure.is_router(name, layer):
            reason = "is a router of experts, which stays frozen"
        elif other := tied.get(id(layer.weight)):
            reason = f"shares its weight with {other} (tie_word_embeddings): it could not be merged"
        elif layer in read_directly:
            kind = type(model).__name__
            reason = f"has a weight that is read by a fused kernel of {kind}, past an adapter"
        if reason:
            raise UserError(f"{WHERE}{name} {reason}; take it out (all-linear does)")


def short(layers: list[str]) -> str:
    """The last names of layers, each once, in their order."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))


def _kind(model: nn.Module, name: str) -> str:
    """``attention``, ``mlp``, or ``other`` in a decoder block; empty outside."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    if number >= len(parts) - 1:
        return ""
    if not (inside := parts[number + 1 : -1]):  # in the block itself: OPT's feed-forward layers
        return "mlp" if parts[-1].startswith("fc") else "other"
    cls = type(model.get_submodule(name.rsplit(".", 1)[0])).__name__
    if any(map(MLP.search, inside)):
        return "mlp"
    if not any(map(MIXER.search, inside)):
        return "other"
    return "mlp" if re.search(r"MLP|MOE", cls) else "attention"


def _in_default(name: str, kind: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    gate = "gate" in last and "up" not in last
    return not gate and (kind == "mlp" or (kind == "attention" and not OUTPUT.fullmatch(last)))
