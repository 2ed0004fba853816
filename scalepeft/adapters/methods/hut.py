"""HUT: Hadamard updated transformation (arXiv 2409.13501); products with a weight made on the spot.

Letters: r rank, M_A (out, r), M_B (r, in), both start at 1 and are stored as ``a = M_A - 1`` and
``b = M_B - 1``; beta (out,) an optional shift.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, first_order, scale_shift
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HUTConfig(AdapterConfig):
    """Settings of HUT.

    Attributes:
        rank: r; must divide both dimensions of every target layer. With 1 the weight is never read.
        shift: train beta too, a bias of the layer.
    """

    name: str = "hut"
    rank: Positive = 1
    shift: bool = False


class _WeightFunction(torch.autograd.Function):
    """``x W'^T``, ``W' = change(W, *parameters)`` made in each pass: x and parameters are saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Base, change: Callable[..., Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.base, ctx.change = base, change
        return F.linear(x, change(base.weight(x.dtype), *(p.to(x.dtype) for p in parameters)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order(ctx)
        (dy,) = grads
        x, *parameters = ctx.saved_tensors
        weight = ctx.base.weight(dy.dtype)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in parameters]
            changed = ctx.change(weight, *(p.to(dy.dtype) for p in leaves))
        dx = dy @ changed.detach() if ctx.needs_input_grad[0] else None
        d_changed = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        return dx, None, None, *torch.autograd.grad(changed, leaves, d_changed)


@torch.compiler.disable  # which traces no gradient inside of a backward
def weight_product(
    x: Tensor, base: Base, change: Callable[..., Tensor], *parameters: Tensor
) -> Tensor:
    """``x (..., in) -> change(W, *parameters) x (..., out)``, all in the dtype of x."""
    if base.trained:  # a map y = W x + c with parameters of its own
        units = base(F.pad(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), (0, 0, 0, 1)))
        changed = change((units[:-1] - units[-1]).mT, *(p.to(x.dtype) for p in parameters))
        return F.linear(x, changed, units[-1])
    return _WeightFunction.apply(x, base, change, *parameters)


def sandwich(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``P_A * W * P_B``: block (p, q) of r x r is scaled by ``1 + a[:, q]`` on its rows and ``1 +
    b[p]`` on its columns.
    """
    r, (out, inp) = len(b), w.shape
    blocks = w.view(r, out // r, r, inp // r)
    blocks = torch.addcmul(blocks, blocks, a.view(r, out // r, r, 1))
    return torch.addcmul(blocks, blocks, b.view(r, 1, r, inp // r)).view(out, inp)


class HUT(Adapter):
    """``W' = P_A * W * P_B`` elementwise; ``r (in + out)`` parameters, ``+ out`` with ``shift``.

    M_A is tiled over r equal groups of columns and M_B over r equal groups of rows: rank 1 is
    ``diag(a) W diag(b)``, the literal reading of the paper (where a larger r would be inert). Only
    secondary descriptions of the formula could be consulted, so this is a choice. Raises UserError:
    the rank does not divide the layer's dimensions.
    """

    Config = HUTConfig
    paper = "arXiv 2409.13501"

    def declare(self) -> None:
        """a (out, r), b (r, in); shift (out,) where it is asked for."""
        r, inp, out = self.config.rank, self.in_features, self.out_features
        if inp % r or out % r:
            raise UserError(
                f"adapter.rank={r}: HUT tiles its vectors over {r} groups of rows and of columns,"
                f" and {r} does not divide a layer of {out} x {inp}; take a rank"
                " that divides both, such as 1, 2 or 4"
            )
        self.needs_weight = r > 1
        self.a, self.b = self.new_parameter(out, r), self.new_parameter(r, inp)
        self.shift = self.new_parameter(out) if self.config.shift else None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Rank 1 on activations, ``a * base(b * x) + beta``; otherwise through the weight."""
        if self.config.rank == 1:
            y = base(scale_shift(x, self.b[0]))
            return scale_shift(y, self.a[:, 0], self.shift)
        y = weight_product(x, base, sandwich, self.a, self.b)
        return y if self.shift is None else y + self.shift.to(y.dtype)

    def flops(self) -> int:
        """A product a channel; with rank > 1 the work is on the weight, once a batch."""
        channels = self.in_features + self.out_features if self.config.rank == 1 else 0
        return channels + (self.out_features if self.shift is not None else 0)
