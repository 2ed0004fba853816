"""Block-diagonal products over a batch: the shared mathematics of GOFT, OFT and BOFT.

Letters: n blocks of size b, d = n b channels, x (..., d), M (n, b, b). Rows are multiplied from
the right: ``(x M)[k] = x[k] M[k]`` for the k-th run of b channels.
"""

from typing import Any

import torch
from torch import Tensor


def runs(x: Tensor, b: int) -> Tensor:
    """(tokens, n b) -> (n, tokens, b), a view."""
    return x.unflatten(1, (-1, b)).transpose(0, 1)


def less_identity(m: Tensor) -> Tensor:
    """``M - I``, which keeps the cosine of a small angle in a lower dtype where M would not."""
    return m - torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)


def plus_product(x: Tensor, m: Tensor) -> Tensor:
    """(tokens, n b) -> ``x + x M`` with M (n, b, b), in the dtype of both."""
    if torch.compiler.is_compiling():  # which cannot undo the view after a product in place
        return x + torch.bmm(runs(x, m.shape[-1]), m).transpose(0, 1).reshape(x.shape)
    y = x.clone()
    runs(y, m.shape[-1]).baddbmm_(runs(x, m.shape[-1]), m)
    return y


class _BlockProduct(torch.autograd.Function):
    """``x + x M`` that saves x and M alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(x, m)
        return plus_product(x, m)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, m = ctx.saved_tensors
        dy, b = dy.contiguous(), m.shape[-1]
        dx = plus_product(dy, m.mT) if ctx.needs_input_grad[0] else None
        return dx, torch.bmm(runs(x, b).mT, runs(dy, b))


def block_product(x: Tensor, m: Tensor) -> Tensor:
    """``x (..., d) -> x + x M`` with M (n, b, b) block-diagonal, in the dtype of both."""
    return _BlockProduct.apply(x.reshape(-1, x.shape[-1]), m).view(x.shape)


def skew_symmetric(upper: Tensor, b: int) -> Tensor:
    """(..., b (b - 1) / 2) entries above the diagonal, by row -> (..., b, b) with K^T = -K."""
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    at = rows * b + columns
    k = upper.new_zeros(*upper.shape[:-1], b * b).index_copy(-1, at, upper).unflatten(-1, (b, b))
    return k - k.mT
