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


def expand(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return ``config.target_modules`` with full names in the place of presets; and in the place of
    the default, unless the model has a layer for each of its names: what projects to queries, keys
    and values, into the feed-forward layer and out of it.

    Raises:
        UserError: a preset that this model has no layer for, or a pattern of everything.
    """
    patterns = config.target_modules
    read_directly = structure.layers_read_directly(model, values=True)  # Mamba's out_proj
    kinds = {
        name: kind
        for name in _linear(model)
        if (kind := _kind(model, name)) and model.get_submodule(name) not in read_directly
    }
    if patterns == AdapterConfig(name="").target_modules:
        outside = [name for name in _linear(model) if not _frozen_part(model, name)]
        if not all(any(names(p, name) for name in outside) for p in patterns):
            return [name for name in kinds if _is_default(name, kinds[name])] or patterns
    found: list[str] = []
    for pattern in patterns:
        if not re.search(r"\w", pattern):
            raise UserError(
                f"adapter.target_modules: '{pattern}' names no layer; for every linear layer of the"
                " decoder blocks take all-linear"
            )
        if pattern not in PRESETS:
            found.append(pattern)
            continue
        fits = [n for n, kind in kinds.items() if pattern in ("all-linear", kind)]
        if not fits:
            raise UserError(
                f"adapter.target_modules: '{pattern}' has no layer in this model; its linear layers"
                f" are {', '.join(sorted({n.rsplit('.', 1)[-1] for n in _linear(model)}))}, and"
                " experts are taken by name alone (*.experts.*)"
            )
        found += fits
    return found


def check(model: nn.Module, layers: list[str]) -> None:
    """Raise UserError for a target that stays as it is: a router, a head that is the embedding."""
    for name in layers:
        weight = getattr(model.get_submodule(name), "weight", None)
        if _is_router(model, name):
            raise UserError(
                f"adapter.target_modules: {name} is a router of experts, which stays frozen; leave"
                " it out (all-linear does)"
            )
        for other, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.weight is weight:
                raise UserError(
                    f"adapter.target_modules: {name} shares its weight with {other}"
                    " (tie_word_embeddings), so that an adapter on it could not be merged; leave it"
                    " out"
                )


def short(layers: list[str]) -> str:
    """The last names of layers, each once, in their order."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _is_router(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    one_number = getattr(model.get_submodule(name), "out_features", 0) == 1  # a shared expert's
    return "gate" in parts or any("router" in part for part in parts) or one_number


def _frozen_part(model: nn.Module, name: str) -> bool:
    return "experts" in name.split(".") or _is_router(model, name)


def _kind(model: nn.Module, name: str) -> str:
    """``attention``, ``mlp``, or ``other`` in a decoder block; empty for what no preset takes.

    Names of children of the block tell, then their classes; what lies in the block itself is the
    feed-forward layer's (OPT).
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    if number >= len(parts) - 1 or _frozen_part(model, name):
        return ""
    if not (inside := parts[number + 1 : -1]):
        return "mlp" if parts[-1].startswith("fc") else "other"
    cls = type(model.get_submodule(name.rsplit(".", 1)[0])).__name__
    if any(MLP.search(part) for part in inside):
        return "mlp"
    if any(MIXER.search(part) for part in inside):
        return "mlp" if re.search(r"MLP|MOE", cls) else "attention"
    return "other"


def _is_default(name: str, kind: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    gate = "gate" in last and "up" not in last
    return not gate and (kind == "mlp" or (kind == "attention" and not OUTPUT.fullmatch(last)))
