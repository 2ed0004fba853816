"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), the baseline of all.

Letters: r rank, A (r, in), B (out, r), scaling = alpha / r, or alpha / sqrt(r) (rsLoRA).
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, Dropout, in_fp64
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRAConfig(AdapterConfig):
    """Settings of LoRA.

    Attributes:
        rank: r, columns of B and rows of A.
        alpha: the update is scaled by alpha / rank.
        rslora: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
        dropout: probability of zeroing an entry of x on the way into A, in training only.
        start: ``kaiming``: A random, B zero. ``pissa`` (arXiv 2404.02948): the leading singular
            values and vectors of W, which start-up finds; A and B are trained from there.
    """

    name: str = "lora"
    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 64.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    start: Literal["kaiming", "pissa"] = "kaiming"


class LoRA(Adapter):
    """``W' = W + scaling B A``; ``r (in + out)`` parameters. Matches HF PEFT.

    PiSSA: ``W' = W + scaling ((B0 + B) (A0 + A) - B0 A0)``, A and B from 0, ``scaling B0 A0`` the r
    leading singular triplets of W: maps and gradients as with ``B0 + B, A0 + A`` over the rest of
    W. W itself stays: over NF4 it is the dequantized one, where QPiSSA quantizes the rest.
    **Choice**: dropout and decay act on A and B alone, so that the start is the base.
    """

    Config = LoRAConfig
    paper = "arXiv 2106.09685"
    weight_decay = frozenset({"A", "B"})

    def declare(self) -> None:
        """A (r, in), B (out, r)."""
        config = self.config
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        self.dropout = Dropout(config.dropout, self.layer_name) if config.dropout else nn.Identity()
        if config.rslora:
            self.paper = "arXiv 2312.03732"
        if config.start == "pissa":
            if config.rank > (number := min(self.in_features, self.out_features)):
                what = f"start=pissa: the layer has {number} singular values"
                raise UserError(f"adapter.rank={config.rank}: {what}; take a rank up to that")
            self.kept = frozenset({"A0", "B0"})
            self.A0 = self.new_parameter(config.rank, self.in_features)
            self.B0 = self.new_parameter(self.out_features, config.rank)
        self.A = self.new_parameter(config.rank, self.in_features)
        self.B = self.new_parameter(self.out_features, config.rank)

    def reset_parameters(self) -> None:
        """Draws A as PEFT does (Kaiming uniform, a = sqrt 5); B is zero. Of PiSSA all are."""
        super().reset_parameters()
        if not self.kept:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def start(self, base: Base) -> dict[str, Tensor]:
        """A0 and B0, by a randomized SVD: up to a side of 256 exact; halves of S as in PEFT."""
        w, r = in_fp64(base.weight(torch.float32)), self.config.rank
        with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
            torch.manual_seed(0)  # every rank draws the same
            u, s, v = torch.svd_lowrank(w, min(max(2 * r, 256), *w.shape), niter=8)
        root = (s[:r] / self.scaling).sqrt()
        return {"A0": (v[:, :r] * root).mT, "B0": u[:, :r] * root}

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k) of ``W' = W + scaling B A``; k = r, or 2 r of PiSSA."""
        if not self.kept:
            return self.A, self.B
        return torch.cat([self.A, self.A0 + self.A]), torch.cat([self.B0, self.B], dim=1)

    def delta(self, x: Tensor) -> Tensor:
        """``scaling * B A dropout(x)``: two thin products in the dtype of x."""
        x, (a, b) = self.dropout(x), self.pair()
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype) * self.scaling)

    def flops(self) -> int:
        """Two thin products."""
        return 2 * self.config.rank * (1 + bool(self.kept)) * (self.in_features + self.out_features)

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's LoRA with the same A and B; of PiSSA with both of ``pair``."""
        config, (a, b) = self.config, self.pair()
        more = len(a) / config.rank
        alpha = config.alpha * (math.sqrt(more) if config.rslora else more)
        fields = {"peft_type": "LORA", "r": len(a), "lora_alpha": alpha}
        fields |= {"lora_dropout": config.dropout, "use_rslora": config.rslora}
        return fields, {"lora_A.weight": a.detach(), "lora_B.weight": b.detach()}

    def to_lora(self, base: Base) -> tuple[Tensor, Tensor] | None:
        """Itself, with the scaling in B."""
        a, b = self.pair()
        return a.detach(), self.scaling * b.detach()
