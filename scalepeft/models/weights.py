"""Base weights from safetensors: each rank reads, quantizes and holds only its own rows."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scalepeft.core.errors import UserError
from scalepeft.core.safetensors import DamagedFile, SafetensorsFile, Stored
from scalepeft.models import quant
from scalepeft.parallel.base import full_shape, local_part

PIECE_BYTES = 64 << 20  # rows read and quantized at one time
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# Keys of config.json that do not change what the model computes here.
COSMETIC = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a model folder: which file has it, and where."""

    file: SafetensorsFile
    stored: Stored

    @property
    def dtype(self) -> torch.dtype:
        """As the file holds it."""
        return DTYPES[self.stored.dtype]


class _Shard(SafetensorsFile):
    def read(self, start: int, size: int) -> bytearray:
        try:
            return super().read(start, size)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; copy it again") from None


class Weights:
    """The tensors of a model folder, read by rows: no memory map, no byte more than asked for.

    Attributes:
        files: in the order of their names.
        entries: the tensors in a float dtype, by name.

    Raises:
        UserError: names the shard that is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [self._open(path) for path in self._paths()]
        self.entries = {
            name: Entry(file, stored)
            for file in self.files
            for name, stored in file.tensors.items()
            if stored.dtype in DTYPES
        }

    def _paths(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{index}: broken index: {reason}; copy it again") from None
            return [self.folder / name for name in names]
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"model.path={self.folder}: no *.safetensors there; convert other formats once with"
                " transformers' save_pretrained"
            )
        return paths

    @staticmethod
    def _open(path: Path) -> SafetensorsFile:
        try:
            return _Shard(path)
        except OSError as error:
            raise UserError(f"{path}: shard cannot be read: {error.strerror}") from None
        except DamagedFile as error:
            raise UserError(f"{path}: {error}; copy it again") from None

    @property
    def bytes_read(self) -> int:
        """Of all files, headers apart."""
        return sum(file.bytes_read for file in self.files)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Reads rows ``first..last`` of a tensor (a 0-d or 1-d tensor's rows are its numbers).

        Raises:
            UserError: the file ended, or cannot be read any more.
        """
        entry = self.entries[name]
        stored, dtype = entry.stored, entry.dtype
        shape = (last - first, *stored.shape[1:])
        row = math.prod(stored.shape[1:]) * dtype.itemsize
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        buffer = entry.file.read(stored.start + first * row, (last - first) * row)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def fingerprint(self) -> str:
        """Returns the sha256 of what tells one base from another without reading all of a 70B.

        That is config.json (without cosmetic keys), every shard's name, size and header, and 4 KiB
        at 16 places of each shard.
        """
        config = json.loads((self.folder / "config.json").read_text())
        decisive = {k: v for k, v in config.items() if k not in COSMETIC}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
        for file in self.files:
            digest.update(f"{file.path.name} {file.size} ".encode() + file.header)
            with file.path.open("rb") as f:
                for i in range(16):
                    f.seek(max(0, file.size - 4096) * i // 15)
                    digest.update(f.read(4096))
        return digest.hexdigest()


def load_weights(
    model: nn.Module, weights: Weights, stored: Callable[..., bool] = lambda *of: False
) -> Iterator[None]:
    """Fills this rank's rows of every base parameter, real and possibly sharded; not adapters.

    A generator that stops after every module that holds parameters, so that ranks can agree in
    between; it takes the same number of turns on every rank. ``stored`` may fill a quantized weight
    and its scale by itself, and says whether it did.

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
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            scale = getattr(module, f"{name}_scale", None)
            if scale is None or not stored(f"{module_name}.{name}", parameter, scale):
                with torch.no_grad():
                    fill(module, f"{module_name}.{name}", name, parameter, weights)
        if own:
            yield


def fill(module: nn.Module, full_name: str, name: str, parameter: Tensor, weights: Weights) -> None:
    """Fills this rank's rows of the base parameter ``name`` of a module from the tensor
    ``full_name``, and ``weight_scale`` beside a quantized ``weight``.

    Raises:
        UserError: as ``load_weights``.
    """
    layer = module if isinstance(module, quant.QuantLinear) and name == "weight" else None
    shape, parts = tuple(full_shape(parameter)), [local_part(parameter)]
    if layer is not None:
        shape = (shape[0], layer.in_features)
        parts.append(local_part(layer.weight_scale))
        quant.check_device(parts[0].data.device, layer.fmt)
    entry = weights.entries.get(full_name)
    if entry is None:
        raise UserError(
            f"model.path={weights.folder}: no tensor '{full_name}' in {len(weights.entries)} found"
            " (or in a dtype other than F32, F16, BF16); the files are incomplete or of another"
            " architecture than config.json"
        )
    if entry.stored.shape != shape:
        raise UserError(
            f"{entry.file.path}: '{full_name}' has shape {list(entry.stored.shape)}, config.json"
            f" says {list(shape)}; config.json and weights are of different models"
        )
    widths = [max(1, math.prod(part.shape[1:])) for part in parts]
    local = [(p, width) for p, width in zip(parts, widths, strict=True) if p.data.numel()]
    first = min((part.start // width for part, width in local), default=0)
    last = max((-(-part.stop // width) for part, width in local), default=0)
    step = max(1, PIECE_BYTES // max(1, math.prod(entry.stored.shape[1:]) * entry.dtype.itemsize))
    for begin in range(first, last, step):
        rows = [weights.rows(full_name, begin, min(begin + step, last))]
        if layer is not None:
            rows = list(layer.fmt.encode(rows[0].to(parts[0].data.device, torch.float32)))
        for part, width, values in zip(parts, widths, rows, strict=True):
            part.put(begin * width, values.reshape(-1))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds between steps."""
    return sum(local_part(p).data.numel() * p.element_size() for p in model.parameters())
