"""From base and adapter to one checkpoint that stock transformers loads, shard by shard."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalepeft.adapters import inject as injection
from scalepeft.adapters import merged_weight
from scalepeft.adapters.inject import Adapted, AdaptedNorm
from scalepeft.config.schema import RunConfig
from scalepeft.core import safetensors
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.core.safetensors import SafetensorsFile, Stored
from scalepeft.export.streaming import FinishedRun, Streamed, plain, refuse_existing, whole_folder
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models.conversion import Group
from scalepeft.models.experts import ExpertLinear
from scalepeft.models.sources import DTYPES, FLOATS, Source
from scalepeft.models.tensors import DTYPE_NAMES, as_bytes
from scalepeft.models.weights import INDEX, PIECE_BYTES, Entry, Weights

TOKENS = 64  # that the merged model is compared over
COPIED = (
    "generation_config.json", "*.jinja", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "*processor_config.json",
)  # fmt: skip
SWITCHES = ("attention_bias", "mlp_bias")
"""Keys of config.json that give the layers of a block a bias (LLaMA has both)."""
NAMES = {"fp32": "F32", "bf16": "BF16"}


@dataclass(frozen=True)
class _Item:
    """A tensor to write; ``source`` is where the base has it, None for a bias that is new."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source | None

    @property
    def stored(self) -> Stored | None:
        """As the base's file has the very bytes to write, if nothing changes the values."""
        stored = self.source.stored if isinstance(self.source, Entry) else None
        return stored if stored is not None and stored.dtype == self.dtype else None

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Shard:
    file: str
    source: SafetensorsFile
    items: list[_Item]


def run(
    run_dir: str,
    out: str,
    settings: list[str],
    base: str,
    dtype: str,
    key: str | None = None,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Writes base and adapter of a run as one checkpoint, and prints its output error.

    Args:
        run_dir: a run with an ``adapter/``.
        out: the folder to write; must not exist.
        settings: where the base is now (``model.path=FOLDER``).
        base: ``original``: merge into the weights of the files; ``dequantized``: into what the
            adapter saw in training, every quantized weight replaced by its decoded values.
        dtype: of the written weights: ``base`` (as in the files), ``fp32`` or ``bf16``. Merged
            weights are computed in fp32 and rounded once.
        key: as ``whole_folder`` takes it; with one, a merge that was broken off goes on.
        poll: called between tensors; may raise to stop.

    Raises:
        UserError: the method or the architecture cannot merge, base and adapter do not belong
            together, or ``out`` cannot be written; nothing is written then.
    """
    target = Path(out)
    refuse_existing(target)
    finished = FinishedRun.open(run_dir, settings, "a merge")
    storage = finished.config.model.quant
    if base == "dequantized" and storage == "none":
        raise UserError("--base-weights dequantized: the run has model.quant=none; leave it out")
    model = finished.structure(quantized=base == "dequantized")
    switches, shards = _plan(finished, model, dtype)
    with whole_folder(target, key) as folder:
        _copy_small_files(finished, folder, switches, dtype)
        for number, shard in enumerate(shards, 1):
            if (folder / shard.file).is_file():
                say(f"{shard.file} is there already, {number} of {len(shards)}")
                continue
            _write_shard(model, shard, folder, poll)
            say(f"{shard.file} written, {number} of {len(shards)}")
        _write_index(folder, shards)
    say(f"merged checkpoint ({base} base) in {out}")
    adapted = model if storage == "none" else finished.structure(quantized=True)
    say(_difference(adapted, plain(target, finished.device, finished.config.model)))
    if base == "original" and _rounded(adapted):
        say(
            f"the adapter was trained over the {storage} base, whose rounding this checkpoint does"
            " not have; --base-weights dequantized writes the very model that was trained"
        )


def _rounded(model: Streamed) -> bool:
    """Whether a layer is held in other numbers than the files have."""
    sources = model.weights.layout.sources
    return any(
        sources[f"{name}.weight"].encoded(layer.fmt, 0, 1) is None
        for name, layer in model.modules.items()
        if isinstance(layer, quant.QuantLinear)
    )


def check_method(config: RunConfig, folder: Path) -> None:
    """Refuses, before anything is trained, a method that cannot merge into this base."""
    model = structure.build(config.model, folder, config.train.precision)
    injection.inject(model, config.adapter)
    for _, layer in injection.adapted_layers(model):
        merged_weight.check_mergeable(layer)


def _plan(finished: FinishedRun, model: Streamed, dtype: str) -> tuple[list[str], list[_Shard]]:
    """Returns the switches to set in config.json, and the shards in the order of the base's files.

    Raises:
        UserError: a method that cannot merge, a bias that the architecture has no place for.
    """
    biases: set[str] = set()
    for name, layer in injection.adapted_layers(model.model):
        merged_weight.check_mergeable(layer)
        if layer.bias is None and merged_weight.adds_bias(layer):
            biases.add(f"{name}.bias")
    method = finished.config.adapter.name
    switches, shapes = _architecture_with(finished.base.folder, biases, method)
    layout = model.weights.layout
    names = {group.first_target: name for name, group in layout.groups.items()}
    new = {}
    for bias in shapes.keys() - layout.sources.keys():  # a switch gives other layers one too
        weight = names[bias.removesuffix("bias") + "weight"]
        new[weight] = shapes[bias]
    architecture = finished.base.architecture
    named = architecture.get_text_config().dtype or architecture.dtype
    decoded = DTYPE_NAMES.get(named, "F32")
    return switches, _shards(model.weights, new, dtype, decoded)


def _architecture_with(
    folder: Path, biases: set[str], method: str
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Finds the switches that give the architecture these biases, and the shapes it then has."""
    architecture = models.architecture(folder)
    wanted = {"mlp_bias" if ".mlp." in name else "attention_bias" for name in biases}
    switches = [s for s in SWITCHES if s in wanted and getattr(architecture, s, None) is False]
    for switch in switches:
        setattr(architecture, switch, True)
    model = models.meta_model(architecture, f"model.path={folder}")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if biases <= shapes.keys():
        return switches, shapes
    raise UserError(
        f"adapter.name={method} adds a bias to {min(biases)}, which this architecture"
        f" ({architecture.model_type}) has no place for in stock transformers; keep the adapter,"
        " which works as it is (scalepeft evaluate, scalepeft.load_adapter)"
    )


def _shards(
    weights: Weights, new: dict[str, tuple[int, ...]], dtype: str, decoded: str
) -> list[_Shard]:
    """The base's tensors in their files and order, and behind a weight of ``new`` its new bias of
    that shape. ``decoded``: dtype in config.json, of weights that the files hold in codes.
    """
    several = len(weights.files) > 1 or (weights.folder / INDEX).is_file()
    shards = []
    for file in weights.files:
        items = []
        for name, source in weights.entries.items():
            if source.where != str(file.path):
                continue
            kind = DTYPE_NAMES[source.dtype]
            if dtype != "base" and kind in FLOATS:
                kind = NAMES[dtype]
            elif kind == "F32" and not isinstance(source, Entry):
                kind = decoded
            items.append(_Item(name, kind, tuple(source.shape), source))
            if (bias := new.get(name)) is not None:
                items.append(_Item(name.removesuffix("weight") + "bias", kind, bias, None))
        # transformers finds a single file by its name, and several by their index.
        name = file.path.name if several else "model.safetensors"
        shards.append(_Shard(name, file, items))
    return shards


def _write_shard(model: Streamed, shard: _Shard, folder: Path, poll: Callable[[], None]) -> None:
    """Writes a shard; it has its name once it is whole."""
    header = [(item.name, item.dtype, item.shape, item.size) for item in shard.items]
    begun, values = folder / f"{shard.file}.begun", _NewValues(model)

    def pieces() -> Iterator[Any]:
        for item in shard.items:
            poll()
            yield from _pieces(values, shard.source, item)

    safetensors.write(begun, header, pieces(), shard.source.metadata or {"format": "pt"})
    begun.rename(folder / shard.file)


def _pieces(values: "_NewValues", file: SafetensorsFile, item: _Item) -> Iterator[Any]:
    """The bytes of a tensor as they are to be written, some rows at a time."""
    value = values.of(item)
    source: Any = item.source  # there is one where no value is new
    if value is None and item.stored is not None:
        yield from file.pieces(item.stored)
        return
    length = item.shape[0] if item.shape else 1
    rows = max(1, PIECE_BYTES * length // max(1, item.size))
    for piece in source.pieces(rows) if value is None else value.split(rows):
        rounded = piece.to(DTYPES[item.dtype]).cpu()
        if value is not None and not torch.isfinite(rounded).all():
            what = f"{item.name}: the merged values do not fit into {item.dtype}"
            raise UserError(f"{what}; merge with --dtype fp32 or bf16")
        yield as_bytes(rounded)


class _NewValues:
    """What merging changes, under the files' names: fp32 or better."""

    def __init__(self, model: Streamed) -> None:
        self._model = model
        self._held: dict[int, dict[str, Tensor]] = {}
        """Group -> its tensors of the model; those of a block's experts lie beside one another."""

    @torch.no_grad()
    def of(self, item: _Item) -> Tensor | None:
        """The new tensor; None where the base's own value stays, zeros where it has none."""
        layout = self._model.weights.layout
        if item.source is None:
            weight = layout.groups[item.name.removesuffix("bias") + "weight"].first_target
            new = self._tensor(weight.removesuffix("weight") + "bias")
            return torch.zeros(item.shape) if new is None else new
        if (group := layout.groups.get(item.name)) is None:
            return None
        if group.converter is None:
            return self._tensor(group.first_target)
        if id(group) not in self._held:
            while len(self._held) > 2:
                del self._held[next(iter(self._held))]
            self._held[id(group)] = self._converted(group)
        made = self._held[id(group)]
        return group.restore(item.name, made) if made else None

    def _converted(self, group: Group) -> dict[str, Tensor]:
        new = {name: self._tensor(name) for name in group.shapes()}
        if all(tensor is None for tensor in new.values()):
            return {}
        sources = self._model.weights.layout.sources
        return {n: sources[n].whole() if t is None else t for n, t in new.items()}

    def _tensor(self, target: str) -> Tensor | None:
        """The new value of a tensor of the model, or None."""
        if isinstance(experts := self._model.modules.get(target), ExpertLinear):
            tall = self._tensor(f"{target}.weight")
            return None if tall is None else experts.fused(tall)
        name, _, key = target.rpartition(".")
        module = self._model.modules.get(name)
        kinds = (Adapted, AdaptedNorm, quant.QuantLinear)
        if not isinstance(module, kinds) or key not in ("weight", "bias"):
            return None
        with self._model.held(module):
            if isinstance(module, Adapted) and key == "weight":
                return merged_weight.effective_weight(module)[0]
            if isinstance(module, Adapted):
                return merged_weight.effective_bias(module)
            if isinstance(module, AdaptedNorm):
                return merged_weight.norm_parameter(name, module, key)
            if isinstance(module, quant.QuantLinear) and key == "weight":
                return quant.Frozen(module).weight(torch.float32)
        return None


def _copy_small_files(
    finished: FinishedRun, folder: Path, switches: Iterable[str], dtype: str
) -> None:
    """Tokenizer, generation settings, and config.json with what merging changes."""
    base = finished.base.folder
    for source in (base, Path(finished.config.model.tokenizer or base)):
        for pattern in COPIED:
            for file in source.glob(pattern):  # none where the tokenizer is a hub id
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(switches, True)
    weights = finished.base.weights
    decoded = any(not isinstance(source, Entry) for source in weights.entries.values())
    for part in (config, config.get("text_config") or {}):
        if decoded:
            part.pop("quantization_config", None)  # what is written are plain numbers
        if isinstance(part.get("pad_token_id"), int):  # one beyond the vocabulary stops a load
            part["pad_token_id"] = finished.base.architecture.get_text_config().pad_token_id
    if weights.layout.untied:
        config["tie_word_embeddings"] = False
    if dtype != "base":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(DTYPES[NAMES[dtype]]).removeprefix("torch.")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_index(folder: Path, shards: list[_Shard]) -> None:
    if [shard.file for shard in shards] == ["model.safetensors"]:
        return
    index = {
        "metadata": {"total_size": sum(item.size for shard in shards for item in shard.items)},
        "weight_map": {item.name: shard.file for shard in shards for item in shard.items},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _difference(adapted: Streamed, merged: Streamed) -> str:
    """Says how far the logits of two models lie apart, over seeded random tokens, in fp32."""
    model: Any = adapted.model
    config = model.config.get_text_config()
    length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.get_text_config().vocab_size, (1, length), generator=generator)
    want, got = adapted.logits(ids), merged.logits(ids)
    worst, largest = (got - want).abs().max().item(), want.abs().max().item()
    agree = int((got.argmax(-1) == want.argmax(-1)).sum())
    return (
        f"merged: logits differ from the adapted model's by at most {worst:.1e} (relative"
        f" {worst / (largest or 1.0):.1e}) over {length} tokens; the next token agrees at"
        f" {agree} of {length}"
    )
