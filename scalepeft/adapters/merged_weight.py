"""What an adapted layer amounts to: its weight and bias, measured and not derived."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scalepeft.adapters.experts import Stacked
from scalepeft.adapters.inject import Adapted, AdaptedNorm
from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.models.experts import ExpertLinear


@torch.no_grad()
def effective_weight(layer: nn.Module, chunk: int = 1024) -> tuple[Tensor, Tensor | None]:
    """Returns ``(W', b')`` in fp32 (fp64 for an fp64 layer), so that the layer equals ``W' x +
    b'``; of experts all of them, (E out, in) and (E out,).

    One rule for every method: push zero through the layer for b', then the identity, ``chunk`` rows
    at a time, for the columns of W'. b' is None where the layer has no bias and the method adds
    none.

    Raises:
        UserError: the layer has no adapter, or its method is not affine in x.
    """
    if not isinstance(layer, Adapted):
        raise UserError(f"{type(layer).__name__} has no adapter; call adapt() or inject() first")
    check_mergeable(layer)
    was_training = layer.adapter.training  # and not the base's: that stays as it is
    layer.adapter.eval()
    zero = effective_bias(layer)
    weight = zero.new_empty(len(zero), layer.in_features)
    parts = zip(
        _maps(layer), zero.split(layer.out_features), weight.split(layer.out_features), strict=True
    )
    for apply, bias, w in parts:
        for first in range(0, layer.in_features, chunk):
            rows = min(chunk, layer.in_features - first)
            x = zero.new_zeros(rows, layer.in_features)
            x[torch.arange(rows), first + torch.arange(rows)] = 1
            w[:, first : first + rows] = (apply(x) - bias).T
    layer.adapter.train(was_training)
    has_bias = layer.bias is not None or bool(zero.any())
    return weight, zero if has_bias else None


@torch.no_grad()
def merged(layer: Adapted) -> Tensor:
    """W' of ``effective_weight`` to rounding: as ``W + B A`` where a method is exactly a LoRA."""
    base, wide = quant.Frozen(layer), layer.weight.dtype == torch.float64
    lora = layer.adapter.to_lora(base)
    if lora is None:
        return effective_weight(layer)[0]
    w = base.weight(torch.float64 if wide else torch.float32)
    a, b = (factor.to(w.dtype) for factor in lora)
    return torch.addmm(w, b, a)


def check_mergeable(layer: Adapted) -> None:
    """Raises UserError, with the reason, if the layer's method is not affine in x."""
    if reason := layer.adapter.unmergeable_reason:
        raise UserError(f"{type(layer.adapter).__name__} cannot merge: {reason}; keep the adapter")


@torch.no_grad()
def effective_bias(layer: Adapted) -> Tensor:
    """What the layer makes of zero, (out,); of experts (E out,)."""
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    x = torch.zeros(1, layer.in_features, dtype=dtype, device=layer.weight.device)
    return torch.cat([apply(x)[0] for apply in _maps(layer)])


def _maps(layer: Adapted) -> list[Callable[[Tensor], Tensor]]:
    """The layer, or each of its experts, as a function of x (rows, in)."""
    if isinstance(layer, ExpertLinear):
        n = layer.num_experts
        return [
            lambda x, e=e: layer.forward(x, [len(x) * (i > e) for i in range(n + 1)])
            for e in range(n)
        ]
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
def norm_parameter(name: str, norm: AdaptedNorm, key: str) -> Tensor:
    """``weight (1 + scale)`` or ``bias (1 + scale) + shift`` of a norm with a trained scale. Raises
    UserError: the norm does not multiply by its weight (Gemma's multiplies by 1 + weight).
    """
    scale, shift = norm.adapter.scale, norm.adapter.shift
    merged = {k: p * (1 + scale) for k, p in norm.named_parameters(recurse=False)}
    if shift is not None:
        merged["bias"] = merged["bias"] + shift
    x = torch.linspace(-3, 3, scale.numel(), device=scale.device)[None]
    wanted, original = norm(x), dict(norm._parameters)
    norm._parameters.update({k: nn.Parameter(p, requires_grad=False) for k, p in merged.items()})
    got = super(AdaptedNorm, norm).forward(x)  # the norm without its adapter
    norm._parameters.update(original)
    if (got - wanted).abs().max() > 1e-5 * wanted.abs().max():
        raise UserError(
            f"{name}: {type(norm).__mro__[2].__name__} does not multiply by its weight, so that a"
            " trained scale cannot merge; keep the adapter"
        )
    return merged[key]
