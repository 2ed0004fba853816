"""The engine protocol: how parameters are spread over ranks, and how gradients come together."""

import math
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalepeft.core import kernels
from scalepeft.core.errors import UserError
from scalepeft.core.fields import ON_OFF, STRICT, Decides
from scalepeft.parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """What every engine's config has.

    Attributes:
        name: the engine, a file of ``scalepeft/parallel``.
        device: ``auto`` takes CUDA where there is one.
        activation_checkpointing: keep only each block's input for backward and run the block again
            there.
        compile: ``blocks``: torch.compile of each block's training; needs a C++ compiler on each
            node, and minutes at the start.
        kernels: ``auto``: on CUDA, Triton kernels for NF4 and dropout where they give the plain
            form's bits (looked at once); ``off``: the plain forms.
    """

    DECIDES: ClassVar = (Decides.SPEED,)

    name: str
    device: Annotated[Literal["auto", "cpu", "cuda"], Decides.SPEED, Decides.PLACE] = "auto"
    activation_checkpointing: bool = False
    compile: Annotated[Literal["off", "blocks"], ON_OFF] = "off"
    kernels: Annotated[Literal["auto", "off"], ON_OFF] = "auto"


MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's tensors of a parameter, in the order in which it makes them."""


@plain_dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor: elements ``start`` .. ``stop`` of it, row after row."""

    data: Tensor  # those elements, 1-d; the memory that is trained, not a copy
    start: int
    shape: tuple[int, ...]  # of the whole tensor
    mine: bool = True  # this rank, of those that hold it, writes it to checkpoints

    @property
    def stop(self) -> int:
        """One past the index of the last element."""
        return self.start + self.data.numel()

    @torch.no_grad()
    def put(self, at: int, values: Tensor) -> None:
        """Copies what falls into this part of 1-d ``values``, the elements from ``at`` on."""
        first, last = max(self.start, at), min(self.stop, at + values.numel())
        if first < last:
            self.data[first - self.start : last - self.start] = values[first - at : last - at]


@plain_dataclass(frozen=True)
class Shares:
    """How an engine spreads a training, as ``scalepeft plan`` needs to know it."""

    base: int = 1  # ranks that one copy of the frozen parameters is split among
    adapter: int = 1  # the same, of the trained parameters
    gradients: int = 1  # of their gradients; above 1 their parts stay between steps
    optimizer: int = 1  # of the optimizer's state
    by_rows: bool = False  # a part is whole rows of a tensor; else any 1/N of its elements
    copies: int = 0  # further copies of the trained parameters beside the optimizer's moments
    on_host: tuple[str, ...] = ()  # kinds that are in the node's memory and not in the GPU's
    simulated: bool = True  # the engine's own code, on fake tensors; else the step of one process
    # Laid over it: kind -> bytes while a step runs, and (collective, when, count, bytes of the full
    # tensors) in place of its own; when: every ``micro`` batch, the ``last`` one, once a ``step``.
    transient: dict[str, float] = field(default_factory=dict)
    exchanges: tuple[tuple[str, str, float, float], ...] = ()
    # (module, function, kind): what that function allocates is of that kind.
    marks: tuple[tuple[Any, str, str], ...] = ()


class Engine:
    """One way to spread a model. Gradients are SUMMED over micro-batches and ranks."""

    Config: ClassVar[type[EngineConfig]] = EngineConfig
    needs_group: ClassVar[bool] = True
    """True where the engine needs a process group even for one process."""
    sharded: ClassVar[bool] = False
    """True where a forward is a collective, of which every rank must make the same number."""
    takes_idle: ClassVar[bool] = True
    """False: every trained parameter must have a gradient after each ``backward``."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        kernels.allow(config.kernels == "auto")

    @classmethod
    def check(cls, world_size: int) -> None:
        """Raise UserError if this engine cannot run at this world size."""

    @classmethod
    def shares(cls, config: Any, model: nn.Module, world_size: int, ranks_per_node: int) -> Shares:
        """What a rank holds and exchanges of an adapted ``model`` on meta; by default all of it."""
        return Shares()

    def shard(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Spreads the model in place, on the meta device; compiled blocks first, then the wrap."""
        if self.config.compile == "blocks":
            self.ranks.all_or_raise(lambda: _check_compilers(self.ranks.device))
            torch._dynamo.config.recompile_limit = GRAPHS
            for block in blocks:
                block.forward = _compiled(block.forward)
        if self.config.activation_checkpointing:
            for block in blocks:
                # An instance attribute: parameter names stay, and a wrapper's hooks run outside the
                # recomputation. No generator's state is kept: blocks draw nothing (``train_mode``).
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
        self.wrap(model, blocks)

    def wrap(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Shards or replicates; by default does nothing."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Returns the module to call, with its weights there; no ``optimizer``: to be evaluated."""
        return model

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward; the last one exchanges gradients."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of ``loss``, inside ``accumulate``."""
        loss.backward()

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Context in which a formula over parameters can be computed outside of a forward."""
        return nullcontext()

    def whole(self, parameters: list[nn.Parameter]) -> Tensor:
        """Copies parameters of one shape, whole, into one tensor (n, ...) on every rank."""
        with self.gathered(parameters):
            return torch.stack([p.detach() for p in parameters])

    def sum_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Sums over the ranks, in place, what ``backward`` made of this rank's rows alone."""
        for bucket in buckets(tensors) if self.ranks.world_size > 1 else ():
            _all_reduce(bucket)

    def add_gradients(self, parameters: list[nn.Parameter], grads: list[Tensor | None]) -> None:
        """Adds to gradients that are summed over the ranks already (None: nothing)."""
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def grad_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """2-norm over all trained parameters, the same number on every rank's device."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def update(
        self, optimizer: torch.optim.Optimizer, max_norm: float, norm: Tensor, finite: Tensor
    ) -> None:
        """One optimizer step; gradients are first scaled to a norm of at most ``max_norm`` (0: no
        clipping) and then dropped. Where not ``finite`` (), nothing else changes.
        """
        if max_norm > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        # A fused optimizer's own word for a step to be skipped: it asks on the device.
        optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()

    def copies(self, tensor: Tensor) -> tuple[int, int]:
        """Returns (number of this rank's copy of a tensor's part, how many ranks hold the same)."""
        return self.ranks.rank, self.ranks.world_size

    def owner(self, parameter: nn.Parameter) -> Tensor:
        """The tensor by which the optimizer keeps the state of a parameter."""
        return parameter

    def part(self, parameter: nn.Parameter, state: Any, kind: str = "", turn: int = 0) -> Part:
        """This rank's part of a parameter or, of a ``kind``, of the optimizer's ``state`` of it;
        ``turn`` picks which of the ranks that hold the same writes it.
        """
        tensor = state[parameter][kind] if kind else parameter
        copy, count = self.copies(tensor)
        return replace(local_part(tensor), mine=turn % count == copy)

    def state_parts(
        self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, Part]:
        """This rank's parts of what is trained, by name, and of ``MOMENTS`` as ``NAME/exp_avg``."""
        found: dict[str, Part] = {}
        for i, (name, parameter) in enumerate(trained.items()):
            found[name] = self.part(parameter, optimizer.state, turn=i)
            for kind in optimizer.state.get(self.owner(parameter), {}):
                found[f"{name}/{kind}"] = self.part(parameter, optimizer.state, kind, i)
        return found

    def load_state_parts(
        self,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        names: Container[str],
        fill: Callable[[str, Part], None],
    ) -> None:
        """Restores what ``state_parts`` gave, whatever engine and world size it came from: ``fill``
        writes saved elements into a part; under these ``names`` something was saved.
        """
        for name, parameter in trained.items():
            fill(name, self.part(parameter, optimizer.state))
            owner = self.owner(parameter)
            for kind in MOMENTS:  # a later save writes them in the order in which they are made
                if (key := f"{name}/{kind}") in names:
                    scalar = torch.zeros((), device=owner.device)
                    empty = scalar if kind == "step" else torch.zeros_like(owner)
                    optimizer.state[owner].setdefault(kind, empty)
                    fill(key, self.part(parameter, optimizer.state, kind))

    def state_loaded(self) -> None:
        """Called on all ranks once each has restored its parts."""


GRAPHS = 64
"""Of one function at most; torch's 8 are soon used: of the first shape, of all others, of one line
or several, of few tokens or many (HOFT), each for the first block and for the others."""


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward, compiled for training alone: a generation would bring ever new shapes."""
    fast = torch.compile(forward)
    return lambda *args, **kwargs: (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)


def _check_compilers(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second, which few runs need
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    missing = "" if device.type == "cpu" or has_triton() else "triton"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        missing = "a C++ compiler (g++, or what CXX names)"
    if missing:
        fix = "install it, or set engine.compile=off"
        raise UserError(f"engine.compile=blocks needs {missing}; {fix}")


BUCKET = 25_000_000  # elements that are summed at one time


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in order, at most ``BUCKET`` elements together (a larger one alone)."""
    found: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not found or size + tensor.numel() > BUCKET:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.numel()
    return found


def _all_reduce(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.view(-1) for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_([t.view(-1) for t in tensors], list(parts))


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole tensor, where ZeRO-3 keeps an empty one between forwards too."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_part(parameter: Tensor) -> Part:
    """This rank's part of a plain tensor, a DTensor (whole, or rows) or one that ZeRO-3 cuts."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = tuple(full_shape(parameter))
    if (shard := getattr(parameter, "ds_tensor", None)) is not None:
        assert isinstance(shard, Tensor)
        start = min(parameter.ds_zero_partition_rank * shard.numel(), math.prod(shape))  # type: ignore[attr-defined]
        return Part(shard.detach()[: math.prod(shape) - start], start, shape)
    if not isinstance(parameter, DTensor):
        return Part(parameter.detach().view(-1), 0, shape)
    assert all(p.is_replicate() or p.is_shard(0) for p in parameter.placements)
    local = parameter.to_local().detach()
    rows, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert local.shape == tuple(rows), (local.shape, rows)
    start = offset[0] * math.prod(shape[1:]) if local.numel() else 0
    return Part(local.view(-1), start, shape)


def copy_rows(parameter: Tensor, full: Tensor) -> None:
    """Copies this rank's part of ``full`` into a parameter."""
    local_part(parameter).put(0, full.reshape(-1))
