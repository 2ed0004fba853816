"""IA3: few-shot fine-tuning by scaling activations (arXiv 2205.05638)."""

from typing import Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, scale_shift
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, NameList, Targets
from scalepeft.core.registry import names


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IA3Config(AdapterConfig):
    """Settings of IA3.

    Attributes:
        feedforward_modules: of the targets, those whose input is scaled; of the others it is the
            output. Each must be a target, word for word, unless left as it is.
    """

    name: str = "ia3"
    target_modules: Targets = Field(default=["k_proj", "v_proj", "down_proj"])
    feedforward_modules: NameList = Field(default=["down_proj"])

    def __post_init__(self) -> None:
        """Raise UserError for a feed-forward module that is no target."""
        for name in self.feedforward_modules:
            if name not in self.target_modules and self.feedforward_modules != ["down_proj"]:
                what = f"'{name}' is none of the target_modules ({', '.join(self.target_modules)})"
                raise UserError(f"feedforward_modules: {what}; name it as it stands there")


class IA3(Adapter):
    """``W' = diag(l) W``, or ``W diag(l)`` in feed-forward layers; ``scale = l - 1`` starts at 0. A
    bias is added afterwards (PEFT scales it too, in the first form).
    """

    Config: ClassVar[type[AdapterConfig]] = IA3Config
    paper = "arXiv 2205.05638"

    def declare(self) -> None:
        """Scale (in,) in feed-forward layers, (out,) in others."""
        self.on_input = any(names(p, self.layer_name) for p in self.config.feedforward_modules)
        self.scale = self.new_parameter(self.in_features if self.on_input else self.out_features)
        self.shift: nn.Parameter | None = None

    def transform_input(self, x: Tensor) -> Tensor:
        """``l * x`` in feed-forward layers."""
        return scale_shift(x, self.scale, self.shift) if self.on_input else x

    def transform_output(self, y: Tensor) -> Tensor:
        """``l * y`` in the others."""
        return y if self.on_input else scale_shift(y, self.scale, self.shift)

    def flops(self) -> int:
        """One product a channel, and a sum with a shift."""
        return sum(p.numel() for p in self.parameters())

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """PEFT's IA3 with the same l."""
        fields = {"peft_type": "IA3", "feedforward_modules": self.config.feedforward_modules}
        scale = 1 + self.scale.detach()
        return fields, {"ia3_l": scale[None] if self.on_input else scale[:, None]}
