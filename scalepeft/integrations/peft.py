"""Every method of scalepeft as a tuner of HF PEFT: importing this module registers them.

``get_peft_model(model, HOFTConfig(r=16, target_modules="all-linear"))``, ``PeftModel.
from_pretrained`` and the rest of PEFT then work as for any method, over plain layers, those of
bitsandbytes and ours of bytes. One generic tuner: a method's config, layer and model class are made
from the method. Those of which PEFT has one of that name are called ``ScalepeftLoraConfig`` here.

Several active adapters of a layer lie around each other, in the order in which they were made
active: ``y = A2(A1(x)) + b``. A shift of A1 is a part of what A2 sees, so A2's scale scales it; the
layer's own bias b is added last. A merge makes one weight and one bias of the whole stack.
"""

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    PeftType,
    register_peft_method,
)
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, Scale, adapter_config
from scalepeft.adapters.inject import block, total
from scalepeft.adapters.merged_weight import affine, merged_norm, without_dropout
from scalepeft.adapters.peft_names import peft_name, told
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.models import quant


class _Foreign:
    """The frozen layer of a library that PEFT knows (bitsandbytes), as an adapter's ``Base``.

    ``exact``: with the weight as it is stored, for merges; else the layer's own kernel computes,
    which may round x too (LLM.int8).
    """

    trained = True  # no fused form, which would not round as the layer does

    def __init__(self, layer: "Layer", exact: bool) -> None:
        self.layer, self.exact = layer, exact

    def __call__(self, x: Tensor) -> Tensor:
        if self.exact:
            return F.linear(x, self.weight(x.dtype))
        bare: Any = self.layer.get_base_layer()
        return bare(x) if bare.bias is None else bare(x) - bare.bias.to(x.dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.layer.get_base_weight().detach().to(dtype)


class _Stacked:
    """An adapter and what lies below it, as the ``Base`` of the adapter around it."""

    trained = True  # for a fused form W would have to be probed, even where it does not train

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter, self.base = adapter, base

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapter(x, self.base)
        return y

    def weight(self, dtype: torch.dtype) -> Tensor:
        p = next(self.adapter.parameters())
        like = torch.empty(0, self.adapter.in_features, device=p.device)
        with without_dropout([self.adapter]):
            return affine(self, like)[0].to(dtype)


class _OwnBytes(QuantizationBackend):
    """Our ``QuantLinear`` as PEFT sees a quantized layer."""

    supports_merge, backend_name, layer_type = True, "scalepeft", "linear"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        return quant.Frozen(base_layer).weight(torch.float32)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        layer = peft_layer.get_base_layer()
        made = layer.fmt.encode(weight_data)
        layer.weight, layer.weight_scale = (nn.Parameter(t, requires_grad=False) for t in made)


class Layer(nn.Module, BaseTunerLayer):
    """A layer with adapters by name; ``base_layer`` is linear, or a norm whose scale trains."""

    method: ClassVar[str]
    box: ClassVar[str]

    def __init__(self, base_layer: nn.Module, name: str, settings: Any, key: str) -> None:
        super().__init__()
        self.base_layer, self.key = base_layer, key
        bare: Any = self.get_base_layer()
        self.is_norm = not isinstance(bare, nn.Linear)
        if isinstance(bare, nn.Linear):
            self.in_features, self.out_features = bare.in_features, bare.out_features
            own = isinstance(bare, quant.QuantLinear)
            self.quantization_backend = _OwnBytes() if own else resolve_quantization_backend(bare)
        setattr(self, self.box, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self.originals: dict[str, Any] = {}
        self._disable_adapters, self.cast_input_dtype_enabled = False, True
        self._active_adapter = name
        self.update_layer(name, settings)

    @property
    def adapters(self) -> Any:
        """Adapter by name."""
        return getattr(self, self.box)

    def blank(self, settings: Any) -> Adapter:
        """An adapter for this layer, without values."""
        config = settings.method_config(self.key)
        if self.is_norm:
            bare: Any = self.get_base_layer()
            return Scale(config, len(bare.weight), getattr(bare, "bias", None) is not None)
        method = registry.find_class("adapters.methods", self.method, "adapter", Adapter)
        return method(config, self.in_features, self.out_features, self.key)

    def update_layer(self, name: str, settings: Any, **_: Any) -> None:
        """Adds the adapter ``name``."""
        adapter = self.blank(settings)
        if not any(p.is_meta for p in adapter.parameters()):
            adapter.reset_parameters()
            if not settings.init_weights:
                for p in adapter.parameters():
                    p.data.add_(0.1 * torch.randn_like(p))
        self.adapters[name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=settings.inference_mode)

    def active(self) -> list[Adapter]:
        """The active adapters, the innermost first."""
        return [self.adapters[n] for n in self.active_adapters if n in self.adapters]

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The layer with its active adapters; with ``adapter_names`` each row with its own."""
        if adapter_names is not None and len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got"
                f" {len(adapter_names)} and {len(x)} respectively."
            )
        if adapter_names is not None and self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call"
                " `unmerge_adapter` first."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            return self.adapted(x, self.active())
        y: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, n in enumerate(adapter_names) if n == name]
            part = self.adapted(x[rows], [self.adapters[name]] if name in self.adapters else [])
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[rows] = part
        assert y is not None
        return y

    def adapted(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        """The layer with these adapters around it."""
        bare: Any = self.get_base_layer()
        if self.is_norm or not adapters:
            y = self.base_layer(x)
            for a in adapters:
                y = a.transform_output(y)
            return y
        device, dtype = x.device.type, x.dtype
        autocast = torch.is_autocast_enabled(device)
        if autocast:
            x = x.to(torch.get_autocast_dtype(device))
        else:
            x = self._cast_input_dtype(x, self.compute_dtype(x))
        # Gram matrices and solves stay what the method makes them.
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            y = self.stack(adapters)(x)
            y = y if bare.bias is None else y + bare.bias.to(y.dtype)
        return y if autocast else y.to(dtype)

    def stack(self, adapters: list[Adapter], exact: bool = False) -> _Stacked:
        """The adapters around each other, and around the layer without its bias."""
        foreign = self.quantization_backend and not isinstance(self.quantization_backend, _OwnBytes)
        bare: Any = self.get_base_layer()
        base: Any = _Foreign(self, exact) if foreign else quant.Frozen(bare)
        for i, adapter in enumerate(adapters):
            below = any(p.requires_grad for a in adapters[:i] for p in a.parameters())
            if below and adapter.needs_weight and torch.is_grad_enabled():
                raise UserError(
                    f"{self.key}: {self.method} takes the weight below it for a constant, so two"
                    " active adapters cannot train at once; freeze the inner one with"
                    " set_requires_grad(name, False), or merge it"
                )
            base = _Stacked(adapter, base)
        return base

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """In which the layer computes, as far as its weight tells; else that of x."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype if dtype is not None and dtype.is_floating_point else x.dtype

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replaces weight and bias by those of the stack of what was merged before and
        ``adapter_names``; ``unmerge`` puts the originals back.

        Raises:
            UserError: the method is not affine, or it adds a bias and the layer has none.
        """
        found = check_adapters_to_merge(self, adapter_names)
        if not (names := [name for name in found if name in self.adapters]):
            return
        names = self.merged_adapters + names
        self.unmerge()
        bare: Any = self.get_base_layer()
        adapters = [self.adapters[name] for name in names]
        if self.is_norm:
            changed = merged_norm(self.key, bare, adapters, bare.forward)
        else:
            for a in adapters:
                if a.unmergeable_reason:
                    raise UserError(f"{self.method} cannot merge: {a.unmergeable_reason}")
            like = torch.empty(0, self.in_features, device=next(adapters[0].parameters()).device)
            with without_dropout(adapters):
                weight, shift = affine(self.stack(adapters, exact=True), like)
            if bare.bias is None and shift.any():
                raise UserError(
                    f"{self.key}: {self.method} adds a bias and the layer has none, so it cannot"
                    " merge; keep the adapter, or train it with shift=False"
                )
            changed = {"weight": weight}
            if bare.bias is not None:
                changed["bias"] = bare.bias.float() + shift
        if safe_merge and not all(t.isfinite().all() for t in changed.values()):
            what = f"The adapter {', '.join(names)} seems to be broken"
            raise ValueError(f"NaNs detected in the merged weights. {what}")
        self.originals = dict(bare.named_parameters(recurse=False))
        if hasattr(bare, "state"):  # of bitsandbytes' 8 bits: scales that the weight has given away
            self.originals["state"] = copy.copy(bare.state)
        for key, value in changed.items():
            value = value.to(self.compute_dtype(value) if key == "weight" else bare.bias.dtype)
            if key == "weight" and self.quantization_backend is not None:
                self.set_base_weight(value)
            else:
                setattr(bare, key, nn.Parameter(value.contiguous(), requires_grad=False))
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Puts weight and bias back as they were, to the bit."""
        for key, parameter in self.originals.items():
            setattr(self.get_base_layer(), key, parameter)
        self.originals, self.merged_adapters = {}, []

    def __repr__(self) -> str:
        return f"{self.method}." + super().__repr__()


@dataclasses.dataclass
class Config(PeftConfig):
    """What every method's config has beside the method's own settings (``rank`` is ``r``).

    ``init_weights=False`` adds noise to the start, so that an untrained adapter changes the model.
    """

    method: ClassVar[str]
    own_fields: ClassVar[tuple[str, ...]]
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[peft_name(self.method).upper()]
        for key in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, key), list):
                setattr(self, key, set(getattr(self, key)))
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        if self.rank_pattern and "rank" not in self.own_fields:
            raise ValueError(f"{self.method} has no rank; leave rank_pattern empty")
        self.method_config()  # the method's own checks, now

    def method_config(self, key: str = "") -> AdapterConfig:
        """The settings for the layer ``key`` as the method has them."""
        values = {name: getattr(self, "r" if name == "rank" else name) for name in self.own_fields}
        if "rank" in values:
            pattern = get_pattern_key(list(self.rank_pattern), key)
            values["rank"] = self.rank_pattern.get(pattern, values["rank"])
        return adapter_config({"name": self.method, **values})

    def to_dict(self) -> dict[str, Any]:
        """As it is saved: ``peft_type`` says what to import."""
        return {**super().to_dict(), "peft_type": told(self.method)}


class Tuner(BaseTuner):
    """Puts the layers of a method into a model."""

    tuner_layer_cls: type[Any]
    norm_layer_cls: type[Any]
    _adds_penalty = False
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        return _is_norm(peft_config, key) or found  # PEFT tells false answers by their type

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        bare = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(bare, nn.Linear) and not _is_norm(peft_config, current_key):
            what = f"{type(bare).__name__}, and {peft_config.method} adapts nn.Linear"
            raise TypeError(f"Target module {current_key} is not supported: it is {what}")
        cls = self.tuner_layer_cls if isinstance(bare, nn.Linear) else self.norm_layer_cls
        layer = cls(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        has_penalty = registry.find_class("adapters.methods", config.method, "adapter", Adapter)
        if has_penalty.penalty is not Adapter.penalty and not self._adds_penalty:
            self._adds_penalty = True
            model.register_forward_hook(_add_penalty, with_kwargs=True)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: nn.Module, config: Any, adapter_name: str, **rest: Any
    ) -> Any:
        found = super()._get_adapter_state_dict(model, config, adapter_name, **rest)
        for name, m in model.named_modules():
            if isinstance(m, Layer) and adapter_name in m.adapters:
                with torch.device("meta"):
                    wanted = dict(m.blank(config).named_parameters())
                for key, blank in wanted.items():
                    full = f"{name}.{m.box}.{adapter_name}.{key}"
                    if full in found and found[full].shape != blank.shape:
                        raise UserError(
                            f"{full} has shape {list(found[full].shape)}, the whole tensor"
                            f" {list(blank.shape)}: it is a rank's part; save by Trainer or"
                            " accelerate.get_state_dict, which gather, or in GatheredParameters"
                        )
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        modules: Iterable[Any] = self.modules() if names else ()
        layers: list[Any] = [m for m in modules if isinstance(m, self.tuner_layer_cls)]
        if names and self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {"__base__"}.union(*(m.adapters for m in layers))
        if unknown := sorted(set(names or []) - known):
            what = f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}"
            raise ValueError(what)

        def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "adapter_names": names}

        if names:  # beams are rows; what modules_to_save has copied is mixed by PEFT
            names = [n for n in names for _ in range(kwargs.get("num_beams") or 1)]
            layers += [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        hooks = [m.register_forward_pre_hook(add, with_kwargs=True) for m in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _add_penalty(model: nn.Module, _: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """In training the model's own loss has the penalties (of qGOFT) in it, for any trainer."""
    if not model.training:
        return out
    layers = [m for m in model.modules() if isinstance(m, Layer) and not m.disable_adapters]
    terms = [p for m in layers for a in m.active() if (p := a.penalty()) is not None]
    if not terms:
        return out
    if any(p.numel() == 0 for m in layers for a in m.active() for p in a.parameters()):
        raise UserError(
            f"{layers[0].method}: its penalty needs whole parameters, and ZeRO-3 has taken them"
            " apart; take ZeRO-2, FSDP2 or scalepeft's own trainer, or a method without one"
        )
    if getattr(out, "loss", None) is None:
        what = "the model made no loss (no labels), so the penalty is in none"
        warnings.warn(f"{layers[0].method}: {what}", stacklevel=2)
        return out
    share, items, labels = 1.0, kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is not None and labels is not None:  # Trainer sums micro-batches, no mean over them
        share = (labels[..., 1:] != -100).sum() / items
    out.loss = out.loss + (share * total(terms)).to(out.loss.device)
    return out


def _is_norm(config: Any, key: str) -> bool:
    """True for a norm that trains along, in the blocks that are adapted."""
    only = config.layers_to_transform
    if only is not None and block(key) not in ([only] if isinstance(only, int) else only):
        return False
    return any(registry.names(pattern, key) for pattern in config.method_config().norm_modules())


def _register(method: str) -> None:
    """Makes and registers config, layer and tuner of a method."""
    name, adapter = (
        peft_name(method),
        registry.find_class("adapters.methods", method, "adapter", Adapter),
    )
    if name.upper() not in PeftType.__members__:  # an enum is closed; its maps are dicts
        member: Any = str.__new__(PeftType, name.upper())
        member._name_ = member._value_ = name.upper()
        PeftType._member_map_[name.upper()] = PeftType._value2member_map_[name.upper()] = member
        PeftType._member_names_.append(name.upper())
        type.__setattr__(PeftType, name.upper(), member)
    theirs = {"name", "target_modules", "layers"}
    own = [f for f in dataclasses.fields(adapter.Config) if f.name not in theirs]
    blank = adapter.Config(name=method)
    fields = [
        ("r" if f.name == "rank" else f.name, Any, dataclasses.field(
            default_factory=partial(getattr, blank, f.name)))
        for f in own
    ]  # fmt: skip
    title = adapter.__name__ if name == method else f"Scalepeft{adapter.__name__}"
    box, here = f"{name}_adapter", {"__module__": __name__}
    names = {"method": method, "own_fields": tuple(f.name for f in own)}
    config = dataclasses.make_dataclass(
        f"{title}Config", fields, bases=(Config,), namespace={**names, **here}
    )
    config.__doc__ = adapter.Config.__doc__
    parts = {"method": method, "box": box, "adapter_layer_names": (box,)}
    # By the word Linear in it "all-linear" of a second adapter finds what the first has wrapped.
    layer = type(f"{title}Linear", (Layer,), {**parts, **here})
    norm = type(f"{title}Norm", (layer,), here)
    classes = {"tuner_layer_cls": layer, "norm_layer_cls": norm}
    tuner = type(f"{title}Model", (Tuner,), {"prefix": f"{name}_", **classes, **here})
    register_peft_method(name=name, config_cls=config, model_cls=tuner)
    mappings: tuple[dict[Any, Any], ...] = PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    for mapping in mappings:
        mapping[told(method)] = mapping[name.upper()]
    globals().update({made.__name__: made for made in (config, layer, norm, tuner)})


for _method in registry.available("adapters.methods"):
    if peft_name(_method).upper() not in PeftType.__members__:
        _register(_method)
