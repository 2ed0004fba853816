"""qGOFT: GOFT with free 2 x 2 blocks held near rotations by a penalty (arXiv 2404.04316)."""

from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from scalepeft.adapters.methods.goft import GOFT, GOFTConfig
from scalepeft.core.fields import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QGOFTConfig(GOFTConfig):
    """Settings of qGOFT.

    Attributes:
        penalty: lambda, the weight of ``sum <alpha, beta>^2`` in the loss.
    """

    name: str = "qgoft"
    penalty: Annotated[float, Field(ge=0)] = 0.01


class QGOFT(GOFT):
    """``W' = W diag(s) R^T``; each rotation of GOFT becomes a block with columns alpha, beta.

    p (d - 1, 4) is the difference from the identity: row i is ``(alpha_0 - 1, beta_0, alpha_1,
    beta_1 - 1)``. The penalty leaves the lengths of the columns free.
    """

    Config = QGOFTConfig
    entries = 4

    def blocks(self, p: Tensor) -> Tensor:
        """``I + p``, (..., d - 1, 2, 2)."""
        return torch.eye(2, dtype=p.dtype, device=p.device) + p.unflatten(-1, (2, 2))

    def penalty(self) -> Tensor | None:
        """``penalty * sum over rows of <alpha, beta>^2``; None where the weight is 0."""
        if not self.config.penalty:
            return None
        a0, b0, a1, b1 = self.p.unbind(1)
        return self.config.penalty * ((1 + a0) * b0 + a1 * (1 + b1)).square().sum()
