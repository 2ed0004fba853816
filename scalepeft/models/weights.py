"""Base weights from safetensors: each rank reads, quantizes and holds only its own rows."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.core.errors import UserError
from scalepeft.core.files import parse_json, read_mapping, read_text
from scalepeft.core.safetensors import DamagedFile, SafetensorsFile, Stored
from scalepeft.core.text import one_line
from scalepeft.models import prequantized, quant
from scalepeft.models.conversion import Layout
from scalepeft.models.sources import DTYPES, Source
from scalepeft.models.tensors import finite
from scalepeft.parallel.base import local_part

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 64 << 20  # rows read and quantized at one time
# Keys of config.json that do not change what the model computes here.
COSMETIC = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


class Entry(Source):
    """A tensor as a file of the model folder holds it."""

    def __init__(self, file: SafetensorsFile, stored: Stored) -> None:
        self.file, self.stored = file, stored
        self.shape, self.dtype = stored.shape, DTYPES[stored.dtype]
        self.where = str(file.path)

    def rows(self, first: int, last: int) -> Tensor:
        """Reads rows ``first..last`` (a 0-d or 1-d tensor's rows are its numbers)."""
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if not math.prod(shape):
            return torch.empty(shape, dtype=self.dtype)
        buffer = self.file.read(self.stored.start + first * row, (last - first) * row)
        return torch.frombuffer(buffer, dtype=self.dtype).view(shape)


class _Shard(SafetensorsFile):
    def read(self, start: int, size: int) -> bytearray:
        """Raises UserError: the file ended, or cannot be read any more."""
        try:
            return super().read(start, size)
        except OSError as error:
            raise UserError(f"{self.place}: {error.strerror}; copy it again") from None


class Weights:
    """A model folder's tensors, by rows. Raises UserError: a shard is missing, cut, or is none."""

    layout: Layout  # what makes up which tensor of the model that ``structure.build`` bound it to

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[str, str] = {}
        self.files = [self._open(path) for path in self._paths()]
        self.entries: dict[str, Source] = {}  # by name, quantized ones as floats
        for file in self.files:
            for name, stored in file.tensors.items():
                if name in self.entries:
                    raise UserError(
                        f"{file.path}: tensor '{name}' is in {self.entries[name].where} too; keep"
                        " the files of one save"
                    )
                if stored.dtype not in DTYPES:
                    raise UserError(f"{file.path}: '{name}' has dtype {stored.dtype}: not read")
                self.entries[name] = Entry(file, stored)
        for name, shard in self._listed.items():
            if name not in self.entries:
                raise UserError(
                    f"{folder / INDEX}: lists '{name}' in {shard}, which does not have it; copy"
                    " index and shards of one save"
                )
        config, remedy = folder / "config.json", "copy it again"
        found = read_mapping(config, json.loads, remedy) if config.is_file() else {}
        self.storage = prequantized.settings_of(found)
        self.entries = prequantized.read(self.storage, self.entries)

    def _paths(self) -> list[Path]:
        """The files of the model, by transformers' rule: one file, else those of the index."""
        if (single := self.folder / SINGLE).is_file():
            return [single]
        if (index := self.folder / INDEX).is_file():
            return self._indexed(index)
        if others := sorted(path.name for path in self.folder.glob("*.safetensors")):
            raise UserError(
                f"model.path={self.folder}: has {others[0]}, but neither {SINGLE} nor {INDEX},"
                " which transformers reads; rename it, or add the index"
            )
        raise UserError(
            f"model.path={self.folder}: no {SINGLE} there; convert other formats once with"
            " transformers' save_pretrained"
        )

    def _indexed(self, index: Path) -> list[Path]:
        try:
            self._listed = dict(parse_json(read_text(index))["weight_map"])
            names = sorted(set(self._listed.values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"'{outside[0]}' is no file name")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = one_line(f"{type(error).__name__}: {error}", 120)
            raise UserError(f"{index}: broken index: {reason}; copy it again") from None
        return [self.folder / name for name in names]

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

    def bind(self, model: Any, unexpected: str = "error") -> None:
        """Finds which tensors make up the model's; raises as ``Layout``, and for another shape."""
        if hasattr(self, "layout"):
            self.layout.untie(model)
            return
        where, ours = f"model.path={self.folder}", {file.path for file in self.files}
        stray = sorted(file.name for file in {*self.folder.glob("*.safetensors")} - ours)
        self.layout = Layout(model, self.entries, where, stray, unexpected)
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                source = self.layout.sources.get(name)
                if source is not None and tuple(source.shape) != tuple(tensor.shape):
                    raise UserError(
                        f"{source.where}: '{name}' has shape {list(source.shape)}, config.json says"
                        f" {list(tensor.shape)}; config.json and weights are of different models"
                    )

    def fingerprint(self) -> str:
        """sha256 of config.json, without cosmetic keys, and of each shard's name, size and header,
        and 4 KiB at 16 places: what tells one base from another without reading all of a 70B.
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
    """``fill`` of every base parameter and of the buffers that files hold, not adapters; yields
    after every module, as often on every rank.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if module_name.endswith(".adapter") or ".adapter." in module_name:
            continue
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if n != "weight_scale"]
        buffers, tables = module.named_buffers(recurse=False), module._non_persistent_buffers_set
        own += [(n, b) for n, b in buffers if n not in tables]
        for name, parameter in own:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                fill(module, f"{module_name}.{name}", parameter, weights, stored)
        if own:
            yield


@torch.no_grad()
def fill(
    module: nn.Module, name: str, parameter: Tensor, weights: Weights, stored: Callable[..., bool]
) -> None:
    """Fills this rank's rows of a tensor, and a quantized one's scales; that one ``stored`` may
    fill, and says whether it did. Raises UserError: the files have values that are not numbers.
    """
    layer = module if isinstance(module, quant.QuantLinear) and parameter is module.weight else None
    parts = [local_part(parameter)]
    if layer is not None:
        if stored(name, parameter, layer.weight_scale):
            return
        parts.append(local_part(layer.weight_scale))
        quant.self_check(parts[0].data.device, layer.fmt)
    source = weights.layout.sources[name]
    widths = [max(1, math.prod(part.shape[1:])) for part in parts]
    local = [(p, width) for p, width in zip(parts, widths, strict=True) if p.data.numel()]
    first = min((part.start // width for part, width in local), default=0)
    last = max((-(-part.stop // width) for part, width in local), default=0)
    step = max(1, PIECE_BYTES // max(1, math.prod(source.shape[1:]) * source.dtype.itemsize))
    step = -(-step // source.unit) * source.unit if source.by_rows else max(1, last)
    edges = {first, *range(first // step * step + step, last, step), last}
    for begin, end in pairwise(sorted(edges)):
        encoded = None if layer is None else source.encoded(layer.fmt, begin, end)
        rows = encoded or (source.rows(begin, end),)
        if isinstance(parameter, nn.Parameter) and not finite(rows[0]):
            raise UserError(
                f"{source.where}: '{name}' has values that are not finite (rows {begin} to"
                f" {end}): the base is damaged; copy it again"
            )
        if layer is not None and encoded is None:
            # Not in one call, which would cast first: a device gets the file's bytes.
            rows = layer.fmt.encode(rows[0].to(parts[0].data.device).float())
        for part, width, values in zip(parts, widths, rows, strict=True):
            part.put(begin * width, values.reshape(-1))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds between steps."""
    return sum(local_part(p).data.numel() * p.element_size() for p in model.parameters())
