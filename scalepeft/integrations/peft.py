"""Every method of scalepeft as a tuner of HF PEFT: importing this module registers them.

One generic tuner: a method's config, layer and model class are made from the method. What works,
and how several adapters of a layer go together: docs/integrations/peft.md.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    PeftType,
    register_peft_method,
)
from peft.utils.other import get_pattern_key
from torch import nn

from scalepeft.adapters.base import Adapter, AdapterConfig, adapter_config, find_method
from scalepeft.adapters.inject import Adapted, block, total
from scalepeft.adapters.layout import own_fields, peft_name, told
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.integrations.peft_layer import Layer


@dataclasses.dataclass
class Config(PeftConfig):
    """What every method's config has beside the method's own settings (``rank`` is ``r``)."""

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
        if self.init_weights not in (True, False):
            raise ValueError(f"init_weights={self.init_weights!r}: True or False")
        self.rank_pattern = self.rank_pattern or {}
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
        if isinstance(target, BaseTunerLayer | Adapted):
            what = f"{current_key} has an adapter of another kind, which would be passed over"
            raise UserError(f"{what}; merge it, or load a model without one")
        cls = self.tuner_layer_cls if isinstance(bare, nn.Linear) else self.norm_layer_cls
        layer = cls(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        there = _add_penalty in model._forward_hooks.values()  # of a tuner before
        if find_method(config.method).penalty is not Adapter.penalty and not there:
            model.register_forward_hook(_add_penalty, with_kwargs=True)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # the rest goes on as it came
        cls, model: nn.Module, config: Any, adapter_name: str, **rest: Any
    ) -> dict[str, Any]:
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
        if not (names := kwargs.pop("adapter_names", None)):
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers: list[Any] = [m for m in self.modules() if isinstance(m, self.tuner_layer_cls)]
        known = {"__base__"}.union(*(m.adapters for m in layers))
        if unknown := sorted(set(names) - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        rows = [n for n in names for _ in range(kwargs.get("num_beams") or 1)]  # beams are rows

        def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "adapter_names": rows}

        # What modules_to_save has copied is mixed by PEFT.
        layers += [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        with ExitStack() as hooks:
            for m in layers:
                hooks.enter_context(m.register_forward_pre_hook(add, with_kwargs=True))
            yield


def _add_penalty(model: nn.Module, _: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """In training the model's own loss has the penalties (of qGOFT) in it, for any trainer."""
    if not model.training:
        return out
    found = (m for m in model.modules() if isinstance(m, Layer))
    layers = [m for m in found if not m.disable_adapters and not m.merged]
    terms = [p for m in layers for a in m.active() if (p := a.penalty()) is not None]
    if not terms:
        return out
    if any(p.numel() == 0 for m in layers for a in m.active() for p in a.parameters()):
        raise UserError(
            f"{layers[0].method}: its penalty needs whole parameters, and ZeRO-3 has taken them"
            " apart; take ZeRO-2, FSDP2 or scalepeft's own trainer, or a method without one"
        )
    if getattr(out, "loss", None) is None:
        what = "the model returned no .loss (no labels, or return_dict=False): no penalty in it"
        warnings.warn(f"{layers[0].method}: {what}", stacklevel=2)
        return out
    share, items, labels = 1.0, kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs.get("labels")
        if labels is not None and getattr(model, "loss_type", None) == "ForCausalLM":
            labels = labels[..., 1:]  # what Trainer counts
    if items is not None and labels is not None:  # it sums micro-batches, with no mean over them
        share = (labels != -100).sum() / items
    out.loss = out.loss + (share * total(terms)).to(out.loss.device)
    return out


def _is_norm(config: Any, key: str) -> bool:
    only = config.layers_to_transform
    if only is not None and block(key) not in ([only] if isinstance(only, int) else only):
        return False
    return any(registry.names(pattern, key) for pattern in config.method_config().norm_modules())


def _register(method: str) -> None:
    name, adapter = peft_name(method), find_method(method)
    member: Any = str.__new__(PeftType, name.upper())  # an enum is closed; its maps are dicts
    member._name_ = member._value_ = name.upper()
    PeftType._member_map_[name.upper()] = PeftType._value2member_map_[name.upper()] = member
    PeftType._member_names_.append(name.upper())
    type.__setattr__(PeftType, name.upper(), member)
    own = own_fields(adapter.Config)
    defaults = partial(getattr, adapter.Config(name=method))
    fields = [
        ("r" if k == "rank" else k, Any, dataclasses.field(default_factory=partial(defaults, k)))
        for k in own
    ]
    title = adapter.__name__ if name == method else f"Scalepeft{adapter.__name__}"
    box, here = f"{name}_adapter", {"__module__": __name__}
    names = {"method": method, "own_fields": tuple(own)}
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
