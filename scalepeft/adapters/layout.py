"""The folder of an adapter, in HF PEFT's layout (docs/integrations/hub.md); peft is not needed."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scalepeft.adapters.base import (
    Adapter,
    AdapterConfig,
    Scale,
    adapter_config,
    on_meta,
    unsharded_copy,
)
from scalepeft.adapters.card import card
from scalepeft.adapters.experts import Stacked
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.core.files import (
    digest,
    parse_json,
    read_json,
    read_mapping,
    sealed,
    unsealed,
    write_atomically,
)
from scalepeft.core.text import one_line
from scalepeft.models import quant
from scalepeft.models.experts import ExpertLinear
from scalepeft.models.tensors import write_tensors

WEIGHTS, CONFIG, ABOUT = "adapter_model.safetensors", "adapter_config.json", "scalepeft.json"
CARD = "README.md"
OLD = "adapter.safetensors"
"""Of older runs: our names; their ``adapter_config.json`` is what ``scalepeft.json`` is now."""
PREFIX = "base_model.model."
Adapted = tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]
"""Settings, tensors by our names, the rest of the description."""

TAKEN = frozenset({"boft", "hira", "hra", "ia3", "lora", "oft"})
"""Methods of which PEFT has one of that name, with settings and tensors of its own."""
THEIRS: dict[str, tuple[dict[str, str], ...]] = {
    "LORA": ({"name": "lora"},),
    "HIRA": ({"name": "hira"},),
    "HRA": ({"name": "hra", "form": "pairs"},),
    "OFT": ({"name": "oft"}, {"name": "oftv2"}),
}
"""PEFT's own types that have our parameters -> what of ours they may be."""
FIELDS = {"alpha": "lora_alpha", "block_size": "oft_block_size", "dropout": "lora_dropout",
          "rslora": "use_rslora"}  # fmt: skip
"""Our settings -> their fields."""
IDLE = frozenset({
    "auto_mapping", "base_model_name_or_path", "eps", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "megatron_core", "num_cayley_neumann_terms",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
})  # fmt: skip
"""Fields that change nothing of a layer's map, or nothing without another that is refused."""
START = ("none", True, "gaussian")
"""Of ``bias`` and ``init_weights``; others, as pissa, change the base."""


def peft_name(method: str) -> str:
    """Name of the method in PEFT, in lower case; ``<name>_adapter`` holds a layer's tensors."""
    return f"scalepeft_{method}" if method in TAKEN else method


def told(method: str) -> str:
    """``peft_type`` in a file: without the plug-in PEFT ends with it as a KeyError, which helps."""
    name = peft_name(method).upper()
    return f"{name}: pip install scalepeft, then import scalepeft.integrations.peft"


def method_of(peft_type: str) -> str:
    """The method that a file's ``peft_type`` (``HOFT``, or ``told``) names."""
    return peft_type.partition(":")[0].lower().removeprefix("scalepeft_")


def description_file(folder: Path) -> Path | None:
    """The file that tells ours of an adapter; None in a folder that PEFT alone has written."""
    if (folder / ABOUT).is_file():
        return folder / ABOUT
    return None if "peft_type" in read_json(folder / CONFIG) else folder / CONFIG


def weights_file(folder: Path) -> Path:
    """The file with the tensors."""
    return folder / (OLD if description_file(folder) == folder / CONFIG else WEIGHTS)


def in_peft(adapter: Adapter) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Fields of PEFT's own type, and parameter -> its name there, where the method is the same with
    every tensor a parameter itself; else None.
    """
    with torch.device("meta"):
        twin = unsharded_copy(adapter)
        any_weight = nn.Linear(adapter.in_features, adapter.out_features, bias=False)
        fields, tensors = twin.to_peft(quant.Frozen(any_weight)) or ({}, {})

    def itself(tensor: Tensor, p: Tensor) -> bool:
        storage, held = tensor.untyped_storage(), p.untyped_storage()
        return tensor.shape == p.shape and storage._cdata == held._cdata

    own = dict(twin.named_parameters())
    names = {k: end for k, p in own.items() for end, t in tensors.items() if itself(t, p)}
    return (fields, names) if len(names) == len(tensors) == len(own) else None


def peft_config(
    model: nn.Module, fields: dict[str, dict[str, Any]], path: str | None, revision: str | None
) -> dict[str, Any]:
    """``adapter_config.json`` for the fields of each layer, over a base of this name."""
    return {
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "inference_mode": True,
        "peft_version": "0.21.0",  # whose layout this is
        "base_model_name_or_path": path,
        "revision": revision,
        **common_fields(model, fields),
    }


def common_fields(model: nn.Module, fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One config for all layers: equal fields, PEFT's pattern for C3A's block sizes, and targets:
    the last part of a name where every such layer of the model is adapted.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = {name for name, module in model.named_modules() if isinstance(module, ExpertLinear)}

    def last(name: str) -> str:
        return name.rsplit(".", 1)[-1]

    short = {last(n) for n in fields} - {last(n) for n in linear - experts - fields.keys()}
    targets = sorted({last(n) if last(n) in short else n for n in fields})
    common = dict(next(iter(fields.values())))
    if common["peft_type"] == "C3A":
        sizes = {name: f.pop("block_size") for name, f in fields.items()}
        usual = common["block_size"] = mode(sizes.values())
        common["block_size_pattern"] = {n: size for n, size in sizes.items() if size != usual}
    if common["peft_type"] == "IA3":  # PEFT wants them in the form of the targets
        inputs = common["feedforward_modules"]
        common["feedforward_modules"] = [t for t in targets if last(t) in inputs]
    assert len({json.dumps(f, sort_keys=True) for f in fields.values()}) == 1, fields
    return {**common, "target_modules": targets}


def as_peft(
    model: nn.Module, adapters: dict[str, Adapter], path: str | None, revision: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """``adapter_config.json`` of PEFT's own type, else the plug-in's; our names -> the file's."""
    linear = {name: a for name, a in adapters.items() if not isinstance(a, Scale)}
    first = next(iter(linear.values()))
    ours_alone = any(isinstance(a, Stacked | Scale) for a in adapters.values())
    found = None if ours_alone else in_peft(first)
    if found is None:
        method, fields = first.config.name, _fields(first.config, {})
        own = {field: getattr(first.config, key) for key, field in fields.items()}
        box = f"{peft_name(method)}_adapter"
        keys = {key: f"{box}.{key}" for a in adapters.values() for key, _ in a.named_parameters()}
        found = {"peft_type": told(method), **own}, keys
    names = {
        f"{name}.adapter.{key}": f"{PREFIX}{name}.{found[1][key]}"
        for name, adapter in adapters.items()
        for key, _ in adapter.named_parameters()
    }
    described = peft_config(model, dict.fromkeys(linear, found[0]), path, revision)
    if norms := adapters.keys() - linear.keys():  # those of other blocks stay as they are
        blocks = {int(part) for name in norms for part in name.split(".") if part.isdigit()}
        described["layers_to_transform"] = sorted(blocks)
    return described, names


def own_fields(config: type[AdapterConfig]) -> list[str]:
    """Settings of a method's own: those that not every config class of adapters has."""
    common = {f.name for f in dataclasses.fields(AdapterConfig)}
    return [f.name for f in dataclasses.fields(config) if f.name not in common]


def _fields(config: AdapterConfig, named: dict[str, str]) -> dict[str, str]:
    """Setting of the method's own -> the field of a PEFT config that has it."""
    return {name: {"rank": "r", **named}.get(name, name) for name in own_fields(type(config))}


def write(
    folder: Path,
    model: nn.Module,
    adapters: dict[str, Adapter],
    state: dict[str, Tensor],
    about: dict[str, Any],
    name: str | None,
    rows: dict[str, str] | None = None,
) -> None:
    """Writes the folder of a model's ``adapters``, ``scalepeft.json`` last. ``state``: whole
    tensors by our names; ``about``: the base, step and length; ``name``: of the base for others;
    ``rows``: of the card. Raises OSError: the disk refused.
    """
    config, names = as_peft(model, adapters, name, about["base_model"].get("revision"))
    settings = dataclasses.asdict(next(a.config for a in adapters.values()))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WEIGHTS}.tmp"
    temporary.unlink(missing_ok=True)  # of a start that was killed, or a link
    written = write_tensors(temporary, {names[key]: tensor for key, tensor in state.items()})
    temporary.replace(folder / WEIGHTS)
    about = {"format": 2, "adapter": settings, **about, "sha256": written["sha256"]}
    describe(folder, config, settings, about, rows)
    (folder / OLD).unlink(missing_ok=True)


def describe(
    folder: Path,
    config: dict[str, Any],
    settings: dict[str, Any],
    about: dict[str, Any] | None,
    *shown: Any,
) -> None:
    """Writes what lies beside the tensors; ``about`` None: PEFT's alone; ``shown``: in ``card``."""
    config_digest = write_config(folder, config)
    write_atomically(folder / CARD, card(settings, config, *shown))
    if about is not None:
        text = json.dumps(sealed({**about, "config_sha256": config_digest}), indent=2)
        write_atomically(folder / ABOUT, f"{text}\n")


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """Writes ``adapter_config.json``; returns its sha256."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG, text)
    return hashlib.sha256(text.encode()).hexdigest()


def read_adapter(folder: Path) -> Adapted:
    """Reads a folder: ours, an older run's, or PEFT's own, which tells of the base its name alone.
    Raises UserError: a file is missing, unreadable or changed, or nothing that we compute; named.
    """
    remedy = f"{folder} is no readable adapter folder; name the adapter/ of a finished run"
    file, config_file, weights = description_file(folder), folder / CONFIG, weights_file(folder)
    about = read_mapping(file, unsealed, remedy) if file else {}
    about.pop("digest", None)
    settings, old = about.pop("adapter", None), file == config_file
    broken = not isinstance(settings, dict) or not isinstance(about.get("base_model", {}), dict)
    if file and broken:
        raise UserError(f"{file}: has no 'adapter' settings, or of no base; {remedy}")
    config = {} if old else read_mapping(config_file, parse_json, remedy)
    try:
        state = load_file(weights)
        found = {weights: digest(weights), config_file: digest(config_file)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: {error}; {remedy}") from None
    for path, key in ((weights, "sha256"), (config_file, "config_sha256")):
        if file and about.get(key, found[path]) != found[path]:
            raise UserError(
                f"{path}: has changed since it was written (sha256 differs from {file.name}); copy"
                " it again, or remove the folder and start the training's command once more"
                + ("" if old else f"; if PEFT saved over it, copy it and remove {ABOUT} there")
            )
    if old:
        return adapter_config(settings, saved=True), state, about
    if file:
        made = adapter_config(settings, saved=True)
        return made, _ours(state, made, str(config.get("peft_type")), weights), about
    return _of_peft(config, state, folder)


def _of_peft(config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> Adapted:
    """As ``read_adapter``, of a folder of PEFT's own."""
    kind, where = str(config["peft_type"]), folder / CONFIG
    name = method_of(kind)
    plugged = kind.partition(":")[0].lower() == peft_name(name)
    if kind not in THEIRS and not (plugged and name in registry.available("adapters.methods")):
        allowed = f"allowed: {', '.join(THEIRS)}, and scalepeft's own methods"
        raise UserError(f"{where}: peft_type={one_line(kind, 100)}: not read here; {allowed}")
    refused: list[list[str]] = []
    for start in THEIRS.get(kind, ({"name": name},)):
        fields = _fields(adapter_config(dict(start)), FIELDS if kind in THEIRS else {})
        values = {key: config[field] for key, field in fields.items() if field in config}
        made = adapter_config({**values, **start})
        known = _form(made)[0] if kind in THEIRS else {f: config.get(f) for f in fields.values()}
        refused.append([
            key for key, value in config.items()
            if (value or None) != (known[key] or None if key in known else None)
            and (key in known or key not in IDLE)
            and not (key.partition("_")[0] in ("bias", "init") and value in START)
        ])  # fmt: skip
        if not refused[-1]:
            break
    else:
        key = min(refused, key=len)[0]
        raise UserError(
            f"{where}: {key}={one_line(repr(config[key]), 100)}: nothing that scalepeft computes;"
            " merge this adapter with PEFT, or train one without"
        )
    state = _ours(state, made, kind, folder / WEIGHTS)
    layers = dict.fromkeys(name.rpartition(".adapter.")[0] for name in state)
    linear = [n for n in layers if not any(registry.names(norm, n) for norm in made.norm_modules())]
    if not linear:
        raise UserError(f"{folder / WEIGHTS}: holds no tensor of a linear layer; save it again")
    base = {"path": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    return dataclasses.replace(made, **_targets(config, linear)), state, {"base_model": base}


def _targets(config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """The layers that PEFT's config lists (one without tensors is noticed), or that have some."""
    listed, blocks = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(listed, list) and not config.get("exclude_modules"):
        names = [n for n in listed if any(registry.names(str(n), layer) for layer in layers)]
        named = all(any(registry.names(n, layer) for n in names) for layer in layers)
        if named and not config.get("layers_pattern"):
            return {"target_modules": names, "layers": "all" if blocks is None else blocks}
    return {"target_modules": layers}


def _form(config: AdapterConfig) -> tuple[dict[str, Any], dict[str, str]]:
    # On the meta device, but two sides of a rank that no layer has would overflow even there.
    width: int = getattr(config, "block_size", 0) or min(getattr(config, "rank", 1), 2**20)
    return in_peft(on_meta(config, width, width)) or ({}, {})


def _ours(
    state: dict[str, Tensor], config: AdapterConfig, kind: str, file: Path
) -> dict[str, Tensor]:
    theirs = _form(config)[1] if kind in THEIRS else {}
    keys = {suffix: key for key, suffix in theirs.items()}
    inner = "|".join(map(re.escape, keys)) or rf"{peft_name(config.name)}_adapter\.\w+"
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({inner})", name)
        if match is None:
            what = f"{one_line(name, 100)} is no tensor of {config.name}"
            raise UserError(f"{file}: {what}; merge the adapter with PEFT, or train one without it")
        key = keys.get(match[2], match[2].rpartition(".")[2])
        found[f"{match[1]}.adapter.{key}"] = tensor
    return found
