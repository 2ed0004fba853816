"""The global order of samples, and each rank's micro-batches of a step."""

import signal
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scalepeft.data.tokens import IGNORED, PAD_TO, TokenSet
from scalepeft.parallel.ranks import Ranks


class Order:
    """The global sample order: ``index -> row`` is a permutation of the rows in each epoch, a
    function of (seed, epoch).
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._permutation = -1, [0]

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._permutation = torch.randperm(self.rows, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[position]


@dataclass(frozen=True)
class MicroBatch:
    """A rank's part of a step: right-padded ``input_ids`` and ``labels`` (rows, length), -100 where
    not learned.
    """

    input_ids: Tensor
    labels: Tensor
    samples: Tensor
    """Global index of each row's sample: counts on through the epochs."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies to the device, without waiting where the memory is pinned."""
        tensors = (self.input_ids, self.labels, self.samples)
        return MicroBatch(*(t.to(device, non_blocking=True) for t in tensors))


@dataclass(frozen=True)
class StepBatch:
    """One step: this rank's micro-batches; label tokens and tokens of the whole global batch."""

    step: int
    micro: list[MicroBatch]
    label_tokens: int
    tokens: int


class _Rows(Dataset[Any]):
    """Micro-batches of one rank as a map-style data set: item = (global index, row) pairs -> padded
    tensors.
    """

    def __init__(self, tokens: TokenSet) -> None:
        self.tokens = tokens

    def __getitem__(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        rows = [self.tokens.row(r) for _, r in pairs]
        length = -(-max(map(len, rows)) // PAD_TO) * PAD_TO
        ids = torch.zeros(len(pairs), length, dtype=torch.int64)
        labels = torch.full((len(pairs), length), IGNORED)
        for i, (row, (_, r)) in enumerate(zip(rows, pairs, strict=True)):
            start = int(self.tokens.label_start[r])
            ids[i, : len(row)] = row
            labels[i, start : len(row)] = row[start:]
        return ids, labels, torch.tensor([sample for sample, _ in pairs])


def _quiet_worker(_: int) -> None:
    # A signal to the process group is the trainer's to handle; a worker ends when the trainer does.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Loader:
    """Yields each step from ``first_step``: this rank's micro-batches and the global counts.

    Sample ``i`` of a step goes to rank ``i % world_size``. No attention mask is needed: the padding
    is on the right of a causal model and carries no label.
    """

    tokens: TokenSet
    ranks: Ranks
    first_step: int
    steps: int
    _: KW_ONLY
    global_batch: int
    micro_batch: int
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

    def _micro(self, step: int) -> list[list[tuple[int, int]]]:
        mine = self.step_pairs(step)[self.ranks.rank :: self.ranks.world_size]
        size = self.micro_batch
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def __iter__(self) -> Iterator[StepBatch]:
        last = self.first_step + self.steps
        loader = DataLoader(
            _Rows(self.tokens),
            sampler=(m for step in range(self.first_step, last) for m in self._micro(step)),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_quiet_worker if self.workers else None,
            pin_memory=self.ranks.device.type == "cuda",
            generator=torch.Generator(),  # its workers' seed, else from the global one
        )
        stream = iter(loader)
        for step in range(self.first_step, last):
            rows = [row for _, row in self.step_pairs(step)]
            micro = [MicroBatch(*next(stream)) for _ in self._micro(step)]
            yield StepBatch(step, micro, *self.tokens.count(rows))
