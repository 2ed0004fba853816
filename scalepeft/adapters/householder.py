"""Products of Householder reflections around a frozen layer: the mathematics of HOFT, SHOFT, HRA.

Letters: r rank (even), U (out, r), V (in, r), m (out,), Q = I - U S^-1 U^T with
S = triu(U^T U), diagonal halved (compact WY). Row form for a batch: y Q^T = y - (y U) M_U with
M_U = S^-T U^T (r, out). The Cayley transform has another S; any with S + S^T = U^T U will do.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalepeft.adapters.base import Adapter, Base, math_dtype
from scalepeft.core.errors import UserError

Inverse = Literal["exact", "neumann2"]
Form = Literal["pairs", "mean_difference", "cayley"]

MEAN_RATE = 4.0
"""R is stored divided by it: Adam's steps on R are then those of P times it."""


def wy_factor(u: Tensor, inverse: Inverse = "exact") -> Tensor:
    """Returns ``S^-T U^T`` (r, d), so that ``Q = I - U S^-1 U^T`` maps rows as ``y -> y - (y U)
    (S^-T U^T)``.

    Args:
        u: reflection vectors as columns, (d, r), of any length > 0; computed in fp32 or better.
        inverse: ``exact`` by triangular solve, or the paper's ``neumann2``: S^-1 ~ D^-1 - D^-1 A
            D^-1.
    """
    gram = u.mT @ u
    strict = torch.triu(gram, diagonal=1)
    half = torch.diagonal(gram) / 2
    if inverse == "exact":
        s = strict + torch.diag(half)
        return torch.linalg.solve_triangular(s.mT, u.mT, upper=False)
    t = torch.diag(1 / half) - strict / (half[:, None] * half)
    return t.mT @ u.mT


def cayley_factor(z: Tensor) -> Tensor:
    """Returns ``S^-T Z^T`` (r, d), ``S = Z^T Z / 2 + J``, so that ``Q = I - Z S^-1 Z^T`` is the
    Cayley transform ``(I - A)^-1 (I + A)`` of ``A = (P R^T - R P^T) / 2``.

    Args:
        z: P and R side by side, (d, r), in fp32 or better; ``J = [[0, I], [-I, 0]]`` (r, r).
    """
    r = z.shape[1]
    ones = torch.eye(r, dtype=z.dtype, device=z.device).roll(r // 2, dims=1)
    j = ones.triu() - ones.tril()
    # Never singular, so that the host need not wait for the device's word on it.
    return torch.linalg.solve_ex(z.mT @ z / 2 - j, z.mT)[0]


def columns(stored: Tensor, form: Form) -> Tensor:
    """Returns u1, ..., ur (d, r) of what is stored: themselves, or P (d, r / 2) and R / 4 side by
    side, of which the pairs are ``R + P, R - P``.
    """
    if form == "pairs":
        return stored
    p, r = stored.chunk(2, dim=1)
    return torch.stack([MEAN_RATE * r + p, MEAN_RATE * r - p], dim=2).flatten(1)


def rotation(stored: Tensor, form: Form, inverse: Inverse = "exact") -> tuple[Tensor, Tensor]:
    """Returns (U (d, r), M (r, d)) of ``Q: y -> y - (y U) M`` over rows.

    ``stored`` is as ``columns`` takes it, in fp32 or better; P and R / 4 of ``cayley`` are those of
    ``cayley_factor``. U is P and R where they are stored: in bf16 ``R + P`` would lose a small P.
    """
    if form == "pairs":
        return stored, wy_factor(stored, inverse)
    p, r = stored.chunk(2, dim=1)
    z = torch.cat([p, MEAN_RATE * r], dim=1)
    if form == "cayley":
        return z, cayley_factor(z)
    m = wy_factor(columns(stored, form))
    return z, torch.cat([m[::2] - m[1::2], m[::2] + m[1::2]])


def start_columns(d: int, rank: int, norm: float, form: Form) -> Tensor:
    """Draws orthonormal u1, u2, ... from the QR of a Gaussian, times ``norm``, and returns what
    ``form`` stores of them, (d, rank), with Q = I: (u1|u1|u2|u2|...), or P = 0 and R / 4.
    """
    q, _ = torch.linalg.qr(torch.randn(d, rank // 2, dtype=torch.float64))
    mean = (norm * q).to(torch.float32)
    if form == "pairs":
        return mean.repeat_interleave(2, dim=1)
    return torch.cat([torch.zeros_like(mean), mean / MEAN_RATE], dim=1)


def check_rank(rank: int, features: int) -> None:
    """Raise UserError for an odd rank, or where ``features`` holds no ``rank / 2`` pairs."""
    if rank % 2:
        raise UserError(
            f"adapter.rank={rank}: the start pairs equal reflections, so the rank must be"
            f" even; take {rank - 1 or 2} or {rank + 1}"
        )
    if rank // 2 > features:
        raise UserError(
            f"adapter.rank={rank}: a side of {features} channels has room for rank {2 * features}"
            " at most"
        )


class Reflected(Adapter):
    """What HOFT, SHOFT and HRA share: reflections of the input, and perhaps of the output.

    A subclass sets ``V`` (in, r) and may set ``U`` (out, r), as ``form`` stores them, and ``scale``
    = m - 1 (out,).
    """

    V: nn.Parameter
    U: nn.Parameter | None
    scale: nn.Parameter | None
    inverse: Inverse = "exact"
    form: Form = "pairs"

    def declare(self) -> None:
        """Neither U nor scale."""
        self.register_parameter("U", None)
        self.register_parameter("scale", None)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """The whole layer in one function, which saves neither ``Q_V x`` nor ``W Q_V x``."""
        factors: list[Tensor | None] = []
        for stored in (self.V, self.U):
            if stored is None:
                factors += [None, None]
                continue
            pair = rotation(stored.to(math_dtype(x.dtype)), self.form, self.inverse)
            factors += [factor.to(x.dtype) for factor in pair]
        scale = None if self.scale is None else self.scale.to(x.dtype)
        return _RotatedMatMul.apply(x, *factors, scale, base)

    def flops(self) -> int:
        """Four thin products, two a side; and the scale."""
        two_sided = self.U is not None
        thin = 4 * self.V.shape[1] * (self.in_features + self.out_features * two_sided)
        return thin + self.out_features * (self.scale is not None)

    def to_lora(self, base: Base) -> tuple[Tensor, Tensor] | None:
        """Rank r for each side: ``W' = W - N^T V^T - M_U^T U^T (W - N^T V^T)``, ``N = M_V W^T``."""
        if self.scale is not None:
            return None
        dtype = math_dtype(self.V.dtype)
        w = base.weight(dtype)
        v, m_v = rotation(self.V.detach().to(dtype), self.form, self.inverse)
        n = m_v @ w.mT
        a, b = v.mT, -n.mT
        if self.U is not None:
            u, m_u = rotation(self.U.detach().to(dtype), self.form, self.inverse)
            a = torch.cat([a, u.mT @ w - (u.mT @ n.mT) @ v.mT])
            b = torch.cat([b, -m_u.mT], dim=1)
        return a, b


class _RotatedMatMul(torch.autograd.Function):
    """``y = Q_U (m * W Q_V x)`` over rows; ``Q_U``, m or both may be absent.

    ``y0 = x W^T`` and r more rows ``N = M_V W^T`` through the same weight give ``x Q_V^T W^T = y0 -
    (x V) N`` without forming ``Q_V x``. Backward needs no y0 either: the product ``y0^T dR`` is ``W
    (x^T dR)``, r columns through the weight that is at hand. Saved are x, x V and y U: what LoRA
    saves, and (tokens, r) more. With m it is one (tokens, out) more: the gradient of m takes every
    element of ``W Q_V x``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, m_v: Tensor, u: Tensor | None, m_u: Tensor | None,
        scale: Tensor | None, base: Base,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        weight = base.weight(x.dtype)
        p, n = rows @ v, m_v @ weight.mT
        y = rows @ weight.mT
        y1 = r = None
        if scale is not None:
            y1 = y.addmm_(p, n, alpha=-1)
            y = torch.addcmul(y1, y1, scale)
        if u is not None and m_u is not None:
            r = y @ u
            if scale is None:
                r.addmm_(p, n @ u, alpha=-1)
                y.addmm_(torch.cat([p, r], dim=1), torch.cat([n, m_u]), alpha=-1)
            else:
                y.addmm_(r, m_u, alpha=-1)
        elif scale is None:
            y.addmm_(p, n, alpha=-1)
        ctx.save_for_backward(rows, p, r, y1, v, m_v, u, m_u, scale)
        ctx.base = base
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, p, r, y1, v, m_v, u, m_u, scale = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        weight = ctx.base.weight(dy.dtype)
        n = m_v @ weight.mT
        d_u = d_mu = d_scale = None
        if scale is not None:
            if u is not None:
                d_mu, dr = -(r.mT @ dy), -(dy @ m_u.mT)
                d_u = y1.mT @ dr
                d_u = torch.addcmul(d_u, d_u, scale[:, None])
                dy = torch.addmm(dy, dr, u.mT)
            d_scale = (dy * y1).sum(0)
            dy = torch.addcmul(dy, dy, scale)
        if u is None or scale is not None:
            dn, dp = -(p.mT @ dy), -(dy @ n.mT)
            d_v = rows.mT @ dp
            left, right = dp, v.mT
        else:
            # dy1 = dy + dr u^T is never formed: its products with p and n are put together.
            small = torch.cat([r, p], dim=1).mT @ dy
            thin = dy @ torch.cat([m_u, n]).mT
            rank = len(m_u)
            d_mu, dr = -small[:rank], -thin[:, :rank]
            p_dr = p.mT @ dr
            dn = -small[rank:] - p_dr @ u.mT
            dp = -thin[:, rank:] - dr @ (n @ u).mT
            left, right = torch.cat([dr, dp], dim=1), torch.cat([u.mT @ weight, v.mT])
            x_left = rows.mT @ left
            d_u, d_v = weight @ x_left[:, :rank] - n.mT @ p_dr, x_left[:, rank:]
        d_mv = dn @ weight
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(left, right).view(*grads[0].shape[:-1], -1)
        return dx, d_v, d_mv, d_u, d_mu, d_scale, None
