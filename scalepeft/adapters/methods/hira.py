"""HiRA: Hadamard high-rank adaptation (ICLR 2025, openreview TwJrTz9cRS)."""

import math
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from scalepeft.adapters.base import Adapter, AdapterConfig, Base
from scalepeft.adapters.methods.hut import weight_product
from scalepeft.core.fields import STRICT, Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HiRAConfig(AdapterConfig):
    """Settings of HiRA.

    Attributes:
        rank: r, columns of B and rows of A.
    """

    name: str = "hira"
    rank: Positive = 32


class HiRA(Adapter):
    """``W' = W * (1 + B A)`` elementwise, r (in + out) parameters; a weight made on the spot, in
    forward and again in backward, as W and B A can be multiplied in no other form. Matches HF PEFT.
    """

    Config = HiRAConfig
    paper = "openreview TwJrTz9cRS"
    weight_decay = frozenset({"A", "B"})
    needs_weight = True

    def declare(self) -> None:
        """A (r, in), B (out, r)."""
        self.A = self.new_parameter(self.config.rank, self.in_features)
        self.B = self.new_parameter(self.out_features, self.config.rank)

    def reset_parameters(self) -> None:
        """As LoRA: A Kaiming uniform, B zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """``(W * (1 + B A)) x``."""
        return weight_product(x, base, lambda w, a, b: torch.addcmul(w, w, b @ a), self.A, self.B)

    def flops(self) -> int:
        """The work is on the weight, once a batch."""
        return 0

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's HiRA with the same A and B."""
        fields = {"peft_type": "HIRA", "r": self.config.rank}
        return fields, {"hira_A": self.A.detach(), "hira_B": self.B.detach()}
