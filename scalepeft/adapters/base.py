"""The adapter protocol: a frozen linear layer is a black box, an adapter is what happens around it.

Letters: W frozen weight (out, in), x (..., in), y (..., out), b the base bias, r rank.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.core import kernels, registry
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides, Layers, Targets, _build
from scalepeft.core.text import one_line
from scalepeft.parallel.base import full_shape


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterConfig:
    """What every method's config has.

    Attributes:
        name: the method, a file of ``scalepeft/adapters``.
        target_modules: layers to adapt: the end of a module name (``q_proj``), or a pattern over
            the whole name (``model.layers.1*.self_attn.*``), or ``all-linear``, ``attention`` or
            ``mlp`` of the decoder blocks, without routers. The experts of a mixture only where
            ``experts`` is written (``experts.down_proj``, ``*.experts.*``). The default is the set
            behind the parameter counts of the HOFT, LLM-Adapters and DoRA papers; where a model
            lacks one of its names, the same projections by what they do.
        layers: numbers of the decoder blocks to adapt, from 0; ``all`` for every one.
    """

    DECIDES: ClassVar = (Decides.TRAINING,)
    BEFORE: ClassVar[dict[str, Any]] = {}
    """What saved settings without a key mean that is newer than they, if not its default."""

    name: str
    target_modules: Targets = Field(default=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    layers: Layers = "all"

    def norm_modules(self) -> list[str]:
        """Names of normalization layers of the adapted blocks whose weight trains too."""
        return []


class Base(Protocol):
    """The frozen layer without its bias, however W is stored."""

    trained: bool
    """True where W takes a gradient by way of ``__call__``: that of another adapter inside."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x (..., in) -> W x (..., out)`` in the dtype of x, differentiable in x."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) for the moment, made where it is asked for (from bytes); not to be kept."""


class Adapter(nn.Module):
    """``y = transform_output(W transform_input(x) + delta(x)) + b``: docs/contributing.md."""

    Config: ClassVar[type[AdapterConfig]]
    unmergeable_reason: str = ""
    """Why the layer cannot be one weight and one bias (its map is not affine in x); else empty."""
    weight_decay: ClassVar[frozenset[str]] = frozenset()
    """Parameters that decay pulls towards the base layer; never rotations, reflections, scales."""

    needs_weight: bool = False
    """True where a changed W is made in forward and backward: a cost a batch, not a token."""
    paper: str = ""
    """Where the method comes from: ``arXiv 2106.09685``."""

    def __init__(
        self, config: Any, in_features: int, out_features: int, layer_name: str = ""
    ) -> None:
        super().__init__()
        self.config, self.layer_name = config, layer_name
        self.in_features, self.out_features = in_features, out_features
        self.declare()
        self.freeze()

    def declare(self) -> None:
        """``self.U = self.new_parameter(out, r)``. Raises UserError: dimensions it cannot take."""

    @staticmethod
    def new_parameter(*shape: int) -> nn.Parameter:
        """A trained fp32 tensor; on the meta device too, and without values."""
        return nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Draws the start values, with which the layer equals its base; called on an unsharded copy
        on the CPU under a seed of (run seed, layer name), whatever device, engine or world size.
        """
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    kept: frozenset[str] = frozenset()
    """Parameters that never train: as ``start`` makes them, saved with the others."""

    def start(self, base: Base) -> dict[str, Tensor]:
        """Values of what is ``kept``, out of W; asked for where something is, before training."""
        return {}

    def freeze(self) -> None:
        """Takes what is ``kept`` out of what trains."""
        for key in self.kept:
            self.get_parameter(key).requires_grad_(False)

    made: tuple[Tensor, ...] | None = None
    """The factors, where ``adapters.factors`` keeps them over a step; else None."""

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the map takes of its parameters alone (rotations, inverses), differentiable in them,
        in fp32 or better. Tensors may have more dimensions in front, for all layers of a shape.
        """
        return ()

    def get_factors(self, dtype: torch.dtype) -> list[Tensor]:
        """The factors in ``dtype``: those that were made ahead, or made here."""
        made = self.made
        if made is None:
            exact, named = math_dtype(dtype), self.named_parameters(recurse=False)
            made = self.factors({key: p.to(exact) for key, p in named})
        return [factor.to(dtype) for factor in made]

    def transform_input(self, x: Tensor) -> Tensor:
        """Maps x (..., in) before the frozen layer sees it."""
        return x

    def delta(self, x: Tensor) -> Tensor | None:
        """Returns what is added to W x, (..., out), or None."""
        return None

    def transform_output(self, y: Tensor) -> Tensor:
        """Maps y (..., out) after the frozen layer, before its bias is added."""
        return y

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Applies the method around ``base`` (the frozen layer without bias)."""
        y = base(self.transform_input(x))
        delta = self.delta(x)
        return self.transform_output(y if delta is None else y + delta)

    def penalty(self) -> Tensor | None:
        """A term that the trainer adds to the loss once a step, whatever the sharding; or None."""
        return None

    def flops(self) -> int:
        """FLOP a token in forward, on top of the frozen layer's ``2 in out``."""
        raise NotImplementedError(f"{type(self).__name__} must define flops")

    def rotations(self) -> list[tuple[int, Callable[[Tensor], Tensor]]]:
        """What turns input and output, maps of rows (n, width), with their widths."""
        return [(self.in_features, self.transform_input)]

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The same map for HF PEFT, of a whole layer: (fields of its config, tensors by what
        follows the layer's name, as ``lora_A.weight``), or None.
        """
        return None

    def to_lora(self, base: Base) -> tuple[Tensor, Tensor] | None:
        """``(A (k, in), B (out, k))``, exactly ``W' = W + B A``; None: W' - W has full rank."""
        return None


def apply(adapter: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
    """``adapter(x, *more)``, under autocast as ``nn.Linear``: over x in autocast's dtype. It is off
    inside, where it would take Gram matrices, solves and norms out of fp32.
    """
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return adapter(x, *more)
    if x.dtype != torch.float64:  # which it leaves as it is
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return adapter(x, *more)


def first_order(ctx: Any) -> None:
    """Refuses a second derivative; ``once_differentiable`` is silent on that of a sum, or by x."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        what = f"create_graph=True: {type(ctx).__name__} has no second derivative"
        raise UserError(f"{what}; leave it False, or take another adapter method")


class Dropout(nn.Module):
    """Zeroes entries of x with probability p in training and scales the others by 1 / (1 - p).

    With ``keys`` an entry's fate is a function of (key, layer, position, feature) alone: the same
    whatever micro-batch, padding and ranks, and again in a recomputation. Else torch's generator's.
    """

    def __init__(self, p: float, layer_name: str) -> None:
        super().__init__()
        self.p = p
        salt = int.from_bytes(hashlib.sha256(layer_name.encode()).digest()[:7], "little")
        # A tensor, so that one compiled graph is that of every layer.
        self._salt = torch.tensor(salt, device="cpu")
        self.keys: Tensor | None = None
        """int64 (lines,) of rows, or (lines, length) of tokens where a line holds several rows."""
        self.positions: Tensor | None = None
        """(lines, length), of tokens in their rows; None: each line is one row."""

    def forward(self, x: Tensor) -> Tensor:
        """X (rows, positions, features), or (rows * positions, features) -> the same shape."""
        if not self.training or not self.p or not x.numel():
            return x
        if self.keys is None:
            return F.dropout(x, self.p)
        args = self.keys.to(x.device), self.positions, self._salt, self.p
        # Inductor makes one pass of the plain form itself.
        plain = torch.compiler.is_compiling() or x.element_size() > 4
        kernel = None if plain else kernels.find("drop", x, _compare, x.dtype)
        return _Dropped.apply(x, lambda x: kernel(x, *args)) if kernel else drop(x, *args)


def drop(x: Tensor, keys: Tensor, positions: Tensor | None, salt: Tensor, p: float) -> Tensor:
    """Keyed dropout of x; the gradient of its output gives that of x. Arguments of ``Dropout``."""
    features = x.shape[-1]
    length = x.numel() // (len(keys) * features)
    at = torch.arange(max(length, features), device=x.device)
    row = _mix(keys + salt).view(len(keys), -1)
    # 32 random bits for each (row, position) and for each feature; mixed, for each entry.
    bits = _mix(row + (at[:length] if positions is None else positions)).int()[..., None]
    bits = bits ^ _mix(at[:features] - salt).int()
    bits.mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15) & 0x1FFFF).mul_(-0x7B935975)
    bits.bitwise_xor_((bits >> 16) & 0xFFFF)
    dropped = (bits < round(p * 2**32) - 2**31).view(x.shape)
    # A product: CUDA would make one of a quotient, and a CPU not.
    return x.masked_fill(dropped, 0) * (1 / (1 - p))


class _Dropped(torch.autograd.Function):
    """``drop`` by a kernel, in one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.kernel = kernel
        return kernel(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Dropped.apply(*grads, ctx.kernel), None


def _compare(kernel: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the kernel and the plain form make of lines of several rows, and of one row each."""
    x = torch.arange(2 * 21 * 300, device=device).sin().view(2, 21, 300).to(dtype)
    keys, salt = torch.arange(42, device=device).view(2, 21) // 8 - 2**62, torch.tensor(2**55 + 3)
    cases = (keys, keys % 13, salt, 0.3), (keys[:, 0], None, salt, 0.05)
    return tuple(torch.cat([form(x, *case) for case in cases]) for form in (kernel, drop))


def dropout_keys(samples: Tensor, seed: int) -> Tensor:
    """The keys of a micro-batch: global indices of its samples, of any shape, under a seed."""
    return samples + int(_mix(torch.tensor(seed)))


def _mix(n: Tensor) -> Tensor:
    """Spreads int64 numbers over 64 bits (splitmix64, in wrapping arithmetic)."""
    n = n * -0x61C8864680B583EB
    n = (n ^ ((n >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    n = (n ^ ((n >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return n ^ ((n >> 31) & 0x1FFFFFFFF)


class Scale(Adapter):
    """``y = (1 + scale) * y0 + shift`` behind a norm: trains its weight, and its bias if any."""

    def __init__(self, config: Any, features: int, bias: bool) -> None:
        super().__init__(config, features, features)
        self.scale = self.new_parameter(features)
        self.shift = self.new_parameter(features) if bias else None

    def transform_output(self, y: Tensor) -> Tensor:
        """Scales and shifts (..., features)."""
        return scale_shift(y, self.scale, self.shift)

    def flops(self) -> int:
        """A product a channel, and a sum with a shift."""
        return sum(p.numel() for p in self.parameters())


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """``x + scale * x + shift`` over the last dimension, in the dtype of x; 1 + scale is never
    formed: in bf16 it would be rounded to steps of 0.8 % near 1.
    """
    y: Tensor = _ScaleProduct.apply(x, scale)
    return y if shift is None else y + shift.to(x.dtype)


class _ScaleProduct(torch.autograd.Function):
    """``x + scale * x`` in one pass each way; autograd would take three backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.addcmul(x, x, scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, scale = ctx.saved_tensors
        dx = d_scale = None
        if ctx.needs_input_grad[0]:
            dx = torch.addcmul(dy, dy, scale.to(dy.dtype))
        if ctx.needs_input_grad[1]:
            d_scale = (dy * x).reshape(-1, x.shape[-1]).sum(0, dtype=scale.dtype)
        return dx, d_scale


def in_fp64(x: Tensor) -> Tensor:
    """For small products: no global setting lowers fp64 to TF32 or bf16. MPS has none."""
    return x if x.device.type == "mps" else x.double()


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for Gram matrices, solves, angles and norms: fp32, or fp64 where that came in."""
    return torch.promote_types(dtype, torch.float32)


def unsharded_copy(module: Any, make: Callable[[Tensor], Tensor] | None = None) -> Any:
    """A twin with whole parameters, that ``make`` makes or without values; no engine hooks it."""
    make = make or (lambda p: torch.empty(full_shape(p), dtype=p.dtype))
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = {**module.__dict__, "_forward_hooks": {}, "_forward_pre_hooks": {}}
    own, children = module._parameters.items(), module._modules.items()
    twin._parameters = {k: p if p is None else nn.Parameter(make(p), False) for k, p in own}
    twin._modules = {k: m and unsharded_copy(m, make) for k, m in children}
    return twin


def find_method(name: str) -> type[Adapter]:
    """The method of that name. Raises UserError: there is none."""
    return registry.find_class("adapters.methods", name, "adapter", Adapter)


def adapter_config(values: dict[str, Any], saved: bool = False) -> AdapterConfig:
    """Builds a method's config from a mapping with ``name``; ``saved`` by this or older code."""
    found = find_method(str(values.get("name", ""))).Config
    return _build(found, {**(found.BEFORE if saved else {}), **values}, "adapter")


def on_meta(config: AdapterConfig, in_features: int, out_features: int, name: str = "") -> Adapter:
    """A layer's adapter without memory. Raises UserError: settings that it or no layer can take."""
    try:
        with torch.device("meta"):
            return find_method(config.name)(config, in_features, out_features, name)
    except (RuntimeError, TypeError) as error:  # torch's: sizes that no tensor can have
        raise UserError(f"adapter settings that no layer can take: {one_line(error)}") from None
