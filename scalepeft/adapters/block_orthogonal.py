"""Block-diagonal products over a batch: the shared mathematics of GOFT, OFT and BOFT.

Letters: n blocks of size b, d = n b channels, x (..., d), M (n, b, b). Rows are multiplied from
the right: ``(x M)[k] = x[k] M[k]`` for the k-th run of b channels.
"""

from typing import Any

import torch
from torch import Tensor


def runs(x: Tensor, b: int) -> Tensor:
    """(tokens, n b) -> (n, tokens, b), a view."""
    return x.view(len(x), -1, b).transpose(0, 1)


def less_identity(m: Tensor, dtype: torch.dtype) -> Tensor:
    """``M - I`` in a lower dtype, which keeps the cosine of a small angle where M would not."""
    return (m - torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)).to(dtype)


def plus_product(x: Tensor, m: Tensor) -> Tensor:
    """(tokens, n b) -> ``x + x M`` with M (n, b, b), in the dtype of both."""
    if torch.compiler.is_compiling():  # which cannot undo the view after a product in place
        return x + torch.bmm(runs(x, m.shape[-1]), m).transpose(0, 1).reshape(x.shape)
    y = x.clone()
    runs(y, m.shape[-1]).baddbmm_(runs(x, m.shape[-1]), m)
    return y


class _BlockProduct(torch.autograd.Function):
    """``x M`` that saves x and M alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(x, m)
        return plus_product(x, less_identity(m, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, m = ctx.saved_tensors
        dy, b = dy.contiguous(), m.shape[-1]
        dx = plus_product(dy, less_identity(m, x.dtype).mT) if ctx.needs_input_grad[0] else None
        dm = torch.bmm(runs(x, b).mT, runs(dy, b)).to(m.dtype)
        return dx, dm


def block_product(x: Tensor, m: Tensor) -> Tensor:
    """``x (..., d) -> x M`` with M (n, b, b) block-diagonal; the product in x's dtype."""
    y: Tensor = _BlockProduct.apply(x.reshape(-1, x.shape[-1]), m)
    return y.view(x.shape)


def skew_symmetric(upper: Tensor, b: int) -> Tensor:
    """(n, b (b - 1) / 2) entries above the diagonal, row by row -> (n, b, b) with K^T = -K."""
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    k = upper.new_zeros(upper.shape[0], b, b).index_put(
        (torch.arange(upper.shape[0], device=upper.device)[:, None], rows, columns), upper
    )
    return k - k.mT
