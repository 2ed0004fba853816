"""One rank's step of the real model, engine and trainer on fake tensors: memory by kind,
collectives, FLOP. Blocks are alike, so two short models give every figure as ``a + b * layers``.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scalepeft.adapters import inject as injection
from scalepeft.build import Built, engine_class
from scalepeft.config.schema import RunConfig
from scalepeft.data.loader import MicroBatch
from scalepeft.data.packing import padded
from scalepeft.models import loss, quant, structure
from scalepeft.parallel.base import Engine, Shares
from scalepeft.parallel.ranks import Ranks
from scalepeft.trainer import Trainer

KINDS = {  # of memory, in words
    "base": "base (frozen)",
    "adapter": "adapter",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "gathered": "gathered parameters",
    "dequantized": "dequantized weight",
    "activations": "activations",
    "loss": "logits and loss",
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "broadcast")
Exchange = tuple[str, int, int]
"""A collective's name, the number of ranks in it and of nodes they are on."""
Work = dict[tuple[str, Exchange | None, str], float]
"""(part of a step, collective, ``count`` or ``bytes`` of the full tensors) -> number; (part, None,
``flops``) -> FLOP."""


@dataclass
class Step:
    """A rank's memory and work in one optimizer step."""

    rows: int  # of a micro-batch, of data.cutoff tokens each
    micro: int  # micro-batches of a step on this rank
    parameters: tuple[int, int]  # of the base, trained
    shares: Shares  # what the engine says
    host: float  # bytes of this rank in the node's memory
    load: int  # bytes that this rank reads from the model's files
    restart: int  # the same of the next start, which may find a quantized copy
    checkpoint: int  # bytes of a checkpoint's tensors
    resident: dict[str, float]  # bytes between steps, by kind
    peak: dict[str, float]  # bytes at the peak, by kind
    alike: bool  # all blocks
    moment: str = ""  # of the step where the peak is
    exchanges: dict[Exchange, tuple[float, float]] = field(default_factory=dict)
    """Collective -> (count, bytes of the full tensors) in a step."""
    flops: float = 0.0  # of this rank in a step
    simulated: tuple[int, ...] = ()  # blocks of the simulated models

    @property
    def resident_bytes(self) -> float:
        """Bytes between steps."""
        return sum(self.resident.values())

    @property
    def peak_bytes(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak.values())


@dataclass
class Figures:
    """What one simulated step shows; every number is linear in the number of layers."""

    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    """Moment of the step -> kind -> bytes alive at that moment's own peak."""
    work: Work = field(default_factory=lambda: defaultdict(float))


class Tracker(TorchDispatchMode):
    """Follows every storage from the operator that makes it until it is freed, by kind; not scratch
    inside one. What a step reads on the host is made up: a number is 1, every place of a mask true.
    """

    def __init__(self, per_node: int) -> None:
        super().__init__()
        self.kind: str | None = "activations"  # None: it has no memory in a real run
        self.moment, self.part = "start", "control"
        self.now: Counter[str] = Counter()
        self.figures = Figures()
        self._per_node = per_node
        self._followed: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again with the local tensors
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default:
            rows = torch.arange(args[0].numel(), device=args[0].device)
            return rows[:, None].expand(-1, args[0].dim())
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.follow(t.untyped_storage())
        if func.namespace in ("c10d", "_c10d_functional"):
            self._exchanged(func, args, out)
        else:
            self._computed(func, args, kwargs or {}, out)
        return out

    def follow(self, storage: torch.UntypedStorage, kind: str | None = None) -> None:
        """Begins to follow a storage, or gives it another kind."""
        key, made_for = storage._cdata, kind or self.kind
        if made_for is None:
            return
        if key not in self._followed:
            self._followed[key] = (made_for, 0)
            weakref.finalize(storage, self._freed, key)
            self.resized(storage, storage.nbytes())
        elif kind is not None:
            size = self._freed(key)
            self._followed[key] = (kind, size)
            self.now[kind] += size

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Notes the size of a storage that is followed."""
        if storage._cdata not in self._followed:
            return
        kind, old = self._followed[storage._cdata]
        self._followed[storage._cdata] = (kind, size)
        self.now[kind] += size - old
        self.at(self.moment)

    def _freed(self, key: int) -> int:
        kind, size = self._followed.pop(key)
        self.now[kind] -= size
        return size

    def at(self, moment: str) -> None:
        """From here on the step is at this moment."""
        self.moment = moment
        peak = self.figures.moments.get(moment)
        if peak is None or self.now.total() > sum(peak.values()):
            self.figures.moments[moment] = dict(self.now)

    @contextmanager
    def doing(self, kind: str | None) -> Iterator[None]:
        """What is allocated within, or by a function that this decorates, is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def _exchanged(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        called = func._opname.replace("_", "")
        name = next((n for n in COLLECTIVES if n.replace("-", "") in called), None)
        if name is None:
            return  # waits and barriers
        if isinstance(args[-1], str):
            found = dist.distributed_c10d._resolve_process_group(args[-1])  # type: ignore[arg-type]
        else:  # it comes before the kind of reduction, another such object
            its = next(value for value in args if isinstance(value, torch.ScriptObject))
            found = dist.ProcessGroup.unbox(its)
        group = dist.get_process_group_ranks(found)
        key = name, len(group), len({rank // self._per_node for rank in group})
        parts = (tree_leaves(part) for part in (*args, out))
        sizes = (sum(t.nbytes for t in part if isinstance(t, Tensor)) for part in parts)
        self.figures.work[self.part, key, "count"] += 1
        self.figures.work[self.part, key, "bytes"] += max(sizes)

    def _computed(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        flops = 0
        if "attention" in func._opname:
            at = 1 if "backward" in func._opname else 0
            (*_, length, width), keys = args[at].shape, args[at + 1].shape[-2]
            flops = (10 if at else 4) * args[at].shape[:-2].numel() * length * keys * width
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.figures.work[self.part, None, "flops"] += flops


def stretch(a: Figures, b: Figures, lengths: tuple[int, int], layers: int) -> Figures:
    """The figures of a model with ``layers`` blocks from those of two shorter ones."""
    la, lb = lengths

    def line(x: float, y: float) -> float:
        return x + (y - x) * (layers - la) / (lb - la)

    names = [[name] * 3 for name in ("start", "loss", "step")]
    for blocks in (0, 0, 0), (1, 1, 1), (la - 2, lb - 2, layers - 2), (la - 1, lb - 1, layers - 1):
        names += [[f"{way} {block}" for block in blocks] for way in ("forward", "backward")]
    stretched = Figures()
    for i, j, name in names:
        at_a, at_b = a.moments.get(i, {}), b.moments.get(j, {})
        bytes_at = {kind: line(at_a.get(kind, 0), at_b.get(kind, 0)) for kind in KINDS}
        stretched.moments[name] = {kind: max(0.0, size) for kind, size in bytes_at.items()}
    for key in {**a.work, **b.work}:
        stretched.work[key] = line(a.work[key], b.work[key])
    return stretched


def simulate(config: RunConfig, folder: Path, world: int, per_node: int, step: Step) -> Figures:
    """Run one optimizer step of rank 0 on fake tensors; two micro-batches stand for more."""
    assert not dist.is_initialized(), "plan runs in a process of its own"
    tracker, ranks, shares = Tracker(per_node), Ranks(0, world), step.shares
    with ExitStack() as contexts:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        contexts.callback(dist.destroy_process_group)
        contexts.enter_context(torch.random.fork_rng(devices=[]))
        a_node = min(world, per_node)  # known here; really a collective
        contexts.enter_context(mock.patch.object(ranks, "ranks_a_node", return_value=a_node))
        for patch in _patches(tracker, shares):
            contexts.enter_context(patch)
        model = empty_model(config, folder)
        kind = engine_class(config) if shares.simulated else Engine
        engine = kind(replace(config.engine, compile="off"), ranks)
        engine.shard(model, structure.blocks_of(model))
        contexts.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        contexts.enter_context(tracker)
        structure.materialize(model, torch.device("cpu"))
        trainer = Trainer(config, ranks, Built(engine, model, {}, 0), "")
        _follow_state(trainer, tracker)
        _name_moments(tracker, structure.blocks_of(model))
        _name_parts(tracker, trainer)
        shape = step.rows, padded(config.data.cutoff)
        ids, labels = (torch.zeros(shape, dtype=torch.int64) for _ in "xy")
        samples, places = torch.zeros(step.rows).long(), torch.arange(ids[:, 1:].numel())
        batch = MicroBatch(ids, labels, samples, places)
        injection.train_mode(model)
        tracker.figures, tracker.part = Figures(), "control"  # what is alive stays
        tracker.at("start")
        ranks.any(False)  # of the training loop: shall we stop?
        trainer.step([batch] * min(step.micro, 2), 1, config.train.lr)
        return tracker.figures


def empty_model(config: RunConfig, folder: Path) -> nn.Module:
    """The model on the meta device as ``build`` shards it. Raise UserError as that does."""
    with redirect_stderr(StringIO()):  # which layers stay unquantized: the run itself says it
        model = structure.build(config.model, folder, config.train.precision)
    loss.add_token_loss(model)
    injection.inject(model, config.adapter)
    return model


def _patches(tracker: Tracker, shares: Shares) -> Iterator[Any]:
    """Tell the tracker what the engine, the loss and the storage formats are about to allocate."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        done = resize(storage, size)
        tracker.resized(storage, size)
        return done

    yield mock.patch.object(torch.UntypedStorage, "resize_", resized)
    work: list[tuple[Any, str, str | None]] = [
        *shares.marks,
        *((fmt, "decode", "dequantized") for fmt in (quant.NF4, quant.Int8)),
        (loss, "chunked_cross_entropy", "loss"),
        # DTensor asks fake tensors of the whole size what an operator's result looks like.
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", None),
    ]
    for owner, name, kind in work:
        if hasattr(owner, name):  # else another torch: its work counts as activations
            yield mock.patch.object(owner, name, tracker.doing(kind)(getattr(owner, name)))


def _follow_state(trainer: Trainer, tracker: Tracker) -> None:
    """Name what stays between steps, with the moments that a first step would leave behind."""
    for p in trainer.trained.values():
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    model = trainer.built.model
    state = [(t, "optimizer") for s in trainer.optimizer.state.values() for t in s.values()]
    for t in (*model.parameters(), *model.buffers()):
        state.append((t.detach(), "adapter" if t.requires_grad else "base"))
    for t, kind in state:
        local = t.to_local() if isinstance(t, DTensor) else t
        tracker.follow(local.untyped_storage(), kind)


def _name_moments(tracker: Tracker, blocks: list[nn.Module]) -> None:
    """Marks where each block begins, forward and backward, and the loss after the last one."""
    hooked: set[int] = set()

    def entered(block: nn.Module, _: Any) -> None:
        tracker.at(f"forward {blocks.index(block)}")
        for p in block.parameters():  # gathered now: these are what gradients come to
            if p.requires_grad and id(p) not in hooked:
                hooked.add(id(p))
                p.register_post_accumulate_grad_hook(got_gradient)

    def got_gradient(p: Tensor) -> None:
        if p.grad is not None and not isinstance(p.grad, DTensor):
            tracker.follow(p.grad.untyped_storage(), "gradients")

    def left(block: nn.Module, _: Any, output: Any) -> None:
        if block is blocks[-1]:
            tracker.at("loss")
        out = next(t for t in tree_leaves(output) if isinstance(t, Tensor))
        if out.requires_grad:
            out.register_hook(lambda _: tracker.at(f"backward {blocks.index(block)}"))

    for block in blocks:
        block.register_forward_pre_hook(entered)
        block.register_forward_hook(left)


def _name_parts(tracker: Tracker, trainer: Trainer) -> None:
    """Marks micro-batches (all but the last are alike) and the work after them."""
    engine, ranks = trainer.built.engine, trainer.ranks
    accumulate, norm, together = engine.accumulate, engine.grad_norm, ranks.sum

    def next_micro(last: bool) -> Any:
        tracker.part = "last" if last else "other"
        return accumulate(last)

    def after(parameters: list[nn.Parameter]) -> Tensor:
        tracker.at("step")
        tracker.kind = "optimizer"
        return norm(parameters)

    def summed(values: Tensor) -> Tensor:  # the loss, for the log
        tracker.part = "control"
        return together(values)

    ranks.sum = summed  # type: ignore[method-assign]
    engine.accumulate = next_micro  # type: ignore[method-assign]
    engine.grad_norm = after  # type: ignore[method-assign]
