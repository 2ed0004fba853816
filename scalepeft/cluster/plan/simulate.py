"""One rank's training step on fake tensors: what is alive by kind, collectives and FLOP.

The model, the engine and the trainer are the real ones; tensors have shapes and no values, and the
process group talks to nobody. Blocks are alike, so two short models give every figure as
``a + b * layers``, at each moment where a step can be at its peak.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
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
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from scalepeft.adapters import inject as injection
from scalepeft.build import Built, engine_class
from scalepeft.cluster.plan.tracker import Figures, Tracker
from scalepeft.config.schema import RunConfig
from scalepeft.data.loader import MicroBatch
from scalepeft.data.tokens import PAD_TO
from scalepeft.models import loss, quant, structure
from scalepeft.parallel.base import Engine, Shares
from scalepeft.parallel.ranks import Ranks
from scalepeft.trainer import Trainer


class FakeRanks(Ranks):
    """Rank 0 of ``world``, ``per_node`` on a node; the others exist in name only."""

    def __init__(self, world: int, per_node: int) -> None:
        super().__init__(0, world)
        self._per_node = min(world, per_node)

    def ranks_a_node(self) -> int:
        """Known here; really a collective."""
        return self._per_node


@contextmanager
def fake_ranks(world: int, per_node: int) -> Iterator[FakeRanks]:
    """A process group that talks to nobody."""
    assert not dist.is_initialized(), "plan runs in a process of its own"
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield FakeRanks(world, per_node)
    finally:
        dist.destroy_process_group()


@contextmanager
def _watched(tracker: Tracker, shares: Shares) -> Iterator[None]:
    """Tell the tracker what the engine, the loss and the storage formats are about to allocate."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        done = resize(storage, size)
        tracker.resized(storage, size)
        return done

    work: list[tuple[Any, str, str | None]] = [
        *shares.marks,
        *((fmt, "decode", "dequantized") for fmt in (quant.NF4, quant.Int8)),
        (loss, "chunked_cross_entropy", "loss"),
        # DTensor asks fake tensors of the whole size what an operator's result looks like.
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", None),
    ]
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        # Which looks at values, and with fake ones would give every layer a (length, length) mask.
        packed = "find_packed_sequence_indices"
        if hasattr(masking_utils, packed):
            patches.enter_context(mock.patch.object(masking_utils, packed, return_value=None))
        for owner, name, kind in work:
            if not hasattr(owner, name):  # another torch: its work counts as activations
                continue
            wrapped = tracker.wrapped(getattr(owner, name), kind)
            patches.enter_context(mock.patch.object(owner, name, wrapped))
        yield


def _name_moments(tracker: Tracker, blocks: list[nn.Module]) -> None:
    """Marks where each block begins, forward and backward, and the loss after the last one."""
    hooked: set[int] = set()

    def entered(i: int, block: nn.Module) -> None:
        tracker.at(f"forward {i}")
        for p in block.parameters():  # gathered now: these are what gradients come to
            if p.requires_grad and id(p) not in hooked:
                hooked.add(id(p))
                p.register_post_accumulate_grad_hook(got_gradient)

    def got_gradient(p: Tensor) -> None:
        if p.grad is not None and not isinstance(p.grad, DTensor):
            tracker.follow(p.grad.untyped_storage(), "gradients")

    def left(i: int, output: Any) -> None:
        if i == len(blocks) - 1:
            tracker.at("loss")
        out = next(t for t in tree_leaves(output) if isinstance(t, Tensor))
        if out.requires_grad:
            out.register_hook(lambda _: tracker.at(f"backward {i}"))

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda m, _, i=i: entered(i, m))
        block.register_forward_hook(lambda m, _, out, i=i: left(i, out))


def simulate(
    config: RunConfig,
    folder: Path,
    world: int,
    per_node: int,
    rows: int,
    micro: int,
    shares: Shares,
) -> Figures:
    """Run one optimiser step of rank 0 on fake tensors; moments are named by the block's number.

    Args:
        config: of the run.
        folder: with the ``config.json`` of a model.
        world: ranks.
        per_node: ranks a node.
        rows: of a micro-batch, of ``data.cutoff`` tokens each.
        micro: micro-batches of a step on this rank; two stand for more.
        shares: what the engine says of itself.

    Raises:
        UserError: a model or target that cannot be.
    """
    tracker = Tracker(per_node)
    with ExitStack() as contexts:
        ranks = contexts.enter_context(fake_ranks(world, per_node))
        contexts.enter_context(torch.random.fork_rng(devices=[]))
        contexts.enter_context(_watched(tracker, shares))
        model = empty_model(config, folder)
        kind = engine_class(config) if shares.simulated else Engine
        engine = kind(config.engine, ranks)
        engine.shard(model, structure.blocks_of(model))
        with ExitStack() as modes:
            modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            modes.enter_context(tracker)
            _materialize(model, tracker)
            trainer = Trainer(config, ranks, Built(engine, model, {}, 0), "")
            _start_optimizer(trainer, tracker)
            _name_moments(tracker, structure.blocks_of(model))
            _name_parts(tracker, trainer)
            shape = rows, -(-config.data.cutoff // PAD_TO) * PAD_TO
            ids, labels = (torch.zeros(shape, dtype=torch.int64) for _ in "xy")
            batch = MicroBatch(ids, labels, torch.zeros(rows, dtype=torch.int64))
            model.train()
            tracker.begin()
            tracker.part = "control"
            ranks.any(False)  # of the training loop: shall we stop?
            trainer.step([batch] * min(micro, 2), 1, config.train.lr)
        return tracker.figures


def empty_model(config: RunConfig, folder: Path) -> nn.Module:
    """The adapted model on the meta device, as ``build`` makes it before it is sharded.

    Raises:
        UserError: as there.
    """
    with redirect_stderr(StringIO()):  # which layers stay unquantized: the run itself says it
        model = structure.build(config.model, folder, config.train.precision)
    injection.inject(model, config.adapter)
    loss.add_token_loss(model)
    return model


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _materialize(model: nn.Module, tracker: Tracker) -> None:
    structure.materialize(model, torch.device("cpu"))
    for t in (*model.parameters(), *model.buffers()):
        kind = "adapter" if t.requires_grad else "base"
        tracker.follow(_local(t.detach()).untyped_storage(), kind)


def _start_optimizer(trainer: Trainer, tracker: Tracker) -> None:
    """Give the optimizer its moments, which a first step would leave behind."""
    for p in trainer.trained.values():
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    for held in trainer.optimizer.state.values():
        for value in held.values():
            tracker.follow(_local(value).untyped_storage(), "optimizer")


def _name_parts(tracker: Tracker, trainer: Trainer) -> None:
    """Marks micro-batches (all but the last are alike) and the work after them."""
    engine = trainer.built.engine
    accumulate, norm = engine.accumulate, engine.grad_norm

    def next_micro(last: bool) -> Any:
        tracker.part = "last" if last else "other"
        return accumulate(last)

    def after(parameters: list[nn.Parameter]) -> float:
        tracker.at("step")
        tracker.kind = "optimizer"
        return norm(parameters)

    def summed(values: Tensor) -> Tensor:  # the loss, for the log
        tracker.part = "control"
        return together(values)

    ranks = trainer.ranks
    together = ranks.sum
    ranks.sum = summed  # type: ignore[method-assign]
    engine.accumulate = next_micro  # type: ignore[method-assign]
    engine.grad_norm = after  # type: ignore[method-assign]
