"""GOFT: parameter-efficient orthogonal fine-tuning by Givens rotations (arXiv 2404.04316).

Letters: d = in, R (d, d) = P_L ... P_2 P_1 with L = ceil(log2 d), rows of a batch map as x -> x R.
Round k rotates the pairs (0, s), (2s, 3s), ... with s = 2^(k-1): of each pair the first survives to
the next round, an odd survivor is carried. That makes d - 1 rotations for every d.

Rounds 1 to 6 act inside runs of 64 channels: one block-diagonal M1 (d / 64, 64, 64). All later ones
touch channels 0, 64, 128, ... alone: one M2 (d / 64, d / 64). ``x R`` is M2 on those channels, then
M1. Where 64 does not divide d the missing rotations are the identity.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from scalepeft.adapters.base import Adapter, AdapterConfig, scale_shift
from scalepeft.adapters.block_orthogonal import less_identity, plus_product, runs
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Targets

RUN = 64


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GOFTConfig(AdapterConfig):
    """Settings of GOFT.

    Attributes:
        scale: train a factor for every rotated channel too (d more parameters, start 1).
    """

    name: str = "goft"
    target_modules: Targets = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"])
    scale: bool = False


def rotation_rounds(d: int) -> list[int]:
    """Number of rotations in each round; they sum to d - 1."""
    strides = (1 << k for k in range((d - 1).bit_length()))
    return [len(range(0, d - s, 2 * s)) for s in strides]


def _tree(levels: list[Tensor]) -> Tensor:
    """Composes rounds into matrices: ``levels[k]`` (batch, 2^(K-k-1), 2, 2) -> (batch, 2^K, 2^K).

    Round k mixes the rows of its pairs' first channels, and such a row is non-zero only over its
    own run of channels. So a level is one product: the upper row goes on, the lower one is final.
    """
    batch, size = levels[0].shape[0], 1 << len(levels)
    lead = levels[0].new_ones(batch, size, 1)
    matrix = levels[0].new_zeros(batch, size, size)
    for k, g in enumerate(levels):
        pairs, run = g.shape[1], 1 << k
        rows = g[..., None] * lead.view(batch, pairs, 1, 2, run)
        rows = rows.reshape(batch, pairs, 2, 2 * run)
        lead = rows[:, :, 0]
        runs = matrix.view(batch, pairs, 2 * run, pairs, 2 * run)
        torch.diagonal(runs, dim1=1, dim2=3)[:, run] = rows[:, :, 1].mT
    matrix[:, 0] = lead[:, 0]
    return matrix


def givens_matrices(g: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Blocks g (..., d - 1, 2, 2) -> M1 (..., n, 64, 64), M2 (..., n, n), n = ceil(d / 64)."""
    lead, g = g.shape[:-3], g.reshape(-1, *g.shape[-3:])
    n, layers = -(-d // RUN), len(g)
    short, tall = RUN.bit_length() - 1, (n - 1).bit_length()
    counts = rotation_rounds(d)
    counts += [0] * (short + tall - len(counts))
    eye = torch.eye(2, dtype=g.dtype, device=g.device)
    levels = []
    for k, (count, blocks) in enumerate(zip(counts, g.split(counts, dim=1), strict=True)):
        batch, pairs = (n, RUN >> (k + 1)) if k < short else (1, 1 << (short + tall - k - 1))
        missing = batch * pairs - count
        if missing:
            blocks = torch.cat([blocks, eye.expand(layers, missing, 2, 2)], dim=1)
        levels.append(blocks.reshape(layers * batch, pairs, 2, 2))
    m1 = _tree(levels[:short]).view(*lead, n, RUN, RUN)
    m2 = _tree(levels[short:])[:, :n, :n] if tall else g.new_ones(layers, 1, 1)
    return m1, m2.reshape(*lead, n, n)


class _GivensProduct(torch.autograd.Function):
    """``x (tokens, d) -> x R`` as ``x + x (M - I)``, saving x, ``M1 - I`` and ``M2 - I`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
        ctx.save_for_backward(x, m1, m2)
        d, n = x.shape[1], len(m2)
        x = F.pad(x, (0, n * RUN - d)) if n * RUN > d else x.clone()
        x[:, ::RUN] += x[:, ::RUN] @ m2
        return plus_product(x, m1)[:, :d].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dy = grads[0].contiguous()
        x, m1, m2 = ctx.saved_tensors
        d, n = x.shape[1], len(m2)
        if n * RUN > d:
            x, dy = (F.pad(t, (0, n * RUN - d)) for t in (x, dy))
        heads = torch.addmm(x[:, ::RUN], x[:, ::RUN], m2)
        dm1 = torch.bmm(runs(x, RUN).mT, runs(dy, RUN))
        dm1[:, :1] = torch.bmm(heads.T[:, None], runs(dy, RUN))  # row 0: what came out of M2
        dx = plus_product(dy, m1.mT)
        d_heads = dx[:, ::RUN].clone()
        dm2 = x[:, ::RUN].T @ d_heads
        dx[:, ::RUN] += d_heads @ m2.T
        return dx[:, :d].contiguous(), dm1, dm2


class GOFT(Adapter):
    """``W' = W diag(s) R^T`` with one angle a rotation, ``t = pi tanh(p)``, p from 0; d = in.

    R has d - 1 degrees of freedom: it does not reach all of SO(d). The authors' second
    implementation pairs neighbours in every round and is not orthogonal; this is the paper's.
    """

    Config = GOFTConfig
    paper = "arXiv 2404.04316"
    entries = 1  # numbers a rotation

    def declare(self) -> None:
        """p (d - 1,), or (d - 1, 4) in qGOFT; scale (d,) where it is asked for."""
        d = self.in_features
        if d < 2:
            raise UserError("GOFT rotates pairs of input channels; this layer has one")
        self.p = self.new_parameter(*((d - 1,) if self.entries == 1 else (d - 1, self.entries)))
        self.scale = self.new_parameter(d) if self.config.scale else None

    def blocks(self, p: Tensor) -> Tensor:
        """The 2 x 2 blocks (..., d - 1, 2, 2) of the rotations, round by round."""
        t = math.pi * torch.tanh(p)
        c, s = torch.cos(t), torch.sin(t)
        return torch.stack([c, -s, s, c], dim=-1).unflatten(-1, (2, 2))

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """``M1 - I`` (..., n, 64, 64) and ``M2 - I`` (..., n, n)."""
        both = givens_matrices(self.blocks(parameters["p"]), self.in_features)
        return tuple(less_identity(m) for m in both)

    def transform_input(self, x: Tensor) -> Tensor:
        """``(x R) * s``."""
        y = _GivensProduct.apply(x.reshape(-1, x.shape[-1]), *self.get_factors(x.dtype))
        return y.view(x.shape) if self.scale is None else scale_shift(y.view(x.shape), self.scale)

    def flops(self) -> int:
        """M1 on all channels, M2 on one of 64."""
        n = -(-self.in_features // RUN)
        return 2 * RUN * RUN * n + 2 * n * n
