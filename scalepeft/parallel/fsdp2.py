"""FSDP2 and HSDP: a rank holds 1/N of the rows; a block is gathered while it computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT
from scalepeft.parallel.base import Engine, EngineConfig, Shares


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FSDP2Config(EngineConfig):
    """Settings of the FSDP2 engine.

    Attributes:
        reshard_after_forward: free a block after forward and gather it again for backward (less
            memory, one more all-gather a block); False keeps every block gathered until its
            backward.
        shard_over: ``world``: one copy of the model over all ranks; ``node``: a copy on each node,
            so that blocks are gathered inside nodes and only gradients of the adapter leave them
            (HSDP); N: a copy on every N ranks.
    """

    name: str = "fsdp2"
    reshard_after_forward: bool = True
    shard_over: Annotated[int, Field(ge=1)] | Literal["world", "node"] = "world"


class FSDP2(Engine):
    """``fully_shard`` on each block and on the model; frozen parameters are gathered, not reduced.

    The adapter shards with its layer's block. There is no mixed-precision policy: the base is
    stored in the compute dtype (or in bytes), the adapter in fp32, and methods cast for themselves.
    """

    Config = FSDP2Config
    config: FSDP2Config
    sharded = True
    _units: list[Any]

    def wrap(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Shards each block, the embedding, and what is left (norm, head) with the model."""
        from torch.distributed.fsdp import FSDPModule  # 0.7 s, of which settings need nothing

        world, group = self.ranks.world_size, self.group_size()
        device = self.ranks.device.type
        if group == world:
            mesh = init_device_mesh(device, (world,))
        else:
            names = ("replicate", "shard")
            mesh = init_device_mesh(device, (world // group, group), mesh_dim_names=names)
            self.ranks.check_groups(mesh.get_all_groups())
        for block in blocks:
            _shard(block, mesh=mesh, reshard_after_forward=self.config.reshard_after_forward)
        # Not in the model's unit, which stays gathered all the step. Tied, it is the head too.
        embedding, head = (
            getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")
        )
        if embedding is not None and embedding.weight is not getattr(head, "weight", None):
            _shard(embedding, mesh=mesh)
            # Else the first block's backward would gather the embedding ahead, which has none.
            blocks[0].set_modules_to_backward_prefetch([blocks[0]])  # type: ignore[operator]
        _shard(model, mesh=mesh)
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            # A sum on every backend: gloo has neither AVG nor PREMUL_SUM.
            unit.set_force_sum_reduction_for_comms(True)

    def group_size(self) -> int:
        """Number of ranks that hold one copy. Raises UserError: it does not divide the world."""
        world, over = self.ranks.world_size, self.config.shard_over
        size = _group_size(over, world, self.ranks.ranks_a_node() if over == "node" else world)
        if world % size:
            raise UserError(
                f"engine.shard_over={over}: {world} ranks cannot form groups of {size}; take a"
                f" divisor of {world}, or world"
            )
        return size

    @classmethod
    def shares(cls, config: Any, model: nn.Module, world_size: int, ranks_per_node: int) -> Shares:
        """1/N of the rows of everything."""
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

        n = _group_size(config.shard_over, world_size, min(world_size, ranks_per_node))
        marks = (
            (fsdp, "foreach_all_gather", "gathered"),
            (fsdp, "foreach_all_gather_copy_out", "gathered"),
            (fsdp, "foreach_reduce", "gradients"),
        )
        return Shares(n, n, n, n, by_rows=True, marks=marks)

    def copies(self, tensor: Tensor) -> tuple[int, int]:
        """A shard has one copy in each group of ranks."""
        if (mesh := getattr(tensor, "device_mesh", None)) is None:
            return super().copies(tensor)
        return (mesh.get_local_rank("replicate"), mesh.size(0)) if mesh.ndim == 2 else (0, 1)

    def whole(self, parameters: list[nn.Parameter]) -> Tensor:
        """One all-gather: the parts of all parameters as the part of one tensor."""
        from torch.distributed.tensor import DTensor

        first = parameters[0]
        if not isinstance(first, DTensor):
            return super().whole(parameters)
        rows = torch.stack([p.to_local() for p in parameters], dim=1).detach()  # type: ignore[attr-defined]
        shape = torch.Size([first.shape[0], len(parameters), *first.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        laid_out = DTensor.from_local(
            rows, first.device_mesh, first.placements, shape=shape, stride=stride
        )
        return laid_out.full_tensor().movedim(1, 0).contiguous()

    def add_gradients(self, parameters: list[nn.Parameter], grads: list[Tensor | None]) -> None:
        """Adds this rank's rows of each; of DTensors, theirs."""
        from torch.distributed.tensor import DTensor, Replicate

        own = list(grads)
        for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            if isinstance(parameter, DTensor) and not (grad is None or isinstance(grad, DTensor)):
                mesh = parameter.device_mesh
                whole = DTensor.from_local(grad, mesh, [Replicate()] * mesh.ndim)
                own[i] = whole.redistribute(placements=parameter.placements)
        super().add_gradients(parameters, own)

    def grad_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of the parts' norms."""
        norm: Any = super().grad_norm(parameters)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Reduce-scatters on the last micro-batch; until then adapter gradients are whole."""
        for unit in self._units:
            unit.set_requires_gradient_sync(last, recurse=False)
        yield


def _shard(unit: nn.Module, **settings: Any) -> None:
    """``fully_shard``. Before torch 2.13 it makes shards that could train, which bytes cannot
    (pytorch PR #177948): for the call they pass for one-byte floats.
    """
    from torch.distributed.fsdp import fully_shard

    stored = [
        (module, name)
        for module in unit.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.dtype == torch.uint8 and not hasattr(p, "device_mesh")
    ]

    def become(dtype: torch.dtype) -> None:
        for module, name in stored:
            # Storage of its own: FSDP2 keeps its view of what it made, and that of floats.
            own = getattr(module, name).detach().view(dtype).clone()
            setattr(module, name, nn.Parameter(own, requires_grad=False))

    become(torch.float8_e5m2)
    fully_shard(unit, **settings)
    become(torch.uint8)


def _group_size(over: int | str, world_size: int, ranks_per_node: int) -> int:
    return {"world": world_size, "node": ranks_per_node}.get(str(over)) or int(over)
