"""OFT: orthogonal fine-tuning with block-diagonal Cayley rotations (arXiv 2306.07280).

Letters: b block size, n = in / b blocks, K (n, b, b) skew-symmetric, R (n, b, b); rows x -> x R.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, in_fp64
from scalepeft.adapters.block_orthogonal import block_product, less_identity, skew_symmetric
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OFTConfig(AdapterConfig):
    """Settings of OFT.

    Attributes:
        block_size: b, channels that a rotation mixes; must divide the width of every target layer.
    """

    name: str = "oft"
    block_size: Annotated[int, Field(ge=2)] = 32


class OFT(Adapter):
    """``W' = W R^T``, R block-diagonal, ``R = (I - K)(I + K)^-1``; ``in (b - 1) / 2`` parameters.

    ``K`` holds the entries above the diagonals and starts at 0. Matches HF PEFT. Raises UserError:
    the block size does not divide the layer's inputs.
    """

    Config = OFTConfig
    paper = "arXiv 2306.07280"

    def declare(self) -> None:
        """K (in / b, b (b - 1) / 2)."""
        b, inp = self.config.block_size, self.in_features
        if inp % b:
            fits = [n for n in range(2, inp + 1) if inp % n == 0]
            near = ", ".join(map(str, sorted(sorted(fits, key=lambda n: abs(n - b))[:4])))
            what = f"adapter.block_size={b} does not divide the layer's {inp} inputs; take one of"
            raise UserError(f"{what} {near}, or leave the layer out of adapter.target_modules")
        self.K = self.new_parameter(inp // b, b * (b - 1) // 2)

    def rotation(self, k: Tensor) -> Tensor:
        """K (..., b, b) -> R (..., b, b) by an exact solve: orthogonal for all skew-symmetric K."""
        eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        # R (I + K) = I - K; transposed, because (I + K)^T = I - K and (I - K)^T = I + K.
        # Never singular, so that the host need not wait for the device's word on it.
        return torch.linalg.solve_ex(eye - k, eye + k)[0].mT

    def factors(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """``R - I`` (..., in / b, b, b)."""
        k = skew_symmetric(in_fp64(parameters["K"]), self.config.block_size)
        return (less_identity(self.rotation(k)).to(parameters["K"].dtype),)

    def transform_input(self, x: Tensor) -> Tensor:
        """``x R``."""
        return block_product(x, *self.get_factors(x.dtype))

    def flops(self) -> int:
        """One product with b x b blocks."""
        return 2 * self.in_features * int(self.config.block_size)

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's OFT with the same entries."""
        fields = {"peft_type": "OFT", "r": 0, "oft_block_size": self.config.block_size}
        return {**fields, "use_cayley_neumann": False}, {"oft_R.weight": self.K.detach()}
