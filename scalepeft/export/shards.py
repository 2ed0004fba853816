"""A merged checkpoint's shards: filled by rows in any order, each has its name once whole."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scalepeft.core import safetensors
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.core.safetensors import SafetensorsFile
from scalepeft.models.sources import DTYPES, Source
from scalepeft.models.tensors import as_bytes, finite
from scalepeft.models.weights import PIECE_BYTES


class Shard:
    """A file to write, in place of the base's ``source``."""

    def __init__(self, file: str, source: SafetensorsFile, items: "list[Item]") -> None:
        self.file, self.source, self.items = file, source, items

    def begin(self, folder: Path) -> "list[Item]":
        """Makes the file; returns what is to be written, nothing if it was made before."""
        if (folder / self.file).is_file():
            say(f"{self.file} is there already")
            return []
        header = [(item.name, item.dtype, item.shape, item.size) for item in self.items]
        head, self._left = safetensors.header(header, self.source.metadata or {"format": "pt"})
        self._path, self._begun = folder / self.file, folder / f"{self.file}.begun"
        self._opened = self._begun.open("wb", buffering=0)
        self.write(0, head, 0)
        start = len(head)
        for item in self.items:
            item.shard, item.start = self, start
            start += item.size
        return self.items

    def write(self, start: int, data: bytes | memoryview, counted: int) -> None:
        """Writes bytes, ``counted`` of them of tensors; the last ones through to the disk."""
        self._opened.seek(start)
        piece = memoryview(data)
        while piece:
            piece = piece[self._opened.write(piece) :]
        self._left -= counted
        if not self._left:
            os.fsync(self._opened.fileno())
            self._opened.close()
            self._begun.rename(self._path)
            say(f"{self.file} written")


@dataclass(eq=False)
class Item:
    """A tensor to write; ``source`` is where the base has it, None for a bias that is new."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source | None
    written: int = 0  # rows, from the first on
    start: int = 0  # in the file of ``shard``
    shard: Shard | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def length(self) -> int:
        """Rows; a 0-d tensor is one."""
        return self.shape[0] if self.shape else 1

    @property
    def step(self) -> int:
        """Rows that are rounded at one time."""
        return max(1, PIECE_BYTES * self.length // max(1, self.size))

    def put(self, first: int, rows: Tensor) -> None:
        """Writes those of rows ``first ..`` that are the next; they may come more than once."""
        last = first + (len(rows) if self.shape else 1)
        if first <= self.written < last:
            assert self.shard is not None
            new = rows[self.written - first :] if self.shape else rows
            data = as_bytes(new.to(DTYPES[self.dtype]))
            at = self.start + self.size * self.written // self.length
            self.shard.write(at, data, len(data))
            self.written = last

    def put_new(self, value: Tensor) -> None:
        """Writes all of it, rounded once. Raises UserError: too large for the dtype."""
        for number, piece in enumerate(value.split(self.step)):
            rounded = piece.to(DTYPES[self.dtype])
            if not finite(rounded):
                what = f"{self.name}: the merged values do not fit into {self.dtype}"
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
