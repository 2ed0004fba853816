"""FSDP2: every rank holds 1/N of the rows of every parameter; a block is gathered while it
computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic.dataclasses import dataclass
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from scalepeft.lookup import STRICT, UserError
from scalepeft.parallel.base import Engine, EngineConfig

# Sharding uint8 parameters needs pytorch PR #177948.
UINT8_SHARDS_SINCE = (2, 13)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FSDP2Config(EngineConfig):
    """Settings of the FSDP2 engine.

    Attributes:
        reshard_after_forward: free a block after forward and gather it again for backward (less
            memory, one more all-gather a block); False keeps every block gathered until its
            backward.
    """

    name: str = "fsdp2"
    reshard_after_forward: bool = True


class FSDP2(Engine):
    """``fully_shard`` on every block and on the model; frozen parameters are gathered, never
    reduced.

    The adapter shards with the block that holds its layer. There is no mixed-precision policy: the
    base is stored in the compute dtype (or in bytes), the adapter in fp32, and methods cast for
    themselves.
    """

    Config = FSDP2Config
    config: FSDP2Config
    sharded = True
    _units: list[FSDPModule]

    def wrap(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Shards each block, then what is left (embeddings, last norm, head) with the model."""
        version = tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2])
        if version < UINT8_SHARDS_SINCE and any(p.dtype == torch.uint8 for p in model.parameters()):
            raise UserError(
                "a quantised base under engine.name=fsdp2 needs torch >= 2.13 (found"
                f" {torch.__version__}): earlier versions cannot shard uint8 parameters. Update"
                " torch, take engine.name=ddp, or model.quant=none"
            )
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.config.reshard_after_forward)
        fully_shard(model, mesh=mesh)
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            # A sum on every backend: gloo has neither AVG nor PREMUL_SUM.
            unit.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Reduce-scatters on the last micro-batch only; until then each rank keeps unsharded
        adapter gradients.
        """
        for unit in self._units:
            unit.set_requires_gradient_sync(last, recurse=False)
        yield
