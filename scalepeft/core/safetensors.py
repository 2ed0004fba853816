"""safetensors files: a checked header, reads by ranges, and a streamed write that hashes.

The library's reader maps memory, slow on shared file systems; its writer wants all tensors at once.
"""

import errno
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.core.files import parse_json

Named = tuple[str, str, Sequence[int], int]  # name, safetensors' dtype, shape, bytes
PIECE_BYTES = 16 << 20  # written and hashed at one time


class DamagedFile(ValueError):
    """Not a whole safetensors file; the message says why, without the file's name."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: bytes ``start`` .. ``stop`` of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class SafetensorsFile:
    """A file's checked header; ``tensors`` by name, in the order of their bytes. Raises
    DamagedFile: truncated, longer than its header says, or not safetensors; OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.bytes_read = path, path, 0  # place: where it is read
        self._descriptor: int | None = None
        self.size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            self.header = f.read(length) if length <= self.size - 8 else b""
        if not self.header:
            raise DamagedFile(f"truncated: {self.size} bytes, too short for its header")
        begin = 8 + length
        try:
            table = parse_json(self.header)
            self.metadata: dict[str, str] = table.pop("__metadata__", {})
            stored = [
                Stored(name, t["dtype"], tuple(t["shape"]), *(begin + i for i in t["data_offsets"]))
                for name, t in table.items()
            ]
            end = max((tensor.stop for tensor in stored), default=begin)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedFile("not a safetensors file (its header is garbage)") from None
        if self.size != end:
            raise DamagedFile(f"truncated or damaged: {self.size} bytes, its header says {end}")
        self.tensors = {t.name: t for t in sorted(stored, key=lambda t: t.start)}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def move(self, place: Path) -> None:
        """Read a copy of the file, open from now on: another may remove it. Raises OSError."""
        before, self._descriptor = self._descriptor, os.open(place, os.O_RDONLY)
        self.place = place
        if before is not None:
            os.close(before)

    def read(self, start: int, size: int) -> bytearray:
        """Return ``size`` bytes from ``start`` on. Raises OSError, also where the file ends."""
        if self._descriptor is None:
            self._descriptor = os.open(self.place, os.O_RDONLY)
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            if not (got := os.preadv(self._descriptor, [view], start)):
                raise OSError(errno.EIO, "ended while it was read", str(self.place))
            start, view = start + got, view[got:]
        self.bytes_read += size
        return buffer

    def pieces(self, tensor: Stored, size: int = PIECE_BYTES) -> Iterator[bytearray]:
        """Yield the bytes of a tensor as they lie in the file, ``size`` at a time."""
        for start in range(tensor.start, tensor.stop, size):
            yield self.read(start, min(size, tensor.stop - start))


def header(tensors: Iterable[Named], metadata: dict[str, str] | None) -> tuple[bytes, int]:
    """Return what a file begins with, and the bytes of the tensors behind it."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape, size in tensors:
        offsets = [end, end + size]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text, end


def write(
    path: Path,
    tensors: Iterable[Named],
    pieces: Iterable[bytes | bytearray | memoryview],
    metadata: dict[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a file through to the disk; return ``bytes`` and ``sha256`` of what was to be written.

    ``pieces`` are the bytes of the ``tensors`` in their order, cut anywhere; ``check`` is called
    every 16 MiB and may raise.
    """
    head, size = header(tensors, metadata)
    digest, hashed = hashlib.sha256(), None
    with path.open("wb", buffering=0) as f, ThreadPoolExecutor(1) as hasher:
        for data in itertools.chain([head], pieces):
            for start in range(0, len(data), PIECE_BYTES):
                check()
                if hashed is not None:
                    hashed.result()
                piece, begin = memoryview(data)[start : start + PIECE_BYTES], f.tell()
                hashed = hasher.submit(digest.update, piece)  # beside its write
                while piece:
                    piece = piece[f.write(piece) :]
                # The disk begins with it now, not when fsync asks for all of it.
                os.posix_fadvise(f.fileno(), begin, f.tell() - begin, os.POSIX_FADV_DONTNEED)
        os.fsync(f.fileno())
        assert f.tell() == len(head) + size, (path, f.tell(), size)  # else it is our own bug
    return {"bytes": len(head) + size, "sha256": digest.hexdigest()}
