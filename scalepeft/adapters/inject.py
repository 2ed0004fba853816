"""Puts adapters into a model: finds layers, swaps their class, freezes the rest, names states."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scalepeft.adapters import layout, targets
from scalepeft.adapters.base import (
    Adapter,
    AdapterConfig,
    Scale,
    adapter_config,
    apply,
    on_meta,
    unsharded_copy,
)
from scalepeft.adapters.experts import stack
from scalepeft.adapters.layout import read_adapter
from scalepeft.core import errors, registry
from scalepeft.core.errors import UserError
from scalepeft.core.files import writing
from scalepeft.core.log import say
from scalepeft.models import quant
from scalepeft.models.experts import ExpertLinear, mix_in, replace_experts
from scalepeft.parallel.base import copy_rows, full_shape


class Adapted(nn.Linear):
    """Mixin of an adapted layer: ``y = adapter(x, W .) + b``; base parameters keep their names."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        """Applies the adapter around the frozen layer; the base bias is added last."""
        y = apply(self.adapter, x, quant.Frozen(self))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class AdaptedExperts(Adapted):
    """Mixin of an ``ExpertLinear`` with an adapter for each expert."""

    def forward(self, x: Tensor, bounds: list[int]) -> Tensor:  # type: ignore[override]
        """X (rows, in) sorted by expert -> (rows, out)."""
        return apply(self.adapter, x, self, bounds)


class AdaptedNorm(nn.Module):
    """Mixin of a normalization layer whose weight (and bias) trains: ``y = adapter(norm(x))``."""

    adapter: Scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalises as before, then applies the trained scale and shift."""
        return self.adapter.transform_output(super().forward(x))  # the norm's own, next in line


def _attach(layer: nn.Module, config: AdapterConfig, name: str = "") -> None:
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{type(layer).__name__} cannot be adapted; nn.Linear layers can")
    if isinstance(layer, Adapted):
        raise UserError("the layer already has an adapter; a layer takes one")
    # Allocated once its shapes are known to be wanted.
    adapter = on_meta(config, layer.in_features, layer.out_features, name)
    if isinstance(layer, ExpertLinear):
        stack(adapter, layer.num_experts)
    _put(layer, AdaptedExperts if isinstance(layer, ExpertLinear) else Adapted, adapter)


def _put(layer: Any, mixin: type[nn.Module], adapter: Adapter) -> None:
    mix_in(layer, mixin)
    layer.requires_grad_(False)
    layer.adapter = adapter.train(layer.training)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yields (name, layer) of every adapted linear layer, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yields (layer name, adapter) of linear layers and of norms, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted | AdaptedNorm):
            yield name, module.adapter


def train_mode(model: nn.Module) -> nn.Module:
    """Adapters in training mode; the frozen base in that of inference, without its own dropout."""
    model.eval()
    for _, adapter in adapters(model):
        adapter.train()
    return model


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _matching(
    model: nn.Module, patterns: list[str], fits: Callable[[nn.Module], bool], where: str, what: str
) -> list[str]:
    modules = dict(model.named_modules())
    candidates = {name for name, m in modules.items() if fits(m)}
    experts = {name for name, m in modules.items() if isinstance(m, ExpertLinear)}
    found: set[str] = set()
    for pattern in patterns:
        # Experts, most of a model, are never meant by a bare down_proj.
        named = candidates if "experts" in pattern else candidates - experts
        matches = [name for name in named if registry.names(pattern, name)]
        if not matches:
            parts = {name: -2 if name in experts else -1 for name in candidates}
            last = sorted({".".join(n.split(".")[at:]) for n, at in parts.items()} - {""})
            near = errors.nearest(pattern, [*last, *targets.PRESETS, *candidates])
            said = f"{where}: '{pattern}' matches no {what} layer of this model.{near}"
            raise UserError(f"{said} There are: {', '.join(last)}")
        found.update(matches)
    return [name for name in modules if name in found]


def block(name: str) -> int | None:
    """Number of the decoder block that a layer lies in: 3 for ``model.layers.3.mlp.up_proj``."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _in_layers(names: list[str], layers: list[int] | str) -> list[str]:
    if isinstance(layers, str):
        return names
    there = [at for name in names if (at := block(name)) is not None]
    if outside := [name for name in names if block(name) is None]:
        fix = "take it out of adapter.target_modules, or set adapter.layers=all"
        raise UserError(f"adapter.layers={layers}: {outside[0]} lies in no decoder block; {fix}")
    if missing := [wanted for wanted in layers if wanted not in there]:
        known = f"{min(there)} to {max(there)}"
        raise UserError(f"adapter.layers={layers}: no block {missing[0]}; the targets have {known}")
    return [name for name in names if block(name) in layers]


def inject(
    model: nn.Module,
    config: AdapterConfig | dict[str, Any],
    seed: int | None = 0,
    check: Callable[[nn.Module], None] = lambda _: None,
) -> nn.Module:
    """Adapts every layer that ``config.target_modules`` names, freezes all else, in place.

    Args:
        model: with ``nn.Linear`` (or quantized) layers; on the meta device only the structure is
            made, and ``reset_adapters`` draws the start values once the parameters are real.
        config: a method's config or the same as a dict with ``name``.
        seed: of the start values; None: none are made, a state will be loaded.
        check: called before any adapter is allocated; may raise.

    Raises:
        UserError: a target that matches nothing, a setting that the method or a layer cannot take.
    """
    if isinstance(config, dict):
        config = adapter_config(config)
    if any(True for _ in adapters(model)):
        raise UserError("the model already has an adapter; a layer takes one")
    if any("experts" in pattern for pattern in config.target_modules):
        replace_experts(model)  # of a model that transformers made
    wanted = targets.expand(model, config)
    linear = _matching(
        model, wanted, lambda m: isinstance(m, nn.Linear), "adapter.target_modules", "linear"
    )
    targets.check(model, linear)
    linear = _in_layers(linear, config.layers)
    norms = _matching(model, config.norm_modules(), _is_norm, "adapter.norm", "normalization")
    model.requires_grad_(False)
    structure_only = any(p.is_meta for p in model.parameters())
    for name in linear:
        try:
            _attach(model.get_submodule(name), config, name)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    blocks = {block(name) for name in linear}
    if norms and not any(block(name) in blocks for name in norms):
        fix = "name the layer that follows the attention there, or set adapter.train_norm=false"
        raise UserError(f"adapter.norm: {norms[0]} is in none of the adapted blocks; {fix}")
    for name in norms:
        if block(name) in blocks:
            norm: Any = model.get_submodule(name)
            bias = getattr(norm, "bias", None) is not None
            with torch.device("meta"):
                scale = Scale(config, len(norm.weight), bias)
            _put(norm, AdaptedNorm, scale)
    check(model)
    if not structure_only:
        _allocate(model, seed)
    if hasattr(model, "save_pretrained"):  # of transformers: it would write the base too
        vars(model)["save_pretrained"] = MethodType(_save_pretrained, model)
    return model


def _save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **_: Any,
) -> None:
    """What transformers' Trainer calls; settings of how a whole model is written do not count."""
    if is_main_process:
        save_adapter(model, save_directory, state_dict)
        say(
            f"the adapter alone in {save_directory}; checkpoints that Trainer resumes come from"
            " PEFT's get_peft_model with scalepeft.integrations.peft, or from scalepeft train"
        )


def save_adapter(
    model: nn.Module, folder: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter to ``folder`` as ``scalepeft train`` does; ``state_dict``: its gathered
    tensors, where the model's are sharded. Raises UserError: no adapter, something else trains too,
    tensors that are missing or not whole.
    """
    found, own = dict(adapters(model)), tensors(model)
    if not own or (more := trainable(model).keys() - own.keys()):
        what = f"{min(more)} trains too, and is in no adapter" if own else "the model has none"
        raise UserError(f"{folder}: adapter not saved: {what}; inject one, and freeze all else")
    state = own if state_dict is None else state_dict
    for name, parameter in own.items():
        tensor = state.get(name)
        whole = tensor is not None and tensor.shape == full_shape(parameter)
        if tensor is None or not whole or tensor.is_meta or isinstance(tensor, DTensor):
            raise UserError(
                f"{folder}: adapter not saved: {name} is not there as a whole; where tensors are"
                " sharded pass gathered ones, state_dict=accelerator.get_state_dict(model)"
            )
    path = getattr(getattr(model, "config", None), "name_or_path", None) or None
    about = {"base_model": {"path": path}, "step": None, "length": None}
    with writing(folder):
        held = {name: state[name].detach() for name in own}
        layout.write(Path(folder), model, found, held, about, path)


def _allocate(model: nn.Module, seed: int | None) -> None:
    for module in model.modules():
        if isinstance(module, Adapted | AdaptedNorm):
            weight: Any = module.weight
            module.adapter.to_empty(device=weight.device)
    if seed is not None:
        reset_adapters(model, seed)
        start_adapters(model)


def adapt(layer: nn.Linear, name: str, *, seed: int = 0, **settings: Any) -> nn.Linear:
    """Adapts one layer in place and returns it: ``adapt(linear, "hoft", rank=8)``."""
    _attach(layer, adapter_config({"name": name, **settings}))
    _allocate(layer, seed)
    return layer


def reset_adapters(model: nn.Module, seed: int) -> None:
    """Draws all start values by (seed, layer name) alone; each rank takes its rows of them."""
    for name, adapter in adapters(model):
        drawn_from = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        twin = unsharded_copy(adapter)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(drawn_from[:8], "little") >> 1)
            twin.reset_parameters()
        for key, parameter in adapter.named_parameters():
            copy_rows(parameter, twin.get_parameter(key))


@torch.no_grad()
def start_adapters(model: nn.Module, whole: Callable[[list[nn.Parameter]], Any] = list) -> None:
    """Makes what adapters keep of W, which ``whole`` gathers, one layer after another."""
    for _, layer in adapted_layers(model):
        if layer.adapter.kept:
            # Not unsharded_copy, which would gather the adapter too.
            held = {k: whole([p])[0] for k, p in layer._parameters.items() if p is not None}
            twin: Any = layer.__class__.__new__(layer.__class__)
            twin.__dict__ = {**layer.__dict__, "_parameters": held}
            base = twin if isinstance(layer, ExpertLinear) else quant.Frozen(twin)
            for key, values in layer.adapter.start(base).items():
                copy_rows(layer.adapter.get_parameter(key), values)


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns what an adapter's state holds, by name: what is trained, and what is kept."""
    found = adapters(model)
    return {f"{name}.adapter.{k}": p for name, a in found for k, p in a.named_parameters()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters under their canonical names ``<layer>.adapter.<param>``."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def decayed_names(model: nn.Module) -> set[str]:
    """Names of trained parameters that take weight decay: not rotations, reflections, scales."""
    return {
        f"{name}.adapter.{key}"
        for name, adapter in adapters(model)
        for key, _ in adapter.named_parameters()
        if key in adapter.weight_decay
    }


def penalty(model: nn.Module) -> Tensor | None:
    """Sum of the adapters' penalties, whole on every rank, for the loss once; None without any."""
    found = [p for _, adapter in adapters(model) if (p := adapter.penalty()) is not None]
    return total(found) if found else None


def total(penalties: list[Tensor]) -> Tensor:
    """Their sum; of sharded parameters the whole sum."""
    added = sum(penalties[1:], penalties[0])  # of sharded parameters: still one part a rank
    return added.full_tensor() if isinstance(added, DTensor) else added


def check_state(model: nn.Module, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError if tensors are missing, extra or misshapen in an adapter's state; by name."""
    parameters = tensors(model)
    if missing := sorted(parameters.keys() - shapes.keys()):
        what = f"lacks {len(missing)} of {len(parameters)} tensors, first {missing[0]}"
        raise UserError(f"{where}: {what}")
    if extra := sorted(shapes.keys() - parameters.keys()):
        raise UserError(f"{where}: has {len(extra)} tensors this model does not, first {extra[0]}")
    for name, found in shapes.items():
        if tuple(found) != (shape := tuple(full_shape(parameters[name]))):
            what = f"{name} has shape {list(found)}, this model needs {list(shape)}"
            raise UserError(f"{where}: {what}")


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copies a state into the model. Raises UserError: not all there, or not finite, by name."""
    check_state(model, shapes(state), where)
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise UserError(f"{where}: {name} holds {tensor.dtype}; take an older checkpoint")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds NaN or infinity; take an older checkpoint")
    parameters = tensors(model)
    for name, tensor in state.items():
        copy_rows(parameters[name], tensor)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Injects the adapter of ``folder`` (a run's ``adapter/``, or of PEFT) into its base model.

    That this holds the weights it was trained on is the caller's to know. Raises UserError:
    unreadable folder, or one of another model, method or settings.
    """
    config, state, _ = read_adapter(Path(folder))
    found = [layer.adapter.config for _, layer in adapted_layers(model)]
    if not found:
        inject(model, config, None, lambda made: check_state(made, shapes(state), str(folder)))
    elif any(dataclasses.replace(c, target_modules=config.target_modules) != config for c in found):
        raise UserError(
            f"{folder}: an adapter with settings {config}; the model has one with {found[0]}."
            " Load it into a model without an adapter, or inject the same settings"
        )
    load_state(model, state, str(folder))
    return model
