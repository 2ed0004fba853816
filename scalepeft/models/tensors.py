"""A checkpoint's safetensors files: written with their hash, read by ranges. A tensor is whole, or
in parts: ``name[start:stop]`` has these elements, row after row, the metadata its shape.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalepeft.core import safetensors
from scalepeft.core.files import parse_json, read_text
from scalepeft.core.safetensors import SafetensorsFile
from scalepeft.models.sources import DTYPES
from scalepeft.parallel.base import Part

PIECE = re.compile(r"(.+)\[(\d+):(\d+)\]")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    file: Path,
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]] | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes a safetensors file, ``name[start:stop]`` for elements of a tensor whose shape is in
    ``shapes``; returns its ``bytes`` and ``sha256``. ``check``, every 16 MiB, may raise. OSError.
    """
    # Wide dtypes first: safetensors wants every tensor aligned to its numbers.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header = [(n, DTYPE_NAMES[t.dtype], t.shape, t.numel() * t.element_size()) for n, t in ordered]
    metadata = {"shapes": json.dumps(shapes)} if shapes else None
    pieces = (as_bytes(tensor) for _, tensor in ordered if tensor.numel())
    return safetensors.write(file, header, pieces, metadata, check)


def as_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, row after row; its own memory where it lies so on the CPU."""
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def finite(tensor: Tensor) -> bool:
    """Whether all values are numbers: one pass, where ``isfinite`` makes tensors of its own."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


@dataclass(frozen=True)
class _Piece:
    file: SafetensorsFile
    offset: int
    start: int
    stop: int


class Reader:
    """A checkpoint's tensors by ranges. Raises ValueError: an element is missing, or is twice."""

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        manifest = parse_json(read_text(folder / "manifest.json"))
        kept = [name for name in manifest["files"] if name.endswith(".safetensors")]
        self.files = [SafetensorsFile(folder / name) for name in kept]
        for file in self.files:
            wholes = parse_json(file.metadata.get("shapes", "{}"))
            for key, stored in file.tensors.items():
                match = PIECE.fullmatch(key)
                name, start = (match[1], int(match[2])) if match else (key, 0)
                self.shapes[name] = tuple(wholes[name]) if match else stored.shape
                self.dtypes[name] = DTYPES[stored.dtype]
                piece = _Piece(file, stored.start, start, start + stored.numel)
                self._pieces.setdefault(name, []).append(piece)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            ends = [0, *(piece.stop for piece in pieces)]
            if [p.start for p in pieces] != ends[:-1] or ends[-1] != self.numel(name):
                raise ValueError(f"{name} is not whole: there are {ends[1:]} of {self.numel(name)}")
        if manifest.get("tensors") not in (None, len(self.shapes)):
            raise ValueError(f"there are {len(self.shapes)} tensors of {manifest['tensors']}")

    @property
    def bytes_read(self) -> int:
        """Of tensors, in all."""
        return sum(file.bytes_read for file in self.files)

    def numel(self, name: str) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shapes[name])

    def fill(self, name: str, part: Part) -> None:
        """Reads the elements of a part into it. Raises OSError."""
        dtype = self.dtypes[name]
        for piece in self._pieces[name]:
            first, last = max(piece.start, part.start), min(piece.stop, part.stop)
            if first < last:
                at = piece.offset + (first - piece.start) * dtype.itemsize
                buffer = piece.file.read(at, (last - first) * dtype.itemsize)
                part.put(first, torch.frombuffer(buffer, dtype=dtype))

    def whole(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        flat = torch.empty(self.numel(name), dtype=self.dtypes[name])
        self.fill(name, Part(flat, 0, self.shapes[name]))
        return flat.view(self.shapes[name])
