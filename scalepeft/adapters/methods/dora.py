"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353).

Letters: r, A, B, scaling as in LoRA; m (out,) the magnitude of each row of W.
"""

from typing import Any

import torch
from torch import Tensor

from scalepeft.adapters.base import Base, in_fp64, math_dtype, scale_shift
from scalepeft.adapters.methods.lora import LoRA


class DoRA(LoRA):
    """``W' = m (W + scaling B A) / |W + scaling B A|`` by rows; ``r (in + out) + out`` parameters.

    ``m = |W| (1 + magnitude)``, magnitude from 0 (the paper's m from ``|W|``: the same maps,
    gradients scaled by |W|). The norm in the denominator takes no gradient (section 4.3); it comes
    from r products with W, never from a dense B A.
    """

    paper = "arXiv 2402.09353"

    def declare(self) -> None:
        """Those of LoRA, and the magnitude (out,), which starts at that of W."""
        super().declare()
        self.magnitude = self.new_parameter(self.out_features)

    @torch.no_grad()
    def _norms(self, base: Base, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Row norms (out,) of W and of ``W + s B A``, s the scaling:
        ``|w_i + s b_i A|^2 = |w_i|^2 + 2 s b_i (A w_i) + s^2 b_i (A A^T) b_i``.
        """
        wide, w, (a, b) = math_dtype(dtype), base.weight(dtype), self.pair()
        a, b = in_fp64(a), self.scaling * in_fp64(b)
        square = torch.linalg.vector_norm(w, dim=1, dtype=wide).square()
        cross = 2 * (w @ a.mT.to(dtype)).to(wide) + b @ (a @ a.mT)
        return square.sqrt(), (square + (b * cross).sum(1)).clamp_min(0).sqrt().to(wide)

    @torch.compiler.disable  # else a recomputation, which has them, would save other tensors
    def _kept_norms(self, base: Base, dtype: torch.dtype) -> tuple[Tensor, ...]:
        norms = self.made or self._norms(base, dtype)
        if self.made is not None:  # made ahead where W is at hand, which it is here alone
            self.made = norms
        return norms

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """``(1 + magnitude) |W| / |W + scaling B A| * (W x + scaling B A dropout(x))``."""
        before, now = self._kept_norms(base, x.dtype)
        ratio = torch.where(before > 0, before / now, torch.ones_like(now))
        return scale_shift(base(x) + self.delta(x), (1 + self.magnitude) * ratio - 1)

    def flops(self) -> int:
        """LoRA's products and a factor for each output; the norms are paid once a batch."""
        return super().flops() + self.out_features

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's LoRA with ``use_dora``; its magnitude is ``m`` itself."""
        fields, tensors = super().to_peft(base)
        before, _ = self._norms(base, math_dtype(self.A.dtype))
        m = before * (1 + self.magnitude.detach())
        return {**fields, "use_dora": True}, {**tensors, "lora_magnitude_vector": m}

    def to_lora(self, base: Base) -> None:
        """None: the factor on every row of W has full rank."""
