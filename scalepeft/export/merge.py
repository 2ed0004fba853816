"""From base and adapter to one checkpoint that stock transformers loads, shard by shard."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.adapters import merged_weight
from scalepeft.adapters.inject import Adapted, AdaptedNorm
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.export.shards import Item, Shard
from scalepeft.export.streaming import FinishedRun, Streamed, plain, refuse_existing, whole_folder
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models.conversion import Group
from scalepeft.models.experts import ExpertLinear
from scalepeft.models.quantized_copy import QuantizedCopy
from scalepeft.models.tensors import DTYPE_NAMES
from scalepeft.models.weights import INDEX, Entry, Weights
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single

TOKENS = 64  # that the merged model is compared over
COPIED = (
    "generation_config.json", "*.jinja", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "*processor_config.json",
)  # fmt: skip
SWITCHES = ("attention_bias", "mlp_bias")
"""Keys of config.json that give the layers of a block a bias (LLaMA has both)."""


def run(
    run_dir: str,
    out: str,
    settings: list[str],
    base: str,
    dtype: str,
    key: str | None = None,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Writes base and adapter of a run to ``out``, a new folder; prints the output error. Merged
    weights are computed in fp32 and rounded once. Raises UserError: the method or the architecture
    cannot merge, base and adapter do not belong together, ``out`` cannot be written: nothing is.

    Args:
        base: weights of the files (``original``), or what training saw (``dequantized``).
        dtype: of the written weights: ``base`` (as in the files), ``fp32`` or ``bf16``.
        key: as ``whole_folder`` takes it; with one, a merge that was broken off goes on.
        poll: called between tensors; may raise to stop.
    """
    target = Path(out)
    refuse_existing(target)
    finished = FinishedRun.open(run_dir, settings, "a merge")
    storage = finished.config.model.quant
    if base == "dequantized" and storage == "none":
        raise UserError("--base-weights dequantized: the run has model.quant=none; leave it out")
    model = trained = finished.structure(quantized=base == "dequantized")
    switches, shards = _plan(finished, model, dtype)
    if storage != "none":
        trained = model if base == "dequantized" else finished.structure(quantized=True)
        engine = Single(finished.config.engine, Ranks())
        trained.stored = QuantizedCopy(finished.base, trained.model, engine).fill
    with whole_folder(target, key) as folder:
        _copy_small_files(finished, folder, type(model.model).__name__, switches, dtype)
        todo = [item for shard in shards for item in shard.begin(folder)]
        stream, ids = _Stream(model, trained, todo, poll), _tokens(model.model)
        wanted = model.logits(ids, stream.visit)
        stream.finish()
        _write_index(folder, shards)
    say(f"merged checkpoint ({base} base) in {out}")
    if switches and vllm_may_drop_biases(models.architecture(target)):
        what = "it has biases now, of which vLLM's own class may leave some out without a word"
        say(f"{what}: serve it with vllm serve --model-impl transformers")
    merged = plain(target, finished.device, finished.config.model)
    say(_difference(wanted, merged.logits(ids)))
    if base == "original" and _rounded(trained):
        fix = "--base-weights dequantized writes the very model that was trained"
        what = f"the adapter was trained over the {storage} base, whose rounding this checkpoint"
        say(f"{what} does not have; {fix}")


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


def vllm_may_drop_biases(architecture: Any) -> bool:
    """Whether a switch is on in another family than LLaMA's: docs/integrations/vllm.md."""
    on = any(getattr(architecture, switch, False) for switch in SWITCHES)
    return on and architecture.model_type != "llama"


def _plan(finished: FinishedRun, model: Streamed, dtype: str) -> tuple[list[str], list[Shard]]:
    """The switches to set in config.json, and the shards as the base's files; may refuse."""
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
) -> list[Shard]:
    """The base's tensors in their files and order, behind a weight of ``new`` its bias of that
    shape. ``decoded``: dtype of weights that the files hold in codes.
    """
    several = len(weights.files) > 1 or (weights.folder / INDEX).is_file()
    shards = []
    for file in weights.files:
        items: list[Item] = []
        for name, source in weights.entries.items():
            if source.where != str(file.path):
                continue
            kind = DTYPE_NAMES[source.dtype]
            if dtype != "base" and source.dtype.is_floating_point:
                kind = DTYPE_NAMES[models.PRECISIONS[dtype]]
            elif kind == "F32" and not isinstance(source, Entry):
                kind = decoded
            items.append(Item(name, kind, tuple(source.shape), source))
            if (bias := new.get(name)) is not None:
                items.append(Item(name.removesuffix("weight") + "bias", kind, bias, None))
        # transformers finds a single file by its name, and several by their index.
        name = file.path.name if several else "model.safetensors"
        shards.append(Shard(name, file, items))
    return shards


class _Stream:
    """Writes what merging does not change as it is read, the rest while its module is real for the
    adapted model's forward; other weights than were ``trained`` on are then rounded to those.
    """

    def __init__(
        self, model: Streamed, trained: Streamed, todo: list[Item], poll: Callable[[], None]
    ) -> None:
        self._model, self._trained, self._poll = model, trained, poll
        self._items = {item.name: item for item in todo}
        self._changed: dict[str, tuple[Group | None, str]] = {}
        """Parameter that has not come by -> its group (None: a new bias), its name there."""
        self._values: dict[Group, dict[str, Tensor]] = {}
        """Group of which not all have come by -> those that have."""
        groups = model.weights.layout.groups
        changes: dict[Group | None, bool] = {None: False}
        for item in todo:
            group = groups.get(item.name)
            if item.source is None:
                weight = groups[item.name.removesuffix("bias") + "weight"].first_target
                self._changed[weight.removesuffix("weight") + "bias"] = None, item.name
            elif group is not None and group not in changes:
                tall = {n: isinstance(model.modules.get(n), ExpertLinear) for n in group.shapes()}
                targets = {n + ".weight" * tall[n]: (group, n) for n in tall}
                changes[group] = any(map(self._changes, targets))
                self._changed |= targets if changes[group] else {}
            if item.source is not None and not changes[group]:
                item.follow(item.source)

    def _changes(self, target: str) -> bool:
        """Whether merging makes other values of a parameter."""
        name, _, key = target.rpartition(".")
        module = self._model.modules.get(name)
        if isinstance(module, quant.QuantLinear) and key == "weight":
            return True
        return isinstance(module, Adapted | AdaptedNorm) and key in ("weight", "bias")

    def visit(self, name: str, module: nn.Module) -> None:
        """Writes what becomes of a module's real parameters."""
        self._poll()
        for key in dict.fromkeys([*module._parameters, "bias"]):
            group, target = self._changed.pop(f"{name}.{key}", (None, ""))
            if not target:
                continue
            value: Any = self._new(name, module, key)
            if group is None:
                item = self._items[target]
                item.put_new(torch.zeros(item.shape) if value is None else value)
                continue
            values = self._values.setdefault(group, {})
            values[target] = getattr(module, key) if value is None else value
            if len(values) == len(group.shapes()):
                for item in [self._items[name] for name in group.names if name in self._items]:
                    moved = group.converter is not None
                    item.put_new(group.restore(item.name, values) if moved else values[target])
                del self._values[group]
        if self._trained is not self._model:
            self._round(name, module)

    def _new(self, name: str, module: Any, key: str) -> Tensor | None:
        """The new value of a parameter, fp32 or better; None where it stays."""
        if not self._changes(f"{name}.{key}"):
            return None
        if isinstance(module, AdaptedNorm):
            without = super(AdaptedNorm, module).forward  # the norm without its adapter
            return merged_weight.merged_norm(name, module, [module.adapter], without)[key]
        if isinstance(module, Adapted) and key == "bias":
            return merged_weight.effective_bias(module)
        if isinstance(module, Adapted):
            weight = merged_weight.merged(module)
        else:
            weight = quant.Frozen(module).weight(torch.float32)
        return module.fused(weight) if isinstance(module, ExpertLinear) else weight

    def _round(self, name: str, module: Any) -> None:
        """Makes W of a layer what its quantized bytes decode to."""
        layer = self._trained.modules[name]
        if not isinstance(layer, quant.QuantLinear):
            return
        parts = layer.weight, layer.weight_scale
        weight, scale = (torch.empty_like(p, device="cpu") for p in parts)
        if not self._trained.stored(f"{name}.weight", weight, scale):
            source = self._model.weights.layout.sources[f"{name}.weight"]
            held = source.encoded(layer.fmt, 0, source.shape[0])
            weight, scale = held or layer.fmt.encode(module.weight)
        made = layer.fmt.decode(weight, scale, layer.in_features, torch.float32)
        module.weight = nn.Parameter(made.to(module.weight.device), requires_grad=False)

    def finish(self) -> None:
        """Writes what the forward did not come by."""
        for name, module in self._model.modules.items():
            if any(f"{name}.{key}" in self._changed for key in [*module._parameters, "bias"]):
                with self._model.held(module):
                    self.visit(name, module)
        for item in self._items.values():
            if item.source is not None and item.written < item.length:
                for _ in item.source.pieces(item.step):
                    self._poll()


def _copy_small_files(
    finished: FinishedRun, folder: Path, kind: str, switches: Iterable[str], dtype: str
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
    config["architectures"] = config.get("architectures") or [kind]  # servers load by it
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
        config[key] = str(models.PRECISIONS[dtype]).removeprefix("torch.")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_index(folder: Path, shards: list[Shard]) -> None:
    if [shard.file for shard in shards] == ["model.safetensors"]:
        return
    index = {
        "metadata": {"total_size": sum(item.size for shard in shards for item in shard.items)},
        "weight_map": {item.name: shard.file for shard in shards for item in shard.items},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tokens(model: Any) -> Tensor:
    config = model.config.get_text_config()
    length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, length), generator=generator)


def _difference(want: Tensor, got: Tensor) -> str:
    worst, largest = (got - want).abs().max().item(), want.abs().max().item()
    agree, length = int((got.argmax(-1) == want.argmax(-1)).sum()), want.shape[1]
    apart = f"at most {worst:.1e} (relative {worst / (largest or 1.0):.1e}) over {length} tokens"
    same = f"the next token agrees at {agree} of {length}"
    return f"merged: logits differ from the adapted model's by {apart}; {same}"
