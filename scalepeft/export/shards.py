"""A merged checkpoint's shards: filled by rows in any order, each has its name once whole."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scalepeft.core import safetensors
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.core.safetensors import SafetensorsFile
from scalepeft.models.sources import DTYPES, Source
from scalepeft.models.tensors import as_bytes, finite
from scalepeft.models.weights import PIECE_BYTES


@dataclass(frozen=True)
class Item:
    """A tensor to write; ``source`` is where the base has it, None for a bias that is new."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source | None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """A file to write, and the base's that it comes from."""

    file: str
    source: SafetensorsFile
    items: list[Item]

    def begin(self, folder: Path) -> "Iterator[Place]":
        """Makes the file at its full size; yields the place of each tensor."""
        header = [(item.name, item.dtype, item.shape, item.size) for item in self.items]
        head, size = safetensors.header(header, self.source.metadata or {"format": "pt"})
        begun, start = _Begun(folder / self.file, size), len(head)
        begun.write(0, head)
        for item in self.items:
            yield Place(item, begun, start)
            start += item.size


class _Begun:
    def __init__(self, path: Path, size: int) -> None:
        self._path, self._begun = path, path.with_name(f"{path.name}.begun")
        self._file = self._begun.open("wb", buffering=0)
        self._left = size

    def write(self, start: int, data: Any) -> None:
        """Writes some bytes; once all tensors are there, through to the disk."""
        self._file.seek(start)
        piece = memoryview(data)
        while piece:
            piece = piece[self._file.write(piece) :]
        self._left -= len(data) if start else 0  # the header is no tensor
        if not self._left:
            os.fsync(self._file.fileno())
            self._file.close()
            self._begun.rename(self._path)
            say(f"{self._path.name} written")


class Place:
    """Where a tensor is written, by rows from the first one on."""

    def __init__(self, item: Item, begun: _Begun, start: int) -> None:
        self.item, self._begun, self._start, self._done = item, begun, start, 0
        length = item.shape[0] if item.shape else 1
        self._row = item.size // max(1, length)
        self.step = max(1, PIECE_BYTES // max(1, self._row))

    @property
    def whole(self) -> bool:
        """Whether all of it is written."""
        return self._done == (self.item.shape[0] if self.item.shape else 1)

    def put(self, first: int, rows: Tensor) -> None:
        """Writes those of rows ``first ..`` that are the next; they may come more than once."""
        last = first + (len(rows) if self.item.shape else 1)
        if first <= self._done < last:
            new = rows[self._done - first :] if self.item.shape else rows
            self._begun.write(
                self._start + self._done * self._row, as_bytes(new.to(DTYPES[self.item.dtype]))
            )
            self._done = last

    def put_new(self, value: Tensor) -> None:
        """Writes all of it, rounded once. Raises UserError: too large for the dtype."""
        for number, piece in enumerate(value.split(self.step)):
            rounded = piece.to(DTYPES[self.item.dtype])
            if not finite(rounded):
                what = f"{self.item.name}: the merged values do not fit into {self.item.dtype}"
                raise UserError(f"{what}; merge with --dtype fp32 or bf16")
            self.put(number * self.step, rounded)

    def follow(self, source: Source) -> None:
        """From now on what anyone reads of ``source`` is written."""
        read = source.rows

        def rows(first: int, last: int) -> Tensor:
            found = read(first, last)
            self.put(first, found)
            return found

        source.rows = rows  # type: ignore[method-assign]
