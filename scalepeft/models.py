"""LLaMA-class bases: structure on the meta device, then each rank reads only the rows that it
holds.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft import quant
from scalepeft.config import BUILTIN, ModelConfig
from scalepeft.lookup import UserError
from scalepeft.parallel.base import local_rows
from scalepeft.parallel.mesh import Ranks
from scalepeft.progress import say

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
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve(config: ModelConfig, ranks: Ranks) -> Path:
    """Returns the local folder of the model: as given, made (``builtin:tiny``), or downloaded once
    a node.

    Raises:
        UserError: no such folder, nothing to read in it, or a hub id that cannot be had.
    """

    def make() -> str | None:
        if ranks.local_rank != 0:
            return None
        if config.path == BUILTIN:
            from scalepeft import tiny

            return str(tiny.make(config.pretrain_steps))
        if Path(config.path).is_dir():
            return config.path
        return _download(config.path, config.revision)

    here = ranks.together(make)
    # Every rank of a node uses what its local rank 0 found; node paths may differ.
    folders = ranks.gather((here, ranks.local_rank))
    for folder, local_rank in folders[: ranks.rank + 1][::-1]:
        if local_rank == 0 and folder is not None:
            return Path(folder)
    raise AssertionError("local rank 0 of this node comes first")


def _download(name: str, revision: str | None) -> str:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model.path={name}: no such folder (from {Path.cwd()}), and not a hub id (ORG/NAME)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.path={name}{at}: no such folder here, and the hub does not give it"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}); download it where there is a"
            " network and name the folder"
        ) from None


def load_tokenizer(config: ModelConfig, folder: Path) -> Any:
    """Loads the model's tokenizer (``tokenizer.json``), checked for an end-of-text token.

    Raises:
        UserError: no tokenizer, only a SentencePiece file, or no end-of-text token.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer or str(folder)
    where = f"model.tokenizer={source}" if config.tokenizer else f"model.path={folder}"
    if Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file():
        if (Path(source) / "tokenizer.model").is_file():
            raise UserError(
                f"{where}: has tokenizer.model but no tokenizer.json; transformers loads a bare"
                " tokenizer.model without BOS and with other ids. Convert it once with"
                " convert_slow_tokenizer and save tokenizer.json"
            )
        raise UserError(f"{where}: no tokenizer.json there; set model.tokenizer=FOLDER_OR_HUB_ID")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # for a damaged file the tokenizers library raises a bare Exception
        raise UserError(
            f"{where}: no tokenizer can be loaded: {type(error).__name__}:"
            f" {' '.join(str(error).split())}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{where}: the tokenizer has no end-of-text token; set eos_token in"
            " tokenizer_config.json"
        )
    return tokenizer


def vocab_size(folder: Path) -> int:
    """Number of token ids that the model's embedding has."""
    return int(_architecture(folder).vocab_size)


def _architecture(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path={folder}: no config.json there; name the folder of a whole model"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(
            f"model.path={folder}: config.json: {' '.join(str(error).split())}"
        ) from None


def build(config: ModelConfig, folder: Path, precision: str) -> nn.Module:
    """Builds the causal LM on the meta device, block layers in the storage of ``model.quant``.

    Raises:
        UserError: config.json is missing, broken or of an unsupported architecture.
    """
    from transformers import AutoModelForCausalLM

    architecture = _architecture(folder)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                architecture, dtype=PRECISIONS[precision], attn_implementation="sdpa"
            )
    except (ValueError, KeyError) as error:
        raise UserError(f"model.path={folder}: {str(error).splitlines()[0]}") from None
    blocks_of(model)
    fmt = quant.get_format(config.quant, config.double_quant)
    if fmt is not None:
        _quantise_blocks(model, fmt, folder)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder blocks, the units of sharding and checkpointing."""
    blocks = getattr(getattr(model, "base_model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(
            f"{type(model).__name__} is not supported: its decoder has no list of blocks named"
            " 'layers'. Supported: LLaMA-class models (Llama, Mistral, Qwen2, Qwen3, ...)"
        )
    return list(blocks)


def _quantise_blocks(model: nn.Module, fmt: quant.Format, folder: Path) -> None:
    kept: dict[str, str] = {}
    for block in blocks_of(model):
        for name, layer in block.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            if reason := fmt.refuses(layer.in_features):
                kept[name.rsplit(".", 1)[-1]] = reason
            else:
                quant.quantise(layer, fmt)
    if len(kept) and not any(isinstance(m, quant.QuantLinear) for m in model.modules()):
        raise UserError(
            f"model.quant={fmt.name}: no layer of {folder} can be stored so:"
            f" {next(iter(kept.values()))}"
        )
    if kept and int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        for name, reason in kept.items():
            say(f"{name} stays unquantised in every block: {reason}")


def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives every meta parameter and buffer (sharded or whole) empty storage on ``device``; ties
    stay ties.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        torch.empty_like(p, device=device), requires_grad=p.requires_grad
                    )
                module._parameters[name] = made[id(p)]
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if any(b.is_meta for b in module.buffers(recurse=False)):
                # Non-persistent tables (rotary frequencies) are in no checkpoint: compute them
                # again.
                setattr(parent, name, type(module)(module.config).to(device))
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"still on the meta device: {left}"


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file


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
        buffer = bytearray((last - first) * row)
        if buffer:
            with entry.file.open("rb", buffering=0) as f:
                done = 0
                while done < len(buffer):
                    got = os.preadv(
                        f.fileno(), [memoryview(buffer)[done:]], entry.start + first * row + done
                    )
                    if not got:
                        raise UserError(f"{entry.file}: ended while {name} was read; copy it again")
                    done += got
        self.bytes_read += len(buffer)
        shape = (last - first, *entry.shape[1:])
        return (
            torch.frombuffer(buffer, dtype=entry.dtype).view(shape)
            if buffer
            else torch.empty(shape, dtype=entry.dtype)
        )

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
                    _fill(module, f"{module_name}.{name}", name, parameter, weights)
        if own:
            yield


def _fill(
    module: nn.Module, full_name: str, name: str, parameter: Tensor, weights: Weights
) -> None:
    quantised = isinstance(module, quant.QuantLinear) and name == "weight"
    shape = (parameter.shape[0], module.in_features) if quantised else tuple(parameter.shape)
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
    local, first, last = local_rows(parameter)
    if not quantised:
        local.copy_(weights.rows(full_name, first, last))
        return
    assert isinstance(module, quant.QuantLinear)
    quant.check_device(local.device, module.fmt)
    local_scale, _, _ = local_rows(module.weight_scale)
    step = max(1, PIECE_BYTES // (module.in_features * entry.dtype.itemsize))
    for begin in range(first, last, step):
        end = min(begin + step, last)
        rows = weights.rows(full_name, begin, end).to(local.device, torch.float32)
        packed, scale = module.fmt.encode(rows)
        local[begin - first : end - first] = packed
        local_scale[begin - first : end - first] = scale


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds between steps."""
    return sum(local_rows(p)[0].numel() * p.element_size() for p in model.parameters())
