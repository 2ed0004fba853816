"""Every rank holds the whole model; gradients of the adapter are summed once a step."""

import torch
import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from scalepeft.core.fields import STRICT
from scalepeft.parallel.base import Engine, EngineConfig

BUCKET = 25_000_000  # gradient elements that are summed at one time


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DDPConfig(EngineConfig):
    """Settings of the replicating engine."""

    name: str = "ddp"


class DDP(Engine):
    """Data parallel over the trained parameters alone; the frozen base is never communicated.

    Not torch's DistributedDataParallel: its first step sums in another order than the later ones,
    so that a resumed run would differ in the last bit; and what it hides behind the backward, an
    exchange of the adapter's gradients, is small beside the frozen base's work.
    """

    Config = DDPConfig
    _trained: list[nn.Parameter]

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Start values are equal on all ranks by seed, so nothing is broadcast."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        return model

    def backward(self, loss: Tensor, last: bool) -> None:
        """Sums over the ranks behind the last micro-batch."""
        loss.backward()
        if not last:
            return
        bucket: list[Tensor] = []
        size = 0
        for grad in [p.grad for p in self._trained if p.grad is not None]:
            if bucket and size + grad.numel() > BUCKET:
                _all_reduce(bucket)
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.numel()
        _all_reduce(bucket)


def _all_reduce(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.view(-1) for grad in grads])
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_([grad.view(-1) for grad in grads], list(parts))
