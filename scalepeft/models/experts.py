"""A mixture's experts, a projection of all as one tall frozen layer: E experts, W_e (out, in); rows
of x are sorted by expert, those of expert e are ``bounds[e] .. bounds[e + 1]``.
"""

from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from scalepeft.models import quant
from scalepeft.models.sources import Source

MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
PROJECTIONS = {"gate_up_proj", "up_proj", "down_proj"}


class ExpertLinear(nn.Linear):
    """``y_i = W_e x_i`` for the rows i of expert e; ``weight`` (E out, in) is stored, sharded and
    read by rows as a layer's. in_features and out_features are one expert's; biases stay out.
    """

    Quantized: ClassVar[type[quant.QuantLinear]]

    def __init__(self, fused: Tensor, transposed: bool) -> None:
        """Takes transformers' fused tensor (E, out, in), or (E, in, out) where ``transposed``."""
        rows = _tall(fused.detach(), transposed)
        super().__init__(rows.shape[1], len(rows), bias=False, device="meta")
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.num_experts, self.transposed = len(fused), transposed
        self.out_features = len(rows) // len(fused)

    def forward(self, x: Tensor, bounds: list[int]) -> Tensor:  # type: ignore[override]
        """X (rows, in) sorted by expert -> (rows, out)."""
        return _ExpertsMatMul.apply(x, self, bounds)

    def expert(self, number: int) -> "Expert":
        """W_e as the frozen layer of an adapter."""
        return Expert(self, number)

    def fused(self, rows: Tensor) -> Tensor:
        """Whole experts' rows of ``weight`` as transformers' fused tensor."""
        experts = rows.unflatten(0, (-1, self.out_features))
        return experts.mT if self.transposed else experts


class QuantExpertLinear(ExpertLinear, quant.QuantLinear):  # type: ignore[misc]
    """The same with ``weight`` as bytes; only ``quant.quantize`` makes one."""


ExpertLinear.Quantized = QuantExpertLinear


class TallSource(Source):
    """``weight`` of an ``ExpertLinear`` out of the fused tensor: reads whole experts, cuts."""

    def __init__(self, fused: Source, layer: ExpertLinear) -> None:
        experts, *sides = fused.shape
        inp, self.unit = sides if layer.transposed else sides[::-1]
        self.shape, self.dtype, self.where = (experts * self.unit, inp), fused.dtype, fused.where
        self.by_rows, self._fused, self._transposed = fused.by_rows, fused, layer.transposed

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first .. last``."""
        begin = first // self.unit
        rows = _tall(self._fused.rows(begin, -(-last // self.unit)), self._transposed)
        return rows[first - begin * self.unit : last - begin * self.unit]


def _tall(fused: Tensor, transposed: bool) -> Tensor:
    return (fused.mT if transposed else fused).flatten(0, 1).contiguous()


class Expert(quant.Frozen):
    """One expert of an ``ExpertLinear``: what an adapter sees as its frozen layer."""

    def __init__(self, layer: ExpertLinear, number: int) -> None:
        n = layer.out_features
        super().__init__(layer, slice(number * n, (number + 1) * n))
        self._number, self._experts = number, layer.num_experts

    def __call__(self, x: Tensor) -> Tensor:
        """``W_e x`` (rows, out) in the dtype of x."""
        bounds = [len(x) * (e > self._number) for e in range(self._experts + 1)]  # all its own
        return _ExpertsMatMul.apply(x, self._layer, bounds)


class _ExpertsMatMul(torch.autograd.Function):
    """``W_e x``; W_e is made (from bytes, if need be) in forward and in backward, never saved: a
    slice of a parameter that is saved would keep all of it gathered under ZeRO-3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ExpertLinear, bounds: list[int]) -> Tensor:
        ctx.layer, ctx.bounds = layer, bounds
        return _product(x, layer, bounds, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _product(grads[0].contiguous(), ctx.layer, ctx.bounds, backward=True), None, None


def _product(x: Tensor, layer: ExpertLinear, bounds: list[int], backward: bool) -> Tensor:
    """``x W_e^T`` or, in backward, ``x W_e``."""
    hit = [(e, *span) for e, span in enumerate(pairwise(bounds)) if span[0] < span[1]]
    if len(hit) > 1 and x.dtype == layer.weight.dtype == torch.bfloat16:  # plain: one kernel
        from transformers.integrations.moe import _grouped_mm

        w = layer.weight.detach().view(layer.num_experts, layer.out_features, layer.in_features)
        ends = torch.tensor(bounds[1:], dtype=torch.int32, device=x.device)
        return _grouped_mm(x, w if backward else w.mT, ends)
    y = x.new_empty(len(x), layer.in_features if backward else layer.out_features)
    for e, first, last in hit:
        w = layer.expert(e).weight(x.dtype)
        torch.mm(x[first:last], w if backward else w.mT, out=y[first:last])
    return y


def _bounds(ids: Tensor, experts: int) -> list[int]:
    """Where each expert's rows begin and the last one's end, in sorted ``ids``."""
    if isinstance(ids, FakeTensor):  # a plan's, without values: as if tokens were dealt evenly
        return [len(ids) * e // experts for e in range(experts + 1)]
    edges = torch.arange(experts + 1, device=ids.device, dtype=ids.dtype)
    return torch.searchsorted(ids, edges).tolist()  # the one wait for the device


class Experts(nn.Module):
    """Mixin of transformers' experts modules: their forward over ``ExpertLinear`` projections."""

    @torch.compiler.disable  # the numbers of tokens of experts would each be a graph
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``sum over k of weight_k * expert_k(x)`` of hidden_states (tokens, hidden); top_k_index,
        past the last expert none, and top_k_weights are (tokens, k).
        """
        own: Any = self  # the class's marks, gate, activation and norm
        tokens, k = top_k_index.shape
        ids, order = top_k_index.reshape(-1).sort(stable=True)
        bounds = _bounds(ids, own.num_experts)
        ids, order = ids[: bounds[-1]], order[: bounds[-1]]
        # Not hidden_states[order // k]: its gradient adds to a token in any order on a GPU.
        x = hidden_states[:, None].expand(-1, k, -1).reshape(tokens * k, -1).index_select(0, order)

        def project(name: str, x: Tensor) -> Tensor:
            y: Tensor = getattr(own, name)(x, bounds)
            return y + getattr(own, f"{name}_bias")[ids].to(y.dtype) if own.has_bias else y

        if own.has_gate:
            y = own._apply_gate(project("gate_up_proj", x))
        else:
            y = own.act_fn(project("up_proj", x))
        y = project("down_proj", y)
        if own.has_post_expert_norm:
            y = own.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1).index_select(0, order)[:, None]
        y = y.new_zeros(tokens * k, y.shape[-1]).index_copy(0, order, y)
        return y.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


class DenseExperts(nn.Module):
    """Mixin of Llama 4's, which take every token, scaled by its score, for each expert."""

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (E tokens, hidden), expert by expert."""
        own: Any = self
        bounds = [len(hidden_states) // own.num_experts * e for e in range(own.num_experts + 1)]
        gate, up = own.gate_up_proj(hidden_states, bounds).chunk(2, dim=-1)
        return own.down_proj(up * own.act_fn(gate), bounds)


@cache
def _mixed(mixin: Any, base: Any) -> Any:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


def mix_in(module: Any, mixin: Any) -> None:
    """Puts a mixin before the class of a module, in place."""
    base: Any = type(module)
    module.__class__ = _mixed(mixin, base)


def replace_experts(model: nn.Module) -> list[str]:
    """Makes each fused expert tensor an ``ExpertLinear`` of its name, in place, by transformers'
    own marks. Returns the classes whose 3-d weights, of another layout, stay plain and frozen.
    """
    others: set[str] = set()
    for module in list(model.modules()):
        fused = {k: p for k, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if not fused or isinstance(module, nn.modules.conv._ConvNd):
            continue
        marked = all(hasattr(module, mark) for mark in MARKS) and not fused.keys() - PROJECTIONS
        dense = type(module).__name__ == "Llama4TextExperts"  # which has no marks
        if not marked and not dense:
            others.add(type(module).__name__)
            continue
        for name, parameter in fused.items():
            delattr(module, name)
            setattr(module, name, ExpertLinear(parameter, dense or bool(module.is_transposed)))
        mix_in(module, DenseExperts if dense else Experts)
    return sorted(others)
