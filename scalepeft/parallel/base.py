"""The engine protocol: how parameters are spread over ranks, and how gradients come together."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from scalepeft.lookup import STRICT
from scalepeft.parallel.mesh import Ranks


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """What every engine's config has.

    Attributes:
        name: the engine, a file of ``scalepeft/parallel``.
        device: ``auto`` takes CUDA where there is one.
        activation_checkpointing: keep only each block's input for backward and run the block again
            there.
    """

    name: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    activation_checkpointing: bool = False


class Engine:
    """One way to spread a model. Gradients are SUMMED over micro-batches and ranks."""

    Config: ClassVar[type[EngineConfig]]
    needs_group: ClassVar[bool] = True
    """True where the engine needs a process group even for one process."""
    sharded: ClassVar[bool] = False
    """True where a forward is a collective, so that every rank must make the same number of them.
    """

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks

    @classmethod
    def check(cls, world_size: int) -> None:
        """Raises UserError where this engine cannot run at this world size."""

    def shard(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Spreads the model in place, on the meta device: activation checkpointing first, then the
        wrap.
        """
        if self.config.activation_checkpointing:
            for block in blocks:
                # An instance attribute: parameter names stay, and a wrapper's hooks run outside the
                # recomputation.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.wrap(model, blocks)

    def wrap(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Shards or replicates; by default does nothing."""

    def loaded(self, model: nn.Module) -> nn.Module:
        """Called once the weights are real; returns the module to call in training."""
        return model

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward: gradients are exchanged on the last one
        only.
        """
        return nullcontext()

    def grad_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """2-norm over all trained parameters, the same number on every rank."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float, norm: Tensor) -> None:
        """Scales the gradients in place so that their norm is at most ``max_norm`` (0: no
        clipping).
        """
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    def trainable_state(
        self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns (parameters, optimizer state) as full CPU tensors under canonical names; a
        collective.

        Optimizer names are ``<parameter>/exp_avg``, ``/exp_avg_sq`` and ``/step``; a parameter that
        never had a gradient has none.
        """
        moments = (
            (f"{name}/{key}", value)
            for name, parameter in trained.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        )
        return full_tensors(iter(trained.items())), full_tensors(moments)

    def load_optimizer_state(
        self,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: dict[str, Tensor],
    ) -> None:
        """Restores what ``trainable_state`` gave, whatever engine and world size it came from."""
        for key, value in state.items():
            name, _, kind = key.rpartition("/")
            held = optimizer.state[trained[name]]
            if kind == "step":
                held[kind] = value.clone()
            else:
                held[kind] = torch.zeros_like(trained[name])
                copy_rows(held[kind], value)


def local_rows(parameter: Tensor) -> tuple[Tensor, int, int]:
    """Returns (the local part, its first row, one past its last) of a plain tensor or a DTensor.

    A DTensor is sharded on rows or not at all.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0, parameter.shape[0] if parameter.dim() else 1
    assert all(p.is_replicate() or p.is_shard(0) for p in parameter.placements)
    local = parameter.to_local().detach()
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert local.shape == tuple(shape), (local.shape, shape)
    first = offset[0] if shape[0] else 0
    return local, first, first + shape[0]


@torch.no_grad()
def copy_rows(parameter: Tensor, full: Tensor) -> None:
    """Copies this rank's rows of ``full`` into a plain or sharded parameter."""
    local, first, last = local_rows(parameter)
    local.copy_(full[first:last] if parameter.dim() else full)


def full_tensors(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Gathers plain tensors or DTensors into full CPU tensors; a collective where something is
    sharded.
    """
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().contiguous()
        for name, t in named
    }
