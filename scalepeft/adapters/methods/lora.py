"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), the baseline of all.

Letters: r rank, A (r, in), B (out, r), scaling = alpha / r, or alpha / sqrt(r) (rsLoRA).
"""

import math
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, Dropout
from scalepeft.core.fields import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRAConfig(AdapterConfig):
    """Settings of LoRA.

    Attributes:
        rank: r, columns of B and rows of A.
        alpha: the update is scaled by alpha / rank.
        rslora: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
        dropout: probability of zeroing an entry of x on the way into A, in training only.
    """

    name: str = "lora"
    rank: Annotated[int, Field(ge=1)] = 32
    alpha: Annotated[float, Field(gt=0)] = 64.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05


class LoRA(Adapter):
    """``W' = W + scaling B A``; ``r (in + out)`` parameters. Matches HF PEFT."""

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
        self.A = self.new_parameter(config.rank, self.in_features)
        self.B = self.new_parameter(self.out_features, config.rank)

    def reset_parameters(self) -> None:
        """Draws A as PEFT does (Kaiming uniform, a = sqrt 5); B is zero."""
        super().reset_parameters()
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def delta(self, x: Tensor) -> Tensor:
        """``scaling * B A dropout(x)``: two thin products in the dtype of x."""
        x = self.dropout(x)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype) * self.scaling)

    def flops(self) -> int:
        """Two thin products."""
        return 2 * len(self.A) * (self.in_features + self.out_features)

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's LoRA with the same A and B."""
        config = self.config
        fields = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha}
        fields |= {"lora_dropout": config.dropout, "use_rslora": config.rslora}
        return fields, {"lora_A.weight": self.A.detach(), "lora_B.weight": self.B.detach()}

    def to_lora(self, base: Base) -> tuple[Tensor, Tensor] | None:
        """Itself, with the scaling in B."""
        return self.A.detach(), self.scaling * self.B.detach()
