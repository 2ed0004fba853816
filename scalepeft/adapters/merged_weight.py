"""What an adapted layer amounts to: its weight and bias, measured and not derived."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from scalepeft.adapters.base import Scale, math_dtype
from scalepeft.adapters.experts import Stacked
from scalepeft.adapters.inject import Adapted
from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.models.experts import ExpertLinear

ROWS = 1024  # of the identity that a layer maps at one time


@torch.no_grad()
def effective_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns ``(W', b')`` in fp32 (fp64 for an fp64 layer), so that the layer equals ``W' x +
    b'``; of experts all of them, (E out, in) and (E out,). b' is None where the layer has no bias
    and the method adds none. Raises UserError: no adapter, or its method is not affine in x.
    """
    if not isinstance(layer, Adapted):
        raise UserError(f"{type(layer).__name__} has no adapter; call adapt() or inject() first")
    check_mergeable(layer)
    w = layer.weight
    like = torch.empty(0, layer.in_features, dtype=math_dtype(w.dtype), device=w.device)
    parts = [affine(apply, like, [layer.adapter]) for apply in _maps(layer)]
    weight, bias = (torch.cat(part) for part in zip(*parts, strict=True))
    has_bias = layer.bias is not None or bool(bias.any())
    return weight, bias if has_bias else None


def affine(
    apply: Callable[[Tensor], Tensor], like: Tensor, adapters: Sequence[nn.Module]
) -> tuple[Tensor, Tensor]:
    """``(W', b')`` of ``apply(x) = W' x + b'`` over rows x (..., in), ``like`` (0, in) in dtype and
    device: the image of zero, and those of the identity, ``ROWS`` at a time. The ``adapters``
    are in eval mode for it, without dropout, and not their base: that stays as it is.
    """
    were = [adapter.training for adapter in adapters]
    for adapter in adapters:
        adapter.eval()
    zero = apply(like.new_zeros(1, like.shape[1]))[0]
    weight = zero.new_empty(len(zero), like.shape[1])
    for first in range(0, like.shape[1], ROWS):
        rows = min(ROWS, like.shape[1] - first)
        x = like.new_zeros(rows, like.shape[1])
        x[torch.arange(rows), first + torch.arange(rows)] = 1
        weight[:, first : first + rows] = (apply(x) - zero).T
    for adapter, training in zip(adapters, were, strict=True):
        adapter.train(training)
    return weight, zero


@torch.no_grad()
def merged(layer: Adapted) -> Tensor:
    """W' of ``effective_weight`` to rounding: as ``W + B A`` where a method is exactly a LoRA."""
    base = quant.Frozen(layer)
    lora = layer.adapter.to_lora(base)
    if lora is None:
        return effective_weight(layer)[0]
    w = base.weight(math_dtype(layer.weight.dtype))
    a, b = (factor.to(w.dtype) for factor in lora)
    return torch.addmm(w, b, a)


def check_mergeable(layer: Adapted) -> None:
    """Raises UserError, with the reason, if the layer's method is not affine in x."""
    if reason := layer.adapter.unmergeable_reason:
        raise UserError(f"{type(layer.adapter).__name__} cannot merge: {reason}; keep the adapter")


@torch.no_grad()
def effective_bias(layer: Adapted) -> Tensor:
    """What the layer makes of zero, (out,); of experts (E out,)."""
    w = layer.weight
    x = torch.zeros(1, layer.in_features, dtype=math_dtype(w.dtype), device=w.device)
    return torch.cat([apply(x)[0] for apply in _maps(layer)])


def _maps(layer: Adapted) -> list[Callable[[Tensor], Tensor]]:
    """The layer, or each of its experts, as a function of x (rows, in)."""
    if isinstance(layer, ExpertLinear) and isinstance(layer.adapter, Stacked):
        each = enumerate(layer.adapter.each())
        return [partial(adapter.forward, base=layer.expert(e)) for e, adapter in each]
    return [layer.forward]  # no hooks: a stream's would let go of W


@torch.no_grad()
def adds_bias(layer: Adapted) -> bool:
    """True if the adapter makes something of zero; W is not needed to know, and not read."""
    device = next(layer.adapter.parameters()).device
    ones = layer.adapter.each() if isinstance(layer.adapter, Stacked) else [layer.adapter]
    any_weight = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    with device:
        row = torch.cos(1 + torch.arange(layer.in_features, dtype=torch.float32))
        any_weight.weight = nn.Parameter(row.expand(layer.out_features, -1))
        x, base = torch.zeros(1, layer.in_features), quant.Frozen(any_weight)
        return any(bool(adapter.forward(x, base).any()) for adapter in ones)


@torch.no_grad()
def merged_norm(
    name: str, norm: nn.Module, scales: Sequence[Scale], forward: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """``weight (1 + scale)`` and ``bias (1 + scale) + shift`` of a norm (its bare ``forward``) with
    ``scales``. Raises UserError: it does not multiply by its weight (Gemma's: by 1 + weight).
    """
    original, dtype = dict(norm._parameters), math_dtype(scales[0].scale.dtype)
    merged = {k: p.to(dtype) for k, p in original.items() if p is not None}
    norm._parameters.update({k: nn.Parameter(p, requires_grad=False) for k, p in merged.items()})
    n, device = scales[0].scale.numel(), scales[0].scale.device
    x = torch.linspace(-3, 3, n, device=device, dtype=dtype)[None]
    wanted = forward(x)
    for adapter in scales:
        merged = {k: p * (1 + adapter.scale.to(dtype)) for k, p in merged.items()}
        if adapter.shift is not None:
            merged["bias"] = merged["bias"] + adapter.shift
        wanted = adapter.transform_output(wanted)
    norm._parameters.update({k: nn.Parameter(p, requires_grad=False) for k, p in merged.items()})
    got = forward(x)
    norm._parameters.update(original)
    if (got - wanted).abs().max() > 1e-5 * wanted.abs().max():
        raise UserError(
            f"{name}: {forward.__qualname__.partition('.')[0]} does not multiply by its weight, so"
            " that a trained scale cannot merge; keep the adapter"
        )
    return merged
