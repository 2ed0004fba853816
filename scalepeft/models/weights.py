"""Base weights from safetensors: each rank reads, quantises and holds only its own rows."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.parallel.base import full_shape, local_part

PIECE_BYTES = 64 << 20  # rows read and quantised at one time
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# Keys of config.json that do not change what the model computes here.
COSMETIC = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file


@dataclass(frozen=True)
class Stored:
    """A tensor of any dtype as it lies in a shard; ``dtype`` is the name safetensors gives it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Weights:
    """The tensors of a model folder, read by rows with ``pread``: no memory map, no byte more than
    asked for.

    Raises:
        UserError: names the shard that is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.entries: dict[str, _Entry] = {}
        self._headers: list[tuple[str, int, bytes]] = []
        for file in self._files():
            self._read_header(file)

    def _files(self) -> Iterable[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(
                    f"{index}: broken index: {type(error).__name__}: {error}; copy it again"
                ) from None
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"model.path={self.folder}: no *.safetensors there; convert other formats once with"
                " transformers' save_pretrained"
            )
        return files

    def _read_header(self, file: Path) -> None:
        try:
            size = file.stat().st_size
            with file.open("rb") as f:
                head = f.read(8)
                length = int.from_bytes(head, "little")
                header = f.read(length) if len(head) == 8 and length <= size - 8 else b""
        except OSError as error:
            raise UserError(f"{file}: shard cannot be read: {error.strerror}") from None
        if not header:
            raise UserError(
                f"{file}: truncated: {size} bytes, too short for its header; copy it again"
            )
        self._headers.append((file.name, size, header))
        end = 0
        try:
            for name, info in json.loads(header).items():
                if name == "__metadata__":
                    continue
                first, last = info["data_offsets"]
                end = max(end, last)
                if info["dtype"] in DTYPES:
                    dtype = DTYPES[info["dtype"]]
                    self.entries[name] = _Entry(
                        file, dtype, tuple(info["shape"]), 8 + length + first
                    )
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{file}: not a safetensors file (its header is garbage); copy it again"
            ) from None
        if size != 8 + length + end:
            raise UserError(
                f"{file}: truncated or damaged: {size} bytes, its header says {8 + length + end};"
                " copy it again"
            )

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Reads rows ``first..last`` of a tensor (a 0-d or 1-d tensor's rows are its numbers)."""
        entry = self.entries[name]
        row = entry.dtype.itemsize
        for n in entry.shape[1:]:
            row *= n
        buffer = self._read(entry.file, entry.start + first * row, (last - first) * row)
        shape = (last - first, *entry.shape[1:])
        return (
            torch.frombuffer(buffer, dtype=entry.dtype).view(shape)
            if buffer
            else torch.empty(shape, dtype=entry.dtype)
        )

    def _read(self, file: Path, start: int, size: int) -> bytearray:
        buffer = bytearray(size)
        if buffer:
            with file.open("rb", buffering=0) as f:
                done = 0
                while done < size:
                    got = os.preadv(f.fileno(), [memoryview(buffer)[done:]], start + done)
                    if not got:
                        raise UserError(f"{file}: ended while it was read; copy it again")
                    done += got
        self.bytes_read += size
        return buffer

    def shards(self) -> Iterator[tuple[str, dict[str, str], list[Stored]]]:
        """Yields (file name, metadata, tensors in the order of their bytes) of every file."""
        for file, _, header in self._headers:
            table = json.loads(header)
            metadata = table.pop("__metadata__", {})
            tensors = []
            for name, t in table.items():
                start, stop = (8 + len(header) + offset for offset in t["data_offsets"])
                tensors.append(Stored(name, t["dtype"], tuple(t["shape"]), start, stop))
            yield file, metadata, sorted(tensors, key=lambda t: t.start)

    def pieces(self, file: str, tensor: Stored) -> Iterator[bytearray]:
        """Yields the bytes of a tensor as they lie in the file."""
        for start in range(tensor.start, tensor.stop, PIECE_BYTES):
            size = min(PIECE_BYTES, tensor.stop - start)
            yield self._read(self.folder / file, start, size)

    def fingerprint(self) -> str:
        """Returns the sha256 of what tells one base from another without reading all of a 70B.

        That is config.json (without cosmetic keys), every shard's name, size and header, and 4 KiB
        at 16 places of each shard.
        """
        shape = json.loads((self.folder / "config.json").read_text())
        digest = hashlib.sha256(
            json.dumps(
                {k: v for k, v in shape.items() if k not in COSMETIC}, sort_keys=True
            ).encode()
        )
        for name, size, header in self._headers:
            digest.update(f"{name} {size} ".encode() + header)
            with (self.folder / name).open("rb") as f:
                for i in range(16):
                    f.seek(max(0, size - 4096) * i // 15)
                    digest.update(f.read(4096))
        return digest.hexdigest()


def load_weights(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Fills this rank's rows of every base parameter from ``weights``, quantising on the way.

    A generator that stops after every module that holds parameters, so that ranks can agree in
    between; it takes the same number of turns on every rank.

    Args:
        model: with real (possibly sharded) parameters; adapters are left alone.
        weights: the folder's tensors.

    Raises:
        UserError: a tensor of the model is missing in the files or has another shape; nothing is
            guessed.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if module_name.endswith(".adapter") or ".adapter." in module_name:
            continue
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if n != "weight_scale"]
        for name, parameter in own:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                with torch.no_grad():
                    fill(module, f"{module_name}.{name}", name, parameter, weights)
        if own:
            yield


def fill(module: nn.Module, full_name: str, name: str, parameter: Tensor, weights: Weights) -> None:
    """Fills this rank's rows of one base parameter, quantising on the way.

    Args:
        module: what owns the parameter; of a quantised layer ``weight_scale`` is filled too.
        full_name: of the tensor in the files.
        name: of the parameter in the module.
        parameter: real, possibly sharded.
        weights: the folder's tensors.

    Raises:
        UserError: as ``load_weights``.
    """
    quantised = isinstance(module, quant.QuantLinear) and name == "weight"
    held = tuple(full_shape(parameter))
    shape = (held[0], module.in_features) if quantised else held
    entry = weights.entries.get(full_name)
    if entry is None:
        raise UserError(
            f"model.path={weights.folder}: no tensor '{full_name}' in {len(weights.entries)} found"
            " (or in a dtype other than F32, F16, BF16); the files are incomplete or of another"
            " architecture than config.json"
        )
    if entry.shape != shape:
        raise UserError(
            f"{entry.file}: '{full_name}' has shape {list(entry.shape)}, config.json says"
            f" {list(shape)}; config.json and weights are of different models"
        )
    parts = [local_part(parameter)]
    if quantised:
        assert isinstance(module, quant.QuantLinear)
        parts.append(local_part(module.weight_scale))
        quant.check_device(parts[0].data.device, module.fmt)
    widths = [max(1, math.prod(part.shape[1:])) for part in parts]
    rows_of = [
        (part.start // width, -(-part.stop // width))
        for part, width in zip(parts, widths, strict=True)
        if part.data.numel()
    ]
    first = min((start for start, _ in rows_of), default=0)
    last = max((stop for _, stop in rows_of), default=0)
    step = max(1, PIECE_BYTES // max(1, math.prod(entry.shape[1:]) * entry.dtype.itemsize))
    for begin in range(first, last, step):
        rows = [weights.rows(full_name, begin, min(begin + step, last))]
        if isinstance(module, quant.QuantLinear) and quantised:
            rows = list(module.fmt.encode(rows[0].to(parts[0].data.device, torch.float32)))
        for part, width, values in zip(parts, widths, rows, strict=True):
            part.put(begin * width, values.reshape(-1))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds between steps."""
    return sum(local_part(p).data.numel() * p.element_size() for p in model.parameters())
