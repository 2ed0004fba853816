"""SHOFT: HOFT with a trained scale between the two rotations (arXiv 2505.16531)."""

from pydantic.dataclasses import dataclass

from scalepeft.adapters.methods.hoft import HOFT, HOFTConfig
from scalepeft.core.fields import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SHOFTConfig(HOFTConfig):
    """Settings of SHOFT: those of HOFT."""

    name: str = "shoft"


class SHOFT(HOFT):
    """``W' = Q_U diag(m) W Q_V``, m (out,) trained from 1; ``r (in + out) + out`` parameters.

    Paper: arXiv 2505.16531. See ``HOFT`` for the rotations and for where the bias goes.
    """

    Config = SHOFTConfig
    scaled = True
