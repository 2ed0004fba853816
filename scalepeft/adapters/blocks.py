"""Block-diagonal products over a batch: the shared mathematics of GOFT, OFT and BOFT.

Letters: n blocks of size b, d = n b channels, x (..., d), M (n, b, b). Rows are multiplied from
the right: ``(x M)[k] = x[k] M[k]`` for the k-th run of b channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _runs(x: Tensor, n: int, b: int) -> Tensor:
    """(tokens, d) -> (n, tokens, b), a view where n b = d."""
    if x.shape[1] < n * b:
        x = F.pad(x, (0, n * b - x.shape[1]))
    return x.view(-1, n, b).transpose(0, 1)


def _product(x: Tensor, m: Tensor) -> Tensor:
    """(tokens, d) times block-diagonal M - I, plus x: near the identity nothing is rounded away."""
    n, b, _ = m.shape
    eye = torch.eye(b, dtype=m.dtype, device=m.device)
    y = torch.bmm(_runs(x, n, b), (m - eye).to(x.dtype)).transpose(0, 1).reshape(len(x), n * b)
    return y[:, : x.shape[1]] + x


class _BlockProduct(torch.autograd.Function):
    """``x M`` that saves x and M alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(x, m)
        return _product(x, m)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, m = ctx.saved_tensors
        n, b, _ = m.shape
        dx = _product(dy, m.mT) if ctx.needs_input_grad[0] else None
        dm = torch.bmm(_runs(x, n, b).mT, _runs(dy, n, b)).to(m.dtype)
        return dx, dm


def block_product(x: Tensor, m: Tensor) -> Tensor:
    """``x (..., d) -> x M`` with M (n, b, b) block-diagonal, n b >= d; the product in x's dtype."""
    y: Tensor = _BlockProduct.apply(x.reshape(-1, x.shape[-1]), m)
    return y.view(x.shape)


def skew_symmetric(upper: Tensor, b: int) -> Tensor:
    """(n, b (b - 1) / 2) entries above the diagonal, row by row -> (n, b, b) with K^T = -K."""
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    k = upper.new_zeros(upper.shape[0], b, b).index_put(
        (torch.arange(upper.shape[0], device=upper.device)[:, None], rows, columns), upper
    )
    return k - k.mT
