"""What an adapted layer amounts to: its effective weight, measured and not derived."""

import torch
from torch import Tensor, nn

from scalepeft.injection import Adapted
from scalepeft.lookup import UserError


@torch.no_grad()
def effective_weight(layer: nn.Module, chunk: int = 1024) -> tuple[Tensor, Tensor | None]:
    """Returns ``(W', b')`` in fp32 (fp64 for an fp64 layer), so that the layer equals ``W' x +
    b'``.

    One rule for every method: push zero through the layer for b', then the identity, ``chunk`` rows
    at a time, for the columns of W'. b' is None where the layer has no bias and the method adds
    none.

    Raises:
        UserError: the layer has no adapter, or its method is not affine in x.
    """
    if not isinstance(layer, Adapted):
        raise UserError(f"{type(layer).__name__} has no adapter; call adapt() or inject() first")
    if reason := layer.adapter.no_merge:
        raise UserError(f"{type(layer.adapter).__name__} cannot merge: {reason}; keep the adapter")
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    was_training = layer.training
    layer.eval()
    device = layer.weight.device
    zero = layer(torch.zeros(1, layer.in_features, dtype=dtype, device=device))[0]
    columns = []
    for first in range(0, layer.in_features, chunk):
        rows = min(chunk, layer.in_features - first)
        x = torch.zeros(rows, layer.in_features, dtype=dtype, device=device)
        x[torch.arange(rows), first + torch.arange(rows)] = 1
        columns.append((layer(x) - zero).T)
    layer.train(was_training)
    has_bias = layer.bias is not None or bool(zero.any())
    return torch.cat(columns, dim=1), zero if has_bias else None
