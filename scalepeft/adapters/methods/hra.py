"""HRA: Householder reflection adaptation (arXiv 2405.17484): HOFT on the input side alone."""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.adapters.base import AdapterConfig, Base, in_fp64
from scalepeft.adapters.householder import Reflected, check_rank, columns, start_columns
from scalepeft.core.fields import STRICT, Targets


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HRAConfig(AdapterConfig):
    """Settings of HRA.

    Attributes:
        rank: r, the number of reflections; even, because the start pairs equal ones.
        form: what is trained of them, as in HOFT, whose columns ``mean_difference`` starts from.
        dropout: as in HOFT.
        penalty: lambda, the weight of what columns lack of orthogonality; the authors' best: 1e-4.
    """

    BEFORE: ClassVar = {"form": "pairs"}

    name: str = "hra"
    target_modules: Targets = Field(default=["q_proj", "v_proj"])
    rank: Annotated[int, Field(ge=2)] = 8
    form: Literal["pairs", "mean_difference"] = "mean_difference"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    penalty: Annotated[float, Field(ge=0)] = 0.0


class HRA(Reflected):
    """``W' = W H(u1) ... H(ur)``, ``H(u) = I - 2 u u^T / |u|^2``; V (in, r); ``r in`` parameters.

    The paper's order of reflections. Matches HF PEFT. Raises UserError: rank odd, or too large.
    """

    Config = HRAConfig
    paper = "arXiv 2405.17484"

    def declare(self) -> None:
        """V (in, r)."""
        super().declare()
        check_rank(self.config.rank, self.in_features)
        self.form = self.config.form
        self.V = self.new_parameter(self.in_features, self.config.rank)

    def reset_parameters(self) -> None:
        """Draws r / 2 columns as PEFT does and pairs them: the product is I."""
        if self.form != "pairs":
            self.V.data.copy_(start_columns(len(self.V), self.V.shape[1], 1.0, self.form))
            return
        half = torch.empty(self.in_features, self.V.shape[1] // 2)
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        with torch.no_grad():
            self.V.copy_(half.repeat_interleave(2, dim=1))

    def penalty(self) -> Tensor | None:
        """``penalty * |I - N^T N|``, N the columns at length 1; fp64: Adam would magnify noise."""
        if not self.config.penalty:
            return None
        n = F.normalize(columns(in_fp64(self.V), self.form), dim=0)
        return self.config.penalty * math.sqrt(2) * (n.mT @ n).triu(1).norm().to(self.V.dtype)

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's HRA with the same columns."""
        fields = {"peft_type": "HRA", "r": self.config.rank, "apply_GS": False}
        return fields, {"hra_u": columns(self.V.detach(), self.form)}
