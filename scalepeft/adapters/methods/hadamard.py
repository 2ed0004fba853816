"""Hadamard adapter: elementwise scale and shift of the attention output (arXiv 2407.11033)."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.adapters.base import AdapterConfig, Base
from scalepeft.adapters.methods.ia3 import IA3
from scalepeft.core.fields import STRICT, Targets


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HadamardConfig(AdapterConfig):
    """Settings of the Hadamard adapter.

    Attributes:
        position: ``after`` the target layer (its output), or ``before`` (its input).
        train_norm: train the weight of ``norm`` too.
        norm: name of the normalization layer that follows the attention.
    """

    name: str = "hadamard"
    target_modules: Targets = Field(default=["o_proj"])
    position: Literal["after", "before"] = "after"
    train_norm: bool = True
    norm: str = "post_attention_layernorm"

    def norm_modules(self) -> list[str]:
        """``norm`` where it trains."""
        return [self.norm] if self.train_norm else []


class Hadamard(IA3):
    """``A' = w * A + c`` on the output of ``o_proj`` (or its input); ``2 d`` parameters.

    ``scale = w - 1`` and c (``shift``) start at 0. A bias of the layer is added after the adapter.
    On LLaMA, which the paper did not try, this is a choice; so is training in one stage (the paper
    tunes a classifier's head first).
    """

    Config = HadamardConfig
    paper = "arXiv 2407.11033"

    def declare(self) -> None:
        """Scale and shift of the side that is changed."""
        self.on_input = self.config.position == "before"
        size = self.in_features if self.on_input else self.out_features
        self.scale, self.shift = self.new_parameter(size), self.new_parameter(size)

    def to_peft(self, base: Base) -> None:
        """None: PEFT's IA3 has no shift."""
