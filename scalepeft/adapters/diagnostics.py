"""How far each adapted layer is from its base, measured beside the training."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scalepeft.adapters.base import unsharded_copy
from scalepeft.adapters.experts import Stacked
from scalepeft.adapters.inject import Adapted, adapted_layers
from scalepeft.adapters.merged_weight import merged
from scalepeft.models import quant
from scalepeft.parallel.base import Engine


@torch.no_grad()
def diagnose(model: nn.Module, engine: Engine, poll: Callable[[], None]) -> dict[str, object]:
    """Layer -> ``measure``. A collective: one layer at a time is whole, on every rank."""
    found: dict[str, object] = {}
    for name, layer in adapted_layers(model):
        poll()
        found[name] = measure(unsharded_copy(layer, lambda p: engine.whole([p])[0]))  # type: ignore[list-item]
    return found


def measure(layer: Adapted) -> dict[str, float]:
    """What is finite of these, of experts over all; of a map not affine in x the angle alone.

    angle: largest ``|arg|`` of an eigenvalue of ``rotations``, degrees. distance: ``|W' - W|_F /
    |W|_F``. spectrum: largest change of ``|s|_p = (sum s^p)^(1/p)``, p = 2, 4, 8, of the singular
    values s; at most ``|s' - s|_p``. energy: change of ``sum 1 / |u_i - u_j|``, u every n-th row of
    W, 256 at most, of length 1. All are relative, in fp32: rounding of 1e-6.
    """
    adapter = unsharded_copy(layer.adapter, lambda p: p.double().cpu()).eval()
    each = adapter.each() if isinstance(adapter, Stacked) else [adapter]
    for one in each:
        one.made = tuple(one.get_factors(torch.float64))
    found = {"angle": max(_angle(*rotation) for one in each for rotation in one.rotations())}
    if not adapter.unmergeable_reason:
        changed, shape = merged(layer), (-1, layer.out_features, layer.in_features)
        w = quant.Frozen(layer).weight(changed.dtype)
        before, after = (torch.stack([*map(_sums, m.view(shape))]).sum(0) for m in (w, changed))
        change = (after / before) ** torch.tensor([1 / 2, 1 / 4, 1 / 8, 1]) - 1
        found["distance"] = float((changed - w).norm(dim=1).double().norm() / before[0].sqrt())
        found |= {"spectrum": float(change[:3].abs().max()), "energy": float(change[3])}
    return {key: float(f"{n:.6g}") for key, n in found.items() if math.isfinite(n)}


def _sums(w: Tensor) -> Tensor:
    gram = w @ w.mT if len(w) <= w.shape[1] else w.mT @ w
    apart = torch.pdist(nn.functional.normalize(w[:: -(-len(w) // 256)])).clamp_min(1e-6)
    sums = [m.norm(dim=1).double().square().sum() for m in (w, gram, gram @ gram)]  # fp32 by rows
    return torch.stack([*sums, (1 / apart).sum(dtype=torch.float64)]).cpu()


def _angle(width: int, turn: Callable[[Tensor], Tensor]) -> float:
    """In a Krylov space, exact where up to 62 dimensions turn (HOFT, HRA), else up to 1 % less."""
    v = torch.randn(1, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = images = v[:0]
    while len(basis) < 64 and v.norm() > 1e-12 * images.norm():  # else all that turns is in it
        basis = torch.cat([basis, v / v.norm()])
        image, shift = turn(torch.cat([basis[-1:], 0 * v])).split(1)
        images = torch.cat([images, image - shift - basis[-1:]])
        v = images[-1:] - images[-1:] @ basis.mT @ basis
        v -= v @ basis.mT @ basis  # once more: what was rounding
    small = images @ basis.mT  # of Q - I, which keeps small angles
    if not small.isfinite().all():
        return math.inf
    values = torch.linalg.eigvals(small)
    return torch.atan2(values.imag.abs(), 1 + values.real).rad2deg().max().item()
