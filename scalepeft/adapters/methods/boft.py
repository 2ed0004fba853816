"""BOFT: orthogonal fine-tuning by butterfly factors (arXiv 2311.06243).

Letters: m factors, b block size, n = in / b blocks; R (in, in) is a product of m block-diagonal
rotations, each between a permutation and its inverse. Rows x -> x R.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from scalepeft.adapters.base import Base, scale_shift
from scalepeft.adapters.methods.oft import OFT, OFTConfig, block_product, skew_symmetric
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BOFTConfig(OFTConfig):
    """Settings of BOFT.

    Attributes:
        block_size: b, even where factors > 1.
        factors: m; blocks of factor i reach over b 2^i channels; b 2^(m - 1) must divide in.
    """

    name: str = "boft"
    block_size: Annotated[int, Field(ge=2)] = 8
    factors: Positive = 2


def butterfly(d: int, b: int, i: int, device: torch.device) -> Tensor:
    """Index (d,) of factor i: place j takes channel ``index[j]``; in runs of b 2^i channels, cut
    into pieces of b / 2, even pieces come first, then the odd ones.
    """
    pieces = torch.arange(d, device=device).view(-1, 2 << i, b // 2)
    return torch.cat([pieces[:, ::2], pieces[:, 1::2]], dim=1).reshape(-1)


class BOFT(OFT):
    """``W' = diag(s) W R^T``, ``R = F_(m-1) ... F_1 F_0``, ``F_i = P_i D_i P_i^T``.

    D_i is block-diagonal of Cayley rotations as in OFT; K (m in / b, b (b - 1) / 2) and s - 1
    (out,) start at 0. Matches HF PEFT (which needs its CUDA extension for m > 1). Raises UserError:
    blocks that do not tile the layer's inputs.
    """

    Config = BOFTConfig
    paper = "arXiv 2311.06243"

    def declare(self) -> None:
        """K (m in / b, b (b - 1) / 2), scale (out,)."""
        super().declare()
        b, m, inp = self.config.block_size, self.config.factors, self.in_features
        if m > 1 and (b % 2 or inp % (b << (m - 1))):
            raise UserError(
                f"adapter.factors={m} with adapter.block_size={b}: needs an even block size, and"
                f" {b} * 2^{m - 1} = {b << (m - 1)} to divide the layer's {inp} inputs;"
                " take fewer factors or another block size"
            )
        self.K = self.new_parameter(m * inp // b, b * (b - 1) // 2)
        self.scale = self.new_parameter(self.out_features)

    def transform_input(self, x: Tensor) -> Tensor:
        """``x F_(m-1) ... F_0``: gather, rotate blocks, scatter; the last factor first."""
        first, *others = self.get_factors(x.dtype)[0].chunk(self.config.factors)
        for i, rotation in reversed(list(enumerate(others, 1))):
            # (x P)_j = x_k with P_kj = 1, and row k of P holds its 1 at index[k].
            index = butterfly(self.in_features, self.config.block_size, i, x.device)
            x = block_product(x[..., index.argsort()], rotation)[..., index]
        return block_product(x, first)

    def transform_output(self, y: Tensor) -> Tensor:
        """``s * y``."""
        return scale_shift(y, self.scale)

    def flops(self) -> int:
        """One product a factor, and the scale."""
        return super().flops() * int(self.config.factors) + self.out_features

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's BOFT with the same blocks."""
        b, m = self.config.block_size, self.config.factors
        fields = {"peft_type": "BOFT", "boft_block_size": b, "boft_block_num": 0}
        fields["boft_n_butterfly_factor"] = m
        k = skew_symmetric(self.K.detach(), b).view(m, -1, b, b)
        return fields, {"boft_R": k, "boft_s": (1 + self.scale.detach())[:, None]}
