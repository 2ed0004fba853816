"""HOFT: Householder orthogonal fine-tuning (arXiv 2505.16531); mathematics: householder.py."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.adapters.base import AdapterConfig
from scalepeft.adapters.householder import Form, Inverse, Reflected, check_rank, start_columns
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HOFTConfig(AdapterConfig):
    """Settings of HOFT.

    Attributes:
        rank: r, reflections on each side; even, because the start pairs equal columns.
        inverse: ``exact`` solves the triangular system, so Q is orthogonal at every step.
            ``neumann2`` is the paper's two-term series, for parity with its numbers only: it is not
            the identity at the start for rank >= 4 unless the pairs are orthogonal, and loses
            orthogonality in training.
        init_norm: length of a start column, or of R. Only its direction enters a reflection, so the
            length divides the effective learning rate; in ``cayley`` it multiplies that of P.
        form: what is trained of Q. ``pairs``: the columns u1, ..., ur, as in the paper.
            ``mean_difference``: mean R and difference P of each pair, ``u1 = R + P, u2 = R - P``,
            which Adam moves at rates of their own: R learns at four times train.lr. ``cayley``: P
            and R of ``(I - A)^-1 (I + A)``, ``A = P R^T - R P^T``, in place of reflections.
        dropout: probability of zeroing an entry of x on the way into ``x V``, in training only.
            **Choice**: the paper does not say where; the frozen layer's own x stays whole.
    """

    BEFORE: ClassVar = {"form": "pairs"}

    name: str = "hoft"
    rank: Annotated[int, Field(ge=2)] = 16
    inverse: Inverse = "exact"
    init_norm: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    form: Form = "cayley"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        """Raise UserError for the paper's series in another form than the paper's."""
        if self.inverse != "exact" and self.form != "pairs":
            what = f"form={self.form}: inverse={self.inverse} is the series of the paper's columns"
            raise UserError(f"{what}; set adapter.inverse=exact, or adapter.form=pairs")


class HOFT(Reflected):
    """``W' = Q_U W Q_V``: every singular value of W is kept; ``r (in + out)`` parameters, as LoRA.

    The bias is added after Q_U (the paper is silent): rotated, the layer would not be ``W' x + b``.
    Raises UserError: odd rank, or a rank too large for the layer.
    """

    Config = HOFTConfig
    paper = "arXiv 2505.16531"
    scaled: ClassVar[bool] = False
    """True in SHOFT: ``m`` (out,) between the rotations, stored as ``scale = m - 1``."""

    def declare(self) -> None:
        """U (out, r), V (in, r); scale (out,) in SHOFT."""
        super().declare()
        inp, out, rank = self.in_features, self.out_features, self.config.rank
        check_rank(rank, min(inp, out))
        self.inverse, self.form = self.config.inverse, self.config.form
        self.U, self.V = self.new_parameter(out, rank), self.new_parameter(inp, rank)
        if self.scaled:
            self.scale = self.new_parameter(out)

    def reset_parameters(self) -> None:
        """Sets pairs of equal, mutually orthonormal columns: Q = I in every form; m is 1."""
        super().reset_parameters()
        with torch.no_grad():
            for u in (self.U, self.V):
                assert u is not None
                u.copy_(start_columns(len(u), u.shape[1], self.config.init_norm, self.form))
