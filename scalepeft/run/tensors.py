"""The safetensors files of a checkpoint: written with their hash, read by ranges.

A tensor is whole, under its name, or in parts, each in the file of the rank that held it: the key
``name[start:stop]`` has elements start .. stop of the tensor, row after row, and the file's
metadata its shape.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalepeft.models.weights import DTYPES
from scalepeft.parallel.base import Part

PIECE = re.compile(r"(.+)\[(\d+):(\d+)\]")
PIECE_BYTES = 16 << 20  # written and hashed at one time
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    file: Path,
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]] | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes a safetensors file and flushes it to the disk; hashes what was to be written, not what
    a disk gives back.

    Args:
        file: to be made.
        tensors: CPU tensors by name; ``name[start:stop]`` for elements of a flattened one.
        shapes: whole shapes of the tensors that are written in part.
        check: called every 16 MiB; may raise.

    Returns:
        ``bytes`` and ``sha256`` for the manifest.

    Raises:
        OSError: the disk refused.
    """
    header: dict[str, Any] = {}
    if shapes:
        header["__metadata__"] = {"shapes": json.dumps(shapes)}
    end = 0
    # A multiple of 8 first: safetensors wants every tensor aligned to its numbers.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with file.open("wb", buffering=0) as f:

        def write(data: memoryview) -> None:
            for start in range(0, len(data), PIECE_BYTES):
                check()
                piece = data[start : start + PIECE_BYTES]
                digest.update(piece)
                while piece:
                    piece = piece[f.write(piece) :]

        write(memoryview(len(head).to_bytes(8, "little") + head))
        for name in (n for n in header if n != "__metadata__"):
            flat = tensors[name].detach().contiguous().view(-1)
            if flat.numel():
                write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        os.fsync(f.fileno())
    return {"bytes": 8 + len(head) + end, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class _Piece:
    file: Path
    offset: int
    start: int
    stop: int


class Reader:
    """The tensors of a checkpoint, read by ranges: no byte more than asked for.

    Raises:
        ValueError: the files do not hold each element of each tensor exactly once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._open: dict[Path, int] = {}
        manifest = json.loads((folder / "manifest.json").read_text())
        files, tensors = manifest["files"], manifest.get("tensors")
        for file in [folder / name for name in files if name.endswith(".safetensors")]:
            with file.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                self._index(file, 8 + length, json.loads(f.read(length)))
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            ends = [0, *(piece.stop for piece in pieces)]
            if [p.start for p in pieces] != ends[:-1] or ends[-1] != self.numel(name):
                raise ValueError(f"{name} is not whole: there are {ends[1:]} of {self.numel(name)}")

        if tensors not in (None, len(self.shapes)):
            raise ValueError(f"there are {len(self.shapes)} tensors of {tensors}")

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def _index(self, file: Path, base: int, header: dict[str, Any]) -> None:
        wholes = json.loads(header.pop("__metadata__", {}).get("shapes", "{}"))
        for key, info in header.items():
            match = PIECE.fullmatch(key)
            name = match[1] if match else key
            numel = torch.Size(info["shape"]).numel()
            start = int(match[2]) if match else 0
            self.shapes[name] = tuple(wholes[name] if match else info["shape"])
            self.dtypes[name] = DTYPES[info["dtype"]]
            piece = _Piece(file, base + info["data_offsets"][0], start, start + numel)
            self._pieces.setdefault(name, []).append(piece)

    def numel(self, name: str) -> int:
        """Elements of the whole tensor."""
        return torch.Size(self.shapes[name]).numel()

    def fill(self, name: str, part: Part) -> None:
        """Reads the elements of a part into it. Raises OSError."""
        size = self.dtypes[name].itemsize
        for piece in self._pieces[name]:
            first, last = max(piece.start, part.start), min(piece.stop, part.stop)
            if first >= last:
                continue
            if piece.file not in self._open:
                self._open[piece.file] = os.open(piece.file, os.O_RDONLY)
            buffer = bytearray((last - first) * size)
            at, view = piece.offset + (first - piece.start) * size, memoryview(buffer)
            while view:
                if not (got := os.preadv(self._open[piece.file], [view], at)):
                    raise OSError(errno.EIO, f"{piece.file} ended while it was read")
                at, view = at + got, view[got:]
            self.bytes_read += len(buffer)
            part.put(first, torch.frombuffer(buffer, dtype=self.dtypes[name]))

    def whole(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        flat = torch.empty(self.numel(name), dtype=self.dtypes[name])
        self.fill(name, Part(flat, 0, self.shapes[name]))
        return flat.view(self.shapes[name])
