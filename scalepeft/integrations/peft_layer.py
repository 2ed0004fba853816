"""A layer of PEFT with our adapters: forward, mixed batches, merge and unmerge."""

import copy
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.adapters.base import Adapter, Base, Scale, apply, find_method
from scalepeft.adapters.merged_weight import affine, merged_norm
from scalepeft.core.errors import UserError
from scalepeft.models import quant


class _Foreign:
    """A layer that is more than its weight, as ``Base``: of bitsandbytes, whose kernel may round x
    too, with hooks (offloading) or a forward of its own. ``exact``: by its weight, for merges.
    """

    def __init__(self, layer: "Layer", exact: bool) -> None:
        self.layer, self.exact = layer, exact
        # Where the weight does not tell what is computed no form goes around the layer.
        self.trained = not layer.quantization_backend or hasattr(layer.get_base_layer(), "state")

    def __call__(self, x: Tensor) -> Tensor:
        if self.exact:
            return F.linear(x, self.weight(x.dtype))
        bare: Any = self.layer.get_base_layer()
        return bare(x) if bare.bias is None else bare(x) - self.layer.bias_of(x)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.layer.get_base_weight().detach().to(dtype)


class _Stacked:
    """An adapter and what lies below it, as the ``Base`` of the adapter around it."""

    trained = True  # for a fused form W would have to be probed, even where it does not train

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter, self.base = adapter, base

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter(x, self.base)

    def weight(self, dtype: torch.dtype) -> Tensor:
        p = next(self.adapter.parameters())
        like = torch.empty(0, self.adapter.in_features, device=p.device)
        return affine(self, like, [self.adapter])[0].to(dtype)


class _OwnBytes(QuantizationBackend):
    """Our ``QuantLinear`` as PEFT sees a quantized layer."""

    supports_merge, backend_name, layer_type = True, "scalepeft", "linear"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        return quant.Frozen(base_layer).weight(torch.float32)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        layer = peft_layer.get_base_layer()
        parts = (nn.Parameter(t, requires_grad=False) for t in layer.fmt.encode(weight_data))
        layer.weight, layer.weight_scale = parts


class Layer(nn.Module, BaseTunerLayer):
    """A layer with adapters by name; ``base_layer`` is linear, or a norm whose scale trains."""

    method: ClassVar[str]
    box: ClassVar[str]

    def __init__(self, base_layer: nn.Module, name: str, settings: Any, key: str) -> None:
        super().__init__()
        self.base_layer, self.key = base_layer, key
        bare = self.bare
        if bare.weight.is_meta and hasattr(bare, "_hf_hook"):  # PEFT would move the adapter there
            what = "its weight is offloaded, and an adapter's start values would be too"
            raise UserError(f"{key}: {what}; adapt the model first, then offload it")
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
    def bare(self) -> Any:
        """The layer that all of this is around."""
        return self.get_base_layer()

    @property
    def adapters(self) -> Any:
        """Adapter by name."""
        return getattr(self, self.box)

    def blank(self, settings: Any) -> Adapter:
        """An adapter for this layer, without values."""
        config = settings.method_config(self.key)
        if self.is_norm:
            has_bias = getattr(self.bare, "bias", None) is not None
            return Scale(config, len(self.bare.weight), has_bias)
        return find_method(self.method)(config, self.in_features, self.out_features, self.key)

    def update_layer(self, name: str, settings: Any, **_: Any) -> None:
        """Adds the adapter ``name``."""
        adapter = self.blank(settings)
        if not any(p.is_meta for p in adapter.parameters()):
            adapter.reset_parameters()
            if adapter.kept:
                for key, values in adapter.start(self.stack([], exact=True)).items():
                    adapter.get_parameter(key).data.copy_(values)
            if not settings.init_weights:
                for p in adapter.parameters():
                    p.data.add_(0.1 * torch.randn_like(p))
        self.adapters[name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=settings.inference_mode)

    def _freeze_non_trainable_peft_weights(self, *_: Any) -> None:
        """What PEFT calls after each change of what trains."""
        for adapter in self.adapters.values():
            adapter.freeze()

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
        if self.is_norm or not adapters:
            y = self.base_layer(x)
            for a in adapters:
                y = a.transform_output(y)
            return y
        dtype, autocast = x.dtype, torch.is_autocast_enabled(x.device.type)
        if not autocast:
            x = self._cast_input_dtype(x, self.compute_dtype(x))
        y = apply(self.stack(adapters), x)
        y = y if self.bare.bias is None else y + self.bias_of(y)
        return y if autocast else y.to(dtype)

    def bias_of(self, like: Tensor) -> Tensor:
        """The layer's bias in the dtype of ``like``; of an offloaded one what it makes of 0."""
        if not self.bare.bias.is_meta:
            return self.bare.bias.to(like.dtype)
        return self.bare(like.new_zeros(1, self.in_features))[0].to(like.dtype)

    def is_plain(self) -> bool:
        """True where weight and bias alone tell what the layer computes."""
        if self.bare._forward_hooks or self.bare._forward_pre_hooks or "forward" in vars(self.bare):
            return False
        return type(self.bare).forward in (nn.Linear.forward, quant.QuantLinear.forward)

    def stack(self, adapters: list[Adapter], exact: bool = False) -> _Stacked:
        """The adapters around each other, and around the layer without its bias."""
        base: Any = quant.Frozen(self.bare) if self.is_plain() else _Foreign(self, exact)
        for adapter in adapters:
            base = _Stacked(adapter, base)
        return base

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """In which the layer computes, as far as its weight tells; else that of x."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype if dtype is not None and dtype.is_floating_point else x.dtype

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replaces weight and bias by those of the stack of what was merged before and
        ``adapter_names``; always safe. Raises UserError: not affine, or a bias without a place.
        """
        found = check_adapters_to_merge(self, adapter_names)
        if not (names := [name for name in found if name in self.adapters]):
            return
        merged, originals, held = self.merged_adapters, self.originals, self.held()
        names = merged + names
        self.unmerge()
        try:
            changed = self.merged_with(names)
        except BaseException:  # refused: what was merged before stays merged
            self.originals = held
            self.unmerge()
            self.merged_adapters, self.originals = merged, originals
            raise
        self.originals = self.held()
        for key, value in changed.items():
            value = value.to(self.compute_dtype(value) if key == "weight" else self.bare.bias.dtype)
            if key == "weight" and self.quantization_backend is not None:
                self.set_base_weight(value)
            else:
                setattr(self.bare, key, nn.Parameter(value.contiguous(), requires_grad=False))
        self.merged_adapters = names

    def held(self) -> dict[str, Any]:
        """What a merge replaces of the layer, by name."""
        found = dict(self.bare.named_parameters(recurse=False))
        if hasattr(self.bare, "state"):  # of bitsandbytes' 8 bits: scales the weight gave away
            found["state"] = copy.copy(self.bare.state)
        return found

    def merged_with(self, names: list[str]) -> dict[str, Tensor]:
        """Weight and bias with these adapters; raises as ``merge``."""
        adapters = [self.adapters[name] for name in names]
        if not all(p.isfinite().all() for a in adapters for p in a.parameters()):
            what = f"The adapter {', '.join(names)} seems to be broken"
            raise ValueError(f"NaNs detected in the merged weights. {what}")
        if self.is_norm:
            return merged_norm(self.key, self.bare, adapters, self.bare.forward)
        for a in adapters:
            if a.unmergeable_reason:
                raise UserError(f"{self.method} cannot merge: {a.unmergeable_reason}")
        if self.bare.weight.is_meta or not (self.is_plain() or self.quantization_backend):
            what = "its weight is offloaded, or it has hooks or a forward of its own"
            raise UserError(f"{self.key}: {what}; load the whole plain model to merge")
        like = torch.empty(0, self.in_features, device=next(adapters[0].parameters()).device)
        weight, shift = affine(self.stack(adapters, exact=True), like, adapters)
        if self.bare.bias is not None:
            return {"weight": weight, "bias": self.bare.bias.float() + shift}
        if shift.any():
            raise UserError(
                f"{self.key}: {self.method} adds a bias and the layer has none, so it cannot"
                " merge; keep the adapter, or train it with shift=False"
            )
        return {"weight": weight}

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "Layer":
        """Of ``to``, ``half``, ...: what ``unmerge`` puts back goes along."""
        super()._apply(fn, *args, **kwargs)
        for p in self.originals.values():
            if isinstance(p, nn.Parameter):
                p.data = fn(p.data)
        return self

    def unmerge(self) -> None:
        """Puts weight and bias back as they were, to the bit."""
        for key, parameter in self.originals.items():
            setattr(self.get_base_layer(), key, parameter)
        self.originals, self.merged_adapters = {}, []

    def __repr__(self) -> str:
        return f"{self.method}." + super().__repr__()
