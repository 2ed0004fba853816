"""The global order of samples, and each rank's micro-batches of a step."""

import math
import signal
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scalepeft.data.packing import micro_batches, padded
from scalepeft.data.tokens import IGNORED, TokenSet, label_places
from scalepeft.parallel.ranks import Ranks


class Order:
    """The global order: ``index -> row``, in each epoch a permutation made of (seed, epoch)."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._permutation = -1, torch.zeros(0)

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._permutation = torch.randperm(self.rows, generator=generator)
            self._epoch = epoch
        return int(self._permutation[position])


@dataclass(frozen=True)
class MicroBatch:
    """A rank's right-padded ids and labels (lines, length), -100 where not learned."""

    input_ids: Tensor
    labels: Tensor
    samples: Tensor
    """Global index of each line's sample, or of each token's (lines, length) where lines are
    packed: counts on through the epochs."""
    places: Tensor | None = None
    """``label_places`` of the labels; None: the loss looks for them."""
    positions: Tensor | None = None
    """Each token's position in its row (lines, length), where lines are packed."""
    on_host: Tensor | None = None
    """Of a batch on a device: its positions on the host."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies to the device, without waiting where the memory is pinned."""
        held = {k: t for k, t in vars(self).items() if t is not None and k != "on_host"}
        moved = {k: t.to(device, non_blocking=True) for k, t in held.items()}
        return MicroBatch(**moved, on_host=self.positions)


@dataclass(frozen=True)
class StepBatch:
    """One step: this rank's micro-batches; label tokens and tokens of the whole global batch."""

    step: int
    micro: list[MicroBatch]
    label_tokens: int
    tokens: int


Line = list[tuple[int, int]]
"""Rows of a line: (global index of the sample, row of the token set)."""


class _Rows(Dataset[Any]):
    """A rank's part of a step as an item of a map-style data set: lines -> padded tensors."""

    def __init__(self, tokens: TokenSet, packed: bool) -> None:
        self.tokens, self.packed = tokens, packed

    def __getitem__(self, micro: list[list[Line]]) -> list[tuple[Tensor, ...]]:
        return [self._padded(lines) for lines in micro]

    def _padded(self, lines: list[Line]) -> tuple[Tensor, ...]:
        rows = [[self.tokens.row(r) for _, r in line] for line in lines]
        longest = max((sum(map(len, line)) for line in rows), default=1)
        shape = max(1, len(lines)), padded(longest)
        ids, samples = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        labels, positions = torch.full(shape, IGNORED), torch.arange(shape[1]).repeat(shape[0], 1)
        for i, line in enumerate(lines):
            begin = 0
            for (sample, r), row in zip(line, rows[i], strict=True):
                end = begin + len(row)
                ids[i, begin:end] = row
                labels[i, begin:end] = self.tokens.labels(r)
                samples[i, begin:], positions[i, begin:] = sample, torch.arange(shape[1] - begin)
                begin = end
            positions[i, begin:] = torch.arange(shape[1] - begin)  # nor does padding see a row
        places = label_places(labels)
        if not self.packed:
            return ids, labels, samples[:, 0], places
        return ids, labels, samples, places, positions


def _quiet_worker(_: int) -> None:
    # A signal to the process group is the trainer's to handle; a worker ends when the trainer does.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Loader:
    """Yields each step from ``first_step``: this rank's micro-batches and the global counts.

    Sample ``i`` of a step goes to rank ``i % world_size``; where lines are packed, to any rank, so
    that all have about as many tokens. All ranks get as many micro-batches, if need be without a
    row. Padding is on the right of a causal model and carries no label.
    """

    tokens: TokenSet
    ranks: Ranks
    first_step: int
    steps: int
    _: KW_ONLY
    global_batch: int
    micro_batch: int  # rows of one that is not packed
    micro_tokens: int | None = None  # tokens of one that is; None: not packed
    width: float = float("inf")  # as ``packing.lines`` takes it
    seed: int = 0
    workers: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        self.order: Any = Order(rows, self.seed) if self.shuffle else range(rows)

    def step_pairs(self, step: int) -> list[tuple[int, int]]:
        """(global sample index, row) of every sample of a step."""
        last = (step + 1) * self.global_batch
        if not self.shuffle:  # one pass, whose last batch may be short
            last = min(last, len(self.tokens))
        return [(i, self.order[i]) for i in range(step * self.global_batch, last)]

    def _micro(self, step: int) -> list[list[Line]]:
        pairs, (rank, world) = self.step_pairs(step), (self.ranks.rank, self.ranks.world_size)
        if self.micro_tokens is not None:
            lengths = [len(self.tokens.row(row)) for _, row in pairs]
            dealt = micro_batches(lengths, world, self.micro_tokens, self.width)[rank]
            return [[[pairs[i] for i in line] for line in lines] for lines in dealt]
        mine, size = [[pair] for pair in pairs[rank::world]], self.micro_batch
        return [mine[i : i + size] for i in range(0, math.ceil(len(pairs) / world), size)]

    def __iter__(self) -> Iterator[StepBatch]:
        steps = range(self.first_step, self.first_step + self.steps)
        loader = DataLoader(
            _Rows(self.tokens, self.micro_tokens is not None),
            sampler=map(self._micro, steps),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_quiet_worker if self.workers else None,
            pin_memory=self.ranks.device.type == "cuda",
            generator=torch.Generator(),  # its workers' seed, else from the global one
        )
        for step, micro in zip(steps, loader, strict=True):
            rows = [row for _, row in self.step_pairs(step)]
            yield StepBatch(step, [MicroBatch(*one) for one in micro], *self.tokens.count(rows))
