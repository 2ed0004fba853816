"""Every rank holds the whole model; gradients of the adapter are summed once a step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scalepeft.lookup import STRICT
from scalepeft.parallel.base import Engine, EngineConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DDPConfig(EngineConfig):
    """Settings of the replicating engine."""

    name: str = "ddp"


def _sum_hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums a bucket over the ranks; DDP by itself would divide by their number."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


class DDP(Engine):
    """torch's DistributedDataParallel around the trained parameters; the frozen base is never
    communicated.
    """

    Config = DDPConfig
    _wrapped: DistributedDataParallel

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Wraps the loaded model. Start values are equal on all ranks by seed, so nothing is
        broadcast.
        """
        if optimizer is None:
            return model
        cuda = self.ranks.device.type == "cuda"
        self._wrapped = DistributedDataParallel(
            model,
            device_ids=[self.ranks.device] if cuda else None,
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        self._wrapped.register_comm_hook(None, _sum_hook)
        return self._wrapped

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Skips the exchange on all but the last micro-batch."""
        return nullcontext() if last else self._wrapped.no_sync()
