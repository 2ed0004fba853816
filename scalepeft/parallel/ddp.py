"""Every rank holds the whole model; gradients of the adapter are summed once a step."""

from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.parallel import base
from scalepeft.parallel.base import Engine, Shares


class DDP(Engine):
    """Data parallel over the trained parameters alone; the frozen base is never communicated.

    Not torch's DistributedDataParallel, whose first step sums in another order than the later ones:
    a resumed run would differ in the last bit.
    """

    _trained: list[nn.Parameter]

    @classmethod
    def shares(cls, config: Any, model: nn.Module, world_size: int, ranks_per_node: int) -> Shares:
        """A whole copy on each rank, and the buckets of all gradients."""
        trained = [p for p in model.parameters() if p.requires_grad]
        sent = ("all-reduce", "last", len(base.buckets(trained)), sum(p.nbytes for p in trained))
        marks = ((base, "_all_reduce", "gradients"),)
        return Shares(exchanges=(sent,) if world_size > 1 else (), marks=marks)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Start values are equal on all ranks by seed, so nothing is broadcast."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        return model

    def backward(self, loss: Tensor, last: bool) -> None:
        """Sums over the ranks behind the last micro-batch."""
        loss.backward()
        if last:
            self.sum_gradients([p.grad for p in self._trained if p.grad is not None])
