"""Householder reflections, or Cayley rotations, around a frozen layer: HOFT, SHOFT and HRA.

Letters: r rank (even), U (out, r), V (in, r), m (out,), Q = I - U S^-1 U^T with
S = triu(U^T U), diagonal halved (compact WY). Row form for a batch: y Q^T = y + (y U) K U^T with
K = -S^-T (r, r).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalepeft.adapters.base import Adapter, Base, Dropout, first_order, in_fp64, math_dtype
from scalepeft.core.errors import UserError

Inverse = Literal["exact", "neumann2"]
Form = Literal["pairs", "mean_difference", "cayley"]

MEAN_RATE = 4.0  # R is stored divided by it: Adam's steps on R are then those of P times it
FUSED_FROM = 100
"""Tokens for each of r from which four products with W of r columns add less than 2 % to those of
the frozen layer, and a kept (tokens, out) would be too much."""


def columns(stored: Tensor, form: Form) -> Tensor:
    """u1, ..., ur (..., d, r) of what is stored: they, or P (..., d, r / 2) and R / 4 beside it."""
    if form == "pairs":
        return stored
    p, r = stored.chunk(2, dim=-1)
    return torch.stack([MEAN_RATE * r + p, MEAN_RATE * r - p], dim=-1).flatten(-2)


def core(z: Tensor, form: Form, inverse: Inverse = "exact") -> Tensor:
    """K (..., r, r) of ``Q: y -> y + (y Z) K Z^T`` over rows, of z (..., d, r) in fp32 or better.

    ``pairs``: Z is U itself, of any lengths > 0. ``mean_difference``: ``U = Z C``, C as in
    ``columns``, so ``K = C K_U C^T``; Z is what rows are multiplied with, as in bf16 ``R + P``
    would lose a small P. Inverse by a solve, or ``neumann2``: S^-1 ~ D^-1 - D^-1 A D^-1.
    ``cayley``: ``(I - A)^-1 (I + A)``, ``A = P R^T - R P^T = Z J Z^T``, ``K = 2 (J - Z^T Z)^-1``.
    """
    wide = in_fp64(z)
    gram, eye = wide.mT @ wide, torch.eye(z.shape[-1], dtype=wide.dtype, device=z.device)
    if form == "cayley":  # never singular, so that the host need not wait to hear of it
        j = eye.roll(z.shape[-1] // 2, dims=-1) / MEAN_RATE
        return 2 * torch.linalg.inv_ex(j.triu() - j.tril() - gram)[0].to(z.dtype)
    c = columns(eye, form)
    if form != "pairs":
        gram = c.mT @ gram @ c
    strict, half = torch.triu(gram, diagonal=1), torch.diagonal(gram, dim1=-2, dim2=-1) / 2
    if inverse == "exact":
        s = strict + torch.diag_embed(half)
        k = torch.linalg.solve_triangular(s.mT, -eye.expand_as(s), upper=False)
    else:
        k = (strict / (half[..., :, None] * half[..., None, :]) - torch.diag_embed(1 / half)).mT
    return (k if form == "pairs" else c @ k @ c.mT).to(z.dtype)


def start_columns(d: int, rank: int, norm: float, form: Form) -> Tensor:
    """What ``form`` stores, (d, rank), of orthonormal u1, u2, ... (a Gaussian's QR) times ``norm``:
    (u1|u1|u2|u2|...), or P = 0 and R / 4, so that Q = I.
    """
    q, _ = torch.linalg.qr(torch.randn(d, rank // 2, dtype=torch.float64))
    mean = (norm * q).to(torch.float32)
    if form == "pairs":
        return mean.repeat_interleave(2, dim=1)
    return torch.cat([torch.zeros_like(mean), mean / MEAN_RATE], dim=1)


def check_rank(rank: int, features: int) -> None:
    """Raise UserError for an odd rank, or where ``features`` holds no ``rank / 2`` pairs."""
    if rank % 2:
        what = "the start pairs equal reflections, so the rank must be even"
        raise UserError(f"adapter.rank={rank}: {what}; take {rank - 1 or 2} or {rank + 1}")
    if rank // 2 > features:
        what = f"a side of {features} channels has room for rank {2 * features} at most"
        raise UserError(f"adapter.rank={rank}: {what}")


class Reflected(Adapter):
    """Reflections of the input by ``V`` (in, r), perhaps of the output by ``U`` (out, r), both as
    ``form`` has them; perhaps a ``scale`` (out,) = m - 1.
    """

    V: nn.Parameter
    U: nn.Parameter | None
    scale: nn.Parameter | None
    inverse: Inverse = "exact"
    form: Form = "pairs"

    def declare(self) -> None:
        """Neither U nor scale."""
        p, name = self.config.dropout, self.layer_name
        self.dropout = Dropout(p, name) if p else nn.Identity()
        self.register_parameter("U", None)
        self.register_parameter("scale", None)

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """K of V and of U, (..., r, r) each."""
        stored = [parameters[key] for key in ("V", "U") if key in parameters]
        return tuple(core(z, self.form, self.inverse) for z in stored)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """``Q_V``, W, m and ``Q_U`` one after another, or all in one function.

        One keeps ``W Q_V x`` for the gradient of U, the other takes four more products of r columns
        with W instead, which gets no gradient: what is cheaper, by the number of tokens alone.
        """
        k, v, left = self.get_factors(x.dtype), self.V.to(x.dtype), self.dropout(x)
        u, tokens = self.U, x.numel() // max(1, x.shape[-1])
        alone = left is x and self.scale is None and not base.trained
        if u is not None and alone and tokens >= FUSED_FROM * v.shape[1]:
            return _Fused.apply(x, v, k[0], u.to(x.dtype), k[1], base)
        y = base(_Rotate.apply(x, v, k[0], None) if left is x else x + left @ v @ k[0] @ v.mT)
        return y if u is None else _Rotate.apply(y, u.to(x.dtype), k[1], self.scale)

    def flops(self) -> int:
        """Four thin products, two a side; and the scale."""
        two_sided = self.U is not None
        thin = 4 * self.V.shape[1] * (self.in_features + self.out_features * two_sided)
        return thin + self.out_features * (self.scale is not None)

    def rotations(self) -> list[tuple[int, Callable[[Tensor], Tensor]]]:
        """Q_V and Q_U."""
        sides: Any = zip((self.V, self.U), self.get_factors(self.V.dtype), strict=False)
        return [(len(z), lambda x, z=z, k=k: _Rotate.apply(x, z, k, None)) for z, k in sides]  # type: ignore[misc]

    def to_lora(self, base: Base) -> tuple[Tensor, Tensor] | None:
        """Rank r for each side: ``W' = (I + U K_U^T U^T) W (I + V K_V^T V^T)``."""
        if self.scale is not None:
            return None
        dtype = math_dtype(self.V.dtype)
        k, v, w = self.get_factors(dtype), self.V.detach().to(dtype), base.weight(dtype)
        a, b = v.mT, w @ v @ k[0].detach().mT
        if self.U is not None:
            u = self.U.detach().to(dtype)
            a = torch.cat([a, u.mT @ w + (u.mT @ b) @ v.mT])
            b = torch.cat([b, u @ k[1].detach().mT], dim=1)
        return a, b


class _Rotate(torch.autograd.Function):
    """``x1 + (x1 Z) K Z^T`` over rows, ``x1 = (1 + scale) x``. Saves x and ``x1 Z`` (tokens, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, k: Tensor, scale: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = None if scale is None else scale.to(x.dtype)
        scaled = rows if scale is None else torch.addcmul(rows, rows, scale)
        p = scaled @ z
        ctx.save_for_backward(rows, p, z, k, scale)
        return torch.addmm(scaled, p @ k, z.mT).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order(ctx)
        rows, p, z, k, scale = ctx.saved_tensors
        dy = grads[0].reshape(rows.shape)
        scaled = rows if scale is None else torch.addcmul(rows, rows, scale)
        d_pk = dy @ z
        d_p, d_k = d_pk @ k.mT, p.mT @ d_pk
        d_z = torch.addmm(dy.mT @ (p @ k), scaled.mT, d_p)
        dx, d_scale = torch.addmm(dy, d_p, z.mT), None
        if scale is not None:
            d_scale = (dx * rows).sum(0, dtype=math_dtype(dx.dtype))
            dx = torch.addcmul(dx, dx, scale)
        return dx.view(grads[0].shape), d_z, d_k, d_scale


class _Fused(torch.autograd.Function):
    """``x Q_V^T W^T Q_U^T`` with neither ``Q_V x`` nor ``y1 = W Q_V x`` formed or saved.

    ``y1 = x W^T + p K_V N^T`` with ``p = x V, N = W V``, and where backward needs y1, ``y1^T dr = W
    (x^T dr) + N (K_V^T p^T dr)``: r columns through the weight that is at hand. Saved are x, p and
    ``y1 U``: what LoRA saves, and (tokens, r) more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, k_v: Tensor, u: Tensor, k_u: Tensor, base: Base
    ) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]), base.weight(x.dtype)
        n, p, y = weight @ v, rows @ v, rows @ weight.mT
        q = p @ k_v
        r = (y @ u).addmm_(q, n.mT @ u)
        y.addmm_(torch.cat([q, r @ k_u], dim=1), torch.cat([n, u], dim=1).mT)
        ctx.save_for_backward(rows, p, r, n, v, k_v, u, k_u)
        ctx.base = base
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order(ctx)
        rows, p, r, n, v, k_v, u, k_u = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        weight, rank, q = ctx.base.weight(dy.dtype), u.shape[1], p @ k_v
        # dy1 = dy + dr U^T is never formed: its products with n and q are put together.
        d_rk, dy_n = (dy @ torch.cat([u, n], dim=1)).split(rank, dim=1)
        d_u, d_n = (dy.mT @ torch.cat([r @ k_u, q], dim=1)).split(rank, dim=1)
        dr, d_ku = d_rk @ k_u.mT, r.mT @ d_rk
        q_dr = q.mT @ dr
        dq, d_n = torch.addmm(dy_n, dr, u.mT @ n), torch.addmm(d_n, u, q_dr.mT)
        d_kv = p.mT @ dq
        left = torch.cat([dr, dq @ k_v.mT], dim=1)
        x_left = rows.mT @ left
        d_u = torch.addmm(d_u, weight, x_left[:, :rank]).addmm_(n, q_dr)
        through = weight.mT @ torch.cat([u, d_n], dim=1)
        d_v = x_left[:, rank:] + through[:, rank:]
        dx = None
        if ctx.needs_input_grad[0]:
            right = torch.cat([through[:, :rank], v], dim=1).mT
            dx = (dy @ weight).addmm_(left, right).view(*grads[0].shape[:-1], -1)
        return dx, d_v, d_kv, d_u, d_ku, None
