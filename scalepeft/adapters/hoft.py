"""HOFT: Householder orthogonal fine-tuning (arXiv 2505.16531).

Letters: r rank (even), U (out, r), V (in, r), m (out,), Q = I - U S^-1 U^T with
S = triu(U^T U), diagonal halved (compact WY). Row form for a batch: y Q^T = y - (y U) (S^-T U^T).
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, math_dtype
from scalepeft.lookup import STRICT, UserError

Inverse = Literal["exact", "neumann2"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HOFTConfig(AdapterConfig):
    """Settings of HOFT.

    Attributes:
        rank: r, the number of reflections on each side; even, because the start pairs equal
            columns.
        inverse: ``exact`` solves the triangular system, so Q is orthogonal at every step.
            ``neumann2`` is the paper's two-term series, for parity with its numbers only: it is not
            the identity at the start for rank >= 4 unless the pairs are orthogonal, and loses
            orthogonality in training.
        init_norm: length of a start column. Only its direction enters Q, so the length divides the
            effective learning rate.
    """

    name: str = "hoft"
    rank: Annotated[int, Field(ge=2)] = 16
    inverse: Inverse = "exact"
    init_norm: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0


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


def reflect_rows(x: Tensor, u: Tensor, inverse: Inverse = "exact") -> Tensor:
    """Applies Q to every row: ``x (..., d) -> Q x``, i.e. ``x - (x U) (S^-T U^T)`` with thin
    products.

    U, the Gram matrix and the solve stay in fp32 (or fp64); the two products over the batch run in
    the dtype of x. ``Q = H(u1) H(u2) ... H(ur)`` with ``H(u) = I - 2 u u^T / |u|^2``.
    """
    u = u.to(math_dtype(x.dtype))
    factor = wy_factor(u, inverse).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    return torch.addmm(rows, rows @ u.to(x.dtype), factor, alpha=-1).view(x.shape)


def paired_columns(d: int, rank: int, norm: float) -> Tensor:
    """Draws (u1|u1|u2|u2|...) with orthonormal u1, u2, ... from the QR of a Gaussian, times
    ``norm``: Q = I.
    """
    q, _ = torch.linalg.qr(torch.randn(d, rank // 2, dtype=torch.float64))
    return (norm * q).repeat_interleave(2, dim=1).to(torch.float32)


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Refuses an odd rank and one that has no ``rank / 2`` orthonormal pairs in the smaller
    dimension.
    """
    if rank % 2:
        raise UserError(
            f"adapter.rank={rank}: HOFT starts from pairs of equal reflections, so the rank must be"
            f" even; take {rank - 1 or 2} or {rank + 1}"
        )
    if rank // 2 > min(in_features, out_features):
        raise UserError(
            f"adapter.rank={rank}: a layer of {out_features} x {in_features} has room for rank "
            f"{2 * min(in_features, out_features)} at most"
        )


class HOFT(Adapter):
    """``W' = Q_U W Q_V``; U (out, r), V (in, r), r even; ``r (in + out)`` parameters, as LoRA of
    rank r.

    Every singular value of W is kept. The bias is added after Q_U (the paper is silent): rotating
    it would make the layer differ from ``W' x + b``. Paper: arXiv 2505.16531.

    Raises:
        UserError: odd rank, or a rank too large for the layer.
    """

    Config = HOFTConfig
    scaled: ClassVar[bool] = False
    """True in SHOFT: ``m`` (out,) between the rotations, stored as ``scale = m - 1``."""

    def __init__(self, config: HOFTConfig, in_features: int, out_features: int) -> None:
        check_rank(config.rank, in_features, out_features)
        super().__init__(config, in_features, out_features)
        self.inverse: Inverse = config.inverse
        self.init_norm = config.init_norm
        self.U = nn.Parameter(torch.empty(out_features, config.rank, dtype=torch.float32))
        self.V = nn.Parameter(torch.empty(in_features, config.rank, dtype=torch.float32))
        self.scale = (
            nn.Parameter(torch.empty(out_features, dtype=torch.float32)) if self.scaled else None
        )

    def reset_parameters(self) -> None:
        """Sets pairs of equal, mutually orthonormal columns (Q = I under both inverses) and m - 1 =
        0.
        """
        with torch.no_grad():
            self.U.copy_(paired_columns(self.out_features, self.U.shape[1], self.init_norm))
            self.V.copy_(paired_columns(self.in_features, self.V.shape[1], self.init_norm))
            if self.scale is not None:
                self.scale.zero_()

    def transform_input(self, x: Tensor) -> Tensor:
        """``Q_V x``."""
        return reflect_rows(x, self.V, self.inverse)

    def transform_output(self, y: Tensor) -> Tensor:
        """``Q_U (m * y)``."""
        if self.scale is not None:
            y = y + y * self.scale.to(y.dtype)
        return reflect_rows(y, self.U, self.inverse)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """The whole layer at once, so that backward needs neither ``Q_V x`` nor ``W Q_V x``.

        SHOFT goes through the hooks: the gradient of m takes every element of ``W Q_V x``.
        """
        if self.scale is not None:
            return super().forward(x, base)
        factors = []
        for columns in (self.U, self.V):
            u = columns.to(math_dtype(x.dtype))
            factors += [u.to(x.dtype), wy_factor(u, self.inverse).to(x.dtype)]
        y: Tensor = _RotatedMatMul.apply(x, *factors, base)
        return y


class _RotatedMatMul(torch.autograd.Function):
    """``y = Q_U W Q_V x`` over rows, saving x, x V and y0 U: what LoRA saves, and (tokens, r) more.

    With ``P = x V``, ``x1 = x - P M_V``, ``y0 = x1 W^T``, ``R = y0 U``, ``y = y0 - R M_U``, the one
    product in backward that seems to need y0 (tokens, out) is ``y0^T dR = W (dR^T x1)^T``: r rows
    through the weight that backward has at hand anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, m_u: Tensor, v: Tensor, m_v: Tensor, base: Base
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        p = rows @ v
        y = base(torch.addmm(rows, p, m_v, alpha=-1))
        r = y @ u
        ctx.save_for_backward(rows, p, r, u, m_u, v, m_v)
        ctx.base = base
        return y.addmm_(r, m_u, alpha=-1).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, p, r, u, m_u, v, m_v = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        d_mu = -(r.mT @ dy)
        dr = -(dy @ m_u.mT)
        weight = ctx.base.weight(dy.dtype)
        d_u = weight @ (dr.mT @ rows - (dr.mT @ p) @ m_v).mT
        dx = torch.addmm(dy, dr, u.mT) @ weight  # of x1
        d_mv = -(p.mT @ dx)
        dp = -(dx @ m_v.mT)
        d_v = rows.mT @ dp
        if not ctx.needs_input_grad[0]:
            return None, d_u, d_mu, d_v, d_mv, None
        dx = dx.addmm_(dp, v.mT).view(*grads[0].shape[:-1], -1)
        return dx, d_u, d_mu, d_v, d_mv, None
