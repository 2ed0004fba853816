"""The adapter protocol: a frozen linear layer is a black box, an adapter is what happens around it.

Letters: W frozen weight (out, in), x (..., in), y (..., out), b the base bias, r rank.
"""

from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from scalepeft.lookup import STRICT, NameList


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterConfig:
    """What every method's config has.

    Attributes:
        name: the method, a file of ``scalepeft/adapters``.
        target_modules: layers to adapt: the last part of a module name (``q_proj``), or a pattern
            over the whole name (``model.layers.1*.self_attn.*``). The default is the set behind the
            parameter counts of the HOFT, LLM-Adapters and DoRA papers.
    """

    name: str
    target_modules: Annotated[NameList, Field(min_length=1)] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    )


class Base(Protocol):
    """The frozen layer without its bias, however W is stored."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x (..., in) -> W x (..., out)`` in the dtype of x, differentiable in x."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) for the moment, in the backward of a fused method; most methods never ask."""


class Adapter(nn.Module):
    """``y = transform_output(W transform_input(x) + delta(x)) + b``; x (..., in), y (..., out), W
    (out, in).

    A method overrides the hooks it needs and declares its parameters (fp32) in ``__init__``, which
    must run on the meta device. It knows nothing of how W is stored or sharded.
    """

    Config: ClassVar[type[AdapterConfig]]
    mergeable: ClassVar[bool] = True
    """False where the map is not affine in x."""
    weight_decay: ClassVar[bool] = False
    """True where decay pulls towards the base layer; never for rotations, reflections and scales.
    """

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = in_features, out_features

    def reset_parameters(self) -> None:
        """Draws the start values; the adapted layer then equals its base layer.

        Called on an unsharded copy on the CPU under a seed of (run seed, layer name), so that the
        start values do not depend on device, engine or world size.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters")

    def transform_input(self, x: Tensor) -> Tensor:
        """Maps x (..., in) before the frozen layer sees it."""
        return x

    def delta(self, x: Tensor) -> Tensor | None:
        """Returns what is added to W x, (..., out), or None."""
        return None

    def transform_output(self, y: Tensor) -> Tensor:
        """Maps y (..., out) after the frozen layer, before its bias is added."""
        return y

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Applies the method around ``base`` (the frozen layer without bias)."""
        y = base(self.transform_input(x))
        delta = self.delta(x)
        return self.transform_output(y if delta is None else y + delta)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for Gram matrices, solves, angles and norms: fp32, or fp64 where that came in."""
    return torch.promote_types(dtype, torch.float32)
