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
from scalepeft.adapters.inject import Adapted, AdaptedNorm
from scalepeft.adapters.merged_weight import (
    adds_bias,
    check_mergeable,
    effective_bias,
    effective_weight,
    norm_parameter,
)
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.core.safetensors import SafetensorsFile, Stored, Writer
from scalepeft.export.streaming import (
    FinishedRun,
    Streamed,
    plain,
    refuse_existing,
    whole_folder,
)
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models.weights import DTYPES, PIECE_BYTES, Weights

__all__ = ["effective_weight", "run"]

INDEX = "model.safetensors.index.json"
TOKENS = 64  # that the merged model is compared over
COPIED = (
    "generation_config.json", "*.jinja", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
SWITCHES = ("attention_bias", "mlp_bias")
"""Keys of config.json that give the layers of a block a bias (LLaMA has both)."""
NAMES = {"fp32": "F32", "bf16": "BF16"}


@dataclass(frozen=True)
class _Item:
    """A tensor to write; ``stored`` is where the base has it, None for a bias that is new."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: Stored | None

    @property
    def size(self) -> int:
        if self.stored is not None and self.dtype == self.stored.dtype:
            return self.stored.stop - self.stored.start
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
        key: what decides the result; with it, a merge that was broken off goes on at the shard it
            was at (see ``whole_folder``).
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
        raise UserError(
            "--base dequantized: the run's base was not quantized (model.quant=none); leave the"
            " option out"
        )
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
    say(_difference(adapted, plain(target, finished.device)))
    if storage != "none" and base == "original":
        say(
            f"the adapter was trained over the {storage} base, whose rounding this checkpoint does"
            " not have; --base dequantized writes the very model that was trained"
        )


def check_method(config: RunConfig, folder: Path) -> None:
    """Refuses, before anything is trained, a method that cannot merge into this base."""
    model = structure.build(config.model, folder, config.train.precision)
    injection.inject(model, config.adapter)
    for _, layer in injection.adapted_layers(model):
        check_mergeable(layer)


def _plan(finished: FinishedRun, model: Streamed, dtype: str) -> tuple[list[str], list[_Shard]]:
    """Decides all that will be written, and checks it against the architecture.

    Returns:
        The switches to set in config.json, and the shards in the order of the base's files.

    Raises:
        UserError: a method that cannot merge, a tied layer, a bias that the architecture has no
            place for.
    """
    biases: set[str] = set()
    for name, layer in injection.adapted_layers(model.model):
        check_mergeable(layer)
        if model.names[id(layer.weight)] != f"{name}.weight":
            raise UserError(
                f"{name} shares its weight with {model.names[id(layer.weight)]}"
                " (tie_word_embeddings), so that merging would change both; keep the adapter"
            )
        if layer.bias is None and adds_bias(layer):
            biases.add(f"{name}.bias")
    there = {name for file in finished.base.weights.files for name in file.tensors}
    switches, shapes = _architecture_with(finished.base.folder, biases - there, finished.config)
    shards = _shards(finished.base.weights, shapes, dtype)
    written = {item.name: item.shape for shard in shards for item in shard.items}
    for name, shape in shapes.items():
        if written.get(name) != shape:
            raise UserError(
                f"model.path={finished.base.folder}: tensor '{name}' is"
                f" {list(written[name]) if name in written else 'missing'}, config.json says"
                f" {list(shape)}; the files are incomplete or of another model"
            )
    return switches, shards


def _architecture_with(
    folder: Path, biases: set[str], config: Any
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Finds the switches that give the architecture these biases, and the shapes it then has."""
    from transformers import AutoModelForCausalLM

    def shapes(switches: list[str]) -> dict[str, tuple[int, ...]]:
        architecture = models.architecture(folder)
        for switch in switches:
            setattr(architecture, switch, True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    there = shapes([])
    known = [s for s in SWITCHES if getattr(models.architecture(folder), s, None) is False]
    for switches in ([], *([s] for s in known), known):
        found = shapes(switches)
        if biases <= found.keys() and there.keys() <= found.keys():
            return switches, found
    method = config.adapter.name
    raise UserError(
        f"adapter.name={method} adds a bias to {min(biases)}, which this architecture"
        f" ({models.architecture(folder).model_type}) has no place for in stock transformers;"
        " keep the adapter, which works as it is (scalepeft evaluate, scalepeft.load_adapter)"
    )


def _shards(weights: Weights, shapes: dict[str, tuple[int, ...]], dtype: str) -> list[_Shard]:
    """The base's tensors in their files and order; a new bias stands behind its weight."""
    there = {name for file in weights.files for name in file.tensors}
    several = len(weights.files) > 1 or (weights.folder / INDEX).is_file()
    shards = []
    for file in weights.files:
        items = []
        for tensor in file.tensors.values():
            cast = dtype != "base" and tensor.dtype in DTYPES
            kind = NAMES[dtype] if cast else tensor.dtype
            items.append(_Item(tensor.name, kind, tensor.shape, tensor))
            bias = tensor.name.removesuffix("weight") + "bias"
            if bias in shapes and bias not in there:
                items.append(_Item(bias, kind, shapes[bias], None))
        # transformers finds a single file by its name, and several by their index.
        name = file.path.name if several else "model.safetensors"
        shards.append(_Shard(name, file, items))
    return shards


def _write_shard(model: Streamed, shard: _Shard, folder: Path, poll: Callable[[], None]) -> None:
    """Writes a shard; it has its name once it is whole."""
    header = [(item.name, item.dtype, item.shape, item.size) for item in shard.items]
    begun = folder / f"{shard.file}.begun"
    with Writer(begun, header, shard.source.metadata or {"format": "pt"}) as writer:
        for item in shard.items:
            poll()
            tensor = _new_value(model, item)
            if tensor is not None:
                writer.write(_rounded(tensor, item))
            elif item.stored is None:
                writer.write([bytes(item.size)])
            elif item.dtype == item.stored.dtype:
                writer.write(shard.source.pieces(item.stored))
            else:
                writer.write(_cast(model.weights, item))
    begun.rename(folder / shard.file)


@torch.no_grad()
def _new_value(model: Streamed, item: _Item) -> Tensor | None:
    """The merged tensor, fp32 or better; None where the base's own value stays."""
    name, _, key = item.name.rpartition(".")
    module = model.modules.get(name)
    if key not in ("weight", "bias"):
        return None
    if isinstance(module, Adapted):
        with model.held(module):
            return effective_weight(module)[0] if key == "weight" else effective_bias(module)
    if isinstance(module, AdaptedNorm):
        with model.held(module):
            return norm_parameter(name, module, key)
    if isinstance(module, quant.QuantLinear) and key == "weight":
        with model.held(module):
            return quant.Frozen(module).weight(torch.float32)
    return None


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _rounded(tensor: Tensor, item: _Item) -> Iterator[memoryview]:
    rows = max(1, PIECE_BYTES // max(1, tensor[0].numel() * tensor.element_size()))
    for part in tensor.split(rows):
        rounded = part.to(DTYPES[item.dtype]).cpu()
        if not torch.isfinite(rounded).all():
            raise UserError(
                f"{item.name}: the merged values do not fit into {item.dtype}; merge with --dtype"
                " fp32 or bf16"
            )
        yield _bytes(rounded)


def _cast(weights: Weights, item: _Item) -> Iterator[memoryview]:
    assert item.stored is not None
    length = item.shape[0] if item.shape else 1
    rows = max(1, PIECE_BYTES * length // max(1, item.stored.stop - item.stored.start))
    for first in range(0, length, rows):
        part = weights.rows(item.name, first, min(first + rows, length))
        yield _bytes(part.to(DTYPES[item.dtype]))


def _copy_small_files(
    finished: FinishedRun, folder: Path, switches: Iterable[str], dtype: str
) -> None:
    """Tokenizer, generation settings, and config.json with what merging changes."""
    for source in (
        finished.base.folder,
        Path(finished.config.model.tokenizer or finished.base.folder),
    ):
        for pattern in COPIED:
            for file in source.glob(pattern):  # none where the tokenizer is a hub id
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
    config = json.loads((finished.base.folder / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(switches, True)
    if dtype != "base":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(DTYPES[NAMES[dtype]]).removeprefix("torch.")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_index(folder: Path, shards: list[_Shard]) -> None:
    if [shard.file for shard in shards] == ["model.safetensors"]:
        return
    items = [(item, shard.file) for shard in shards for item in shard.items]
    index = {
        "metadata": {"total_size": sum(item.size for item, _ in items)},
        "weight_map": {item.name: file for item, file in items},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _difference(adapted: Streamed, merged: Streamed) -> str:
    """Says how far the logits of two models lie apart, over seeded random tokens, in fp32."""
    config: Any = adapted.model.config
    length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    want, got = adapted.logits(ids), merged.logits(ids)
    worst = (got - want).abs().max().item()
    agree = int((got.argmax(-1) == want.argmax(-1)).sum())
    return (
        f"merged: logits differ from the adapted model's by at most {worst:.1e} (relative"
        f" {worst / want.abs().max().item():.1e}) over {length} tokens; the next token agrees at"
        f" {agree} of {length}"
    )
