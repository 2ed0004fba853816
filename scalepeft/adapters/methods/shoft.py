"""SHOFT: HOFT with a trained scale between the two rotations (arXiv 2505.16531)."""

from scalepeft.adapters.methods.hoft import HOFT


class SHOFT(HOFT):
    """``W' = Q_U diag(m) W Q_V``, m (out,) trained from 1; ``r (in + out) + out`` parameters."""

    scaled = True
