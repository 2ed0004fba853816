"""Typed dataclasses <- YAML files <- ``dotted.key=value``; one line with the dotted path for every
mistake.
"""

import dataclasses
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from scalepeft import lookup
from scalepeft.adapters.base import AdapterConfig
from scalepeft.lookup import STRICT, TextList, UserError, nearest, split_commas, unknown
from scalepeft.parallel.base import EngineConfig
from scalepeft.tasks.base import TaskConfig

BUILTIN = "builtin:tiny"
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # shifted by 32 bits into torch's 64-bit seed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The frozen base.

    Attributes:
        path: folder with config.json and safetensors, a hub id, or ``builtin:tiny`` (made on the
            spot).
        revision: branch, tag or commit of a hub id.
        tokenizer: folder or hub id, where it is not that of the model.
        quant: how block weights are held: ``none`` (the compute dtype), ``nf4``, ``int8``.
        double_quant: NF4 scales in 8 bits too, 4.13 instead of 4.5 bits a weight.
        pretrain_steps: next-token steps on the toy task's text that the built-in model gets when
            made.
    """

    path: str = BUILTIN
    revision: str | None = None
    tokenizer: str | None = None
    quant: Literal["none", "nf4", "int8"] = "none"
    double_quant: bool = False
    pretrain_steps: NotNegative = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The optimisation.

    Attributes:
        max_steps: optimiser steps; or give ``epochs``.
        epochs: passes over the training data, a fraction allowed.
        global_batch: rows a step over all ranks; fixed for the life of a run.
        micro_batch: rows a forward on one rank, at most.
        lr: peak learning rate.
        schedule: after warm-up: ``linear`` or ``cosine`` to zero, or ``constant``.
        warmup_steps: linear from zero.
        weight_decay: AdamW's, on parameters where decay means "towards the base" (never on
            rotations, scales).
        beta1: AdamW.
        beta2: AdamW.
        eps: AdamW.
        max_grad_norm: clipping; 0 switches it off.
        max_nonfinite: a step whose loss or gradient is not finite is skipped; so many in a row stop
            the run.
        seed: of start values, data order, dropout.
        precision: dtype of base and activations; the adapter and its optimiser stay fp32.
        loss_chunk: tokens whose logits exist at one time.
        save_every: steps between checkpoints.
        save_mode: ``gathered``: rank 0 writes all; ``sharded``: each rank its own part; ``async``:
            that too, from a copy while the training goes on; ``auto``: async once parameters and
            moments exceed 64 MiB, else gathered.
        keep_checkpoints: newest verified checkpoints that are kept.
        eval_every: steps between held-out losses; 0 switches them off.
        stop_at: save and leave with exit code 75 when this step is done (a planned stop).
        tensorboard: write TensorBoard events to RUN_DIR/tensorboard.
        wandb: W&B project to log to.
    """

    max_steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch: Positive = 16
    micro_batch: Positive = 4
    lr: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: NotNegative = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    max_nonfinite: Positive = 5
    seed: Seed = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    loss_chunk: Positive = 1024
    save_every: Positive = 100
    save_mode: Literal["auto", "gathered", "sharded", "async"] = "auto"
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    eval_every: NotNegative = 0
    stop_at: Positive | None = None
    tensorboard: bool = False
    wandb: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """Generation for ``scalepeft evaluate``.

    Attributes:
        batch_size: prompts a rank generates for at once.
        max_new_tokens: length limit of an answer.
        max_tokens: of prompt and answer together, greedy only; null: the model's positions.
        num_beams: of a beam search; 1 is greedy. Nothing is ever sampled.
        stop: texts at which an answer ends; they and what follows are cut.
        limit: score only the first so many rows of each source; null scores all.
        backend: ``hf``: any base with its adapter, on the run's engine; ``vllm``: merged
            checkpoints, and adapters that export as a LoRA, where vLLM is installed.
    """

    batch_size: Positive = 16
    max_new_tokens: Positive = 32
    max_tokens: Positive | None = None
    num_beams: Positive = 1
    stop: TextList = Field(default_factory=list)
    limit: Positive | None = None
    backend: Literal["hf", "vllm"] = "hf"


Subject = Literal["adapter", "merged", "base"]
"""What an evaluation scores."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PipelineConfig:
    """What ``scalepeft pipeline`` does after the training.

    Attributes:
        merge: into the base's ``original`` weights, into what the adapter saw in training
            (``dequantized``; the same for a base that is not quantised), or ``none``.
        dtype: of the merged weights: as the ``base``, ``fp32`` or ``bf16``.
        evaluate: what is scored: the ``adapter`` over the run's base, the ``merged`` checkpoint,
            or the ``base`` alone; several by comma.
    """

    merge: Literal["dequantized", "original", "none"] = "dequantized"
    dtype: Literal["base", "fp32", "bf16"] = "base"
    evaluate: Annotated[list[Subject], BeforeValidator(split_commas)] = Field(
        default_factory=lambda: list[Subject](("base", "merged"))
    )


@plain_dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; ``adapter``, ``engine`` and ``data`` are of the class their
    ``name`` picks.
    """

    run_dir: str
    model: ModelConfig
    data: TaskConfig
    adapter: AdapterConfig
    engine: EngineConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)


# section -> (folder of scalepeft, what to call an entry, the name if none is given, its class)
NAMED: dict[str, tuple[str, str, str, type]] = {
    "adapter": ("adapters", "adapter", "hoft", AdapterConfig),
    "engine": ("parallel", "engine", "single", EngineConfig),
    "data": ("tasks", "task", "toy", TaskConfig),
}
FOLDERS = {"adapter": "adapters", "engine": "engines", "model": "models", "data": "tasks"}
PLAIN: dict[str, type] = {
    "model": ModelConfig, "train": TrainConfig, "evaluate": EvaluateConfig,
    "pipeline": PipelineConfig,
}  # fmt: skip
SECTIONS = [f.name for f in dataclasses.fields(RunConfig)]

# Keys that may differ when a run is resumed: never compared, and with --resume-with-changes.
FREE_TO_CHANGE = ("run_dir", "train.stop_at", "evaluate.", "pipeline.")
HARMLESS = (
    "engine.",
    "model.path",  # a moved folder: the base's fingerprint is compared, not its place
    "data.train",  # moved files: the tokenised rows are compared
    "data.valid",
    "data.test",
    "data.on_error",  # so they are here
    "data.workers",
    "data.cache",
    "train.micro_batch",
    "train.save_every",
    "train.save_mode",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.loss_chunk",
    "train.max_nonfinite",
    "train.tensorboard",
    "train.wandb",
    "train.max_steps",  # the schedule is recomputed over the new length
    "train.epochs",
)


def config_root() -> Path:
    """The folder of the shipped YAML files: inside an installed package, or beside it in a
    checkout.
    """
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_class(section: str, name: str) -> type:
    """Returns the config dataclass of a section whose ``name`` picks it."""
    package, kind, _, base = NAMED[section]
    return lookup.find_class(package, name, kind, base)


def load(path: str | None, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    """Builds a run's config; returns it with the notes the user should see.

    Raises:
        UserError: one line with the dotted path, the value, what is allowed, the nearest name.
    """
    notes: list[str] = []
    return from_dict(values_of(path, overrides, notes)), notes


def values_of(path: str | None, overrides: list[str], notes: list[str]) -> dict[str, Any]:
    """The settings of a file and of the command line, by section, before they are checked.

    Raises:
        UserError: a file that cannot be read, a setting that is none.
    """
    # Precedence, weakest first: 1 the dataclass defaults (fill what is absent), 2 the file and its
    # includes (a file over what it includes), 3 the command line, left to right.
    values = _read(Path(path), ()) if path else {}
    _apply(values, overrides, notes)
    return values


def overlay(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    """Lays ``key=value`` arguments over a resolved config."""
    _apply(values, overrides, [])
    return from_dict(values)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for i, key in enumerate(keys):
            if key.value in [k.value for k in keys[:i]]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' stands there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file() and not path.suffix:
        path = path.with_suffix(".yaml")
    if not path.is_file():
        raise UserError(
            f"no config file {path} (from {Path.cwd()}); the shipped ones are in"
            f" {config_root()}/runs"
        )
    if path.resolve() in above:
        raise UserError(f"{path} includes itself by way of {', '.join(p.name for p in above)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a config is a mapping with {', '.join(SECTIONS)}, not {type(values).__name__}"
        )
    merged: dict[str, Any] = {}
    includes = values.pop("include", None) or []
    for include in includes if isinstance(includes, list) else [includes]:
        candidates = [
            path.parent / f"{include}.yaml",
            config_root() / f"{include}.yaml",
            path.parent / str(include),
        ]
        found = next((c for c in candidates if c.is_file()), None)
        if found is None:
            raise UserError(
                f"{path}: include '{include}': no such file beside it or in {config_root()}"
            )
        _merge(merged, _read(found, (*above, path.resolve())))
    for section, value in values.items():  # first: what this file itself sets is over what it names
        if section in FOLDERS and isinstance(value, str):
            merged.pop(section, None)  # whole, as on the command line
            _merge(merged, named_file(section, value))
    for section, value in values.items():
        if section in FOLDERS and isinstance(value, str):
            continue
        if section in SECTIONS and section != "run_dir" and not isinstance(value, dict | None):
            raise UserError(f"{path}: {section}: expected keys under it, not {value!r}")
        _merge(merged, {section: value})
    return merged


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif value is not None or key not in into or not isinstance(into[key], dict):
            into[key] = value


def config_files(section: str) -> list[Path]:
    """The shipped YAML files that ``section=NAME`` can take."""
    return sorted((config_root() / FOLDERS[section]).glob("*.yaml"))


def named_file(section: str, name: str) -> dict[str, Any]:
    """Reads the file that ``section=name`` takes. Raises UserError: there is none."""
    folder = config_root() / FOLDERS[section]
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise unknown(f"{section} config", name, (f.stem for f in config_files(section)))
    return _read(file, ())


def _apply(values: dict[str, Any], overrides: list[str], notes: list[str]) -> None:
    """Lays ``key=value`` arguments over ``values``: ``adapter=lora`` takes a file,
    ``adapter.rank=8`` sets a key.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if equals and not text:
            raise UserError(
                f"'{override}': nothing stands after the equals sign (an empty variable?); for no"
                f" value write {key}=null, for an empty text {key}='\"\"'"
            )
        if not equals or not all(parts) or len(parts) > 2:
            raise UserError(
                f"'{override}': expected section.key=value, e.g. train.lr=1e-4 or adapter=hoft"
            )
        if parts[0] not in SECTIONS:
            raise UserError(
                f"{key}: no section '{parts[0]}'.{nearest(parts[0], SECTIONS)} Allowed:"
                f" {', '.join(SECTIONS)}"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if not isinstance(value, str | bool | list | None) and str(value) != text:
            value = text  # {instruction} is no mapping, revision 0123 no octal number
        if len(parts) == 1 and key in FOLDERS:
            # A section chosen by name replaces the file's whole section: no path or rank of another
            # survives.
            values.pop(key, None)
            given.pop(key, None)
            named = named_file(key, text)
            notes += [
                f"{key}={text} also sets {other}.{k}={v}"
                for other in named
                if other != key
                for k, v in named[other].items()
            ]
            _merge(values, named)
        elif len(parts) == 1:
            if key != "run_dir":
                raise UserError(f"{key}: is a section; set a key of it, e.g. {key}.KEY=VALUE")
            given[key] = text
        else:
            given.setdefault(parts[0], {})[parts[1]] = value
    for section, (_, _, default, _) in NAMED.items():
        wanted = given.get(section, {}).get("name")
        held = values.get(section)
        if wanted and isinstance(held, dict) and held.get("name", default) != wanted:
            allowed = _field_names(config_class(section, str(wanted)))
            dropped = sorted(k for k in held if k not in allowed)
            if dropped:
                keys = ", ".join(f"{section}.{k}" for k in dropped)
                notes.append(
                    f"{section}.name={wanted} replaces {held.get('name', default)}: {keys} of the"
                    " file do not apply"
                )
            values[section] = {k: v for k, v in held.items() if k in allowed}
    for key, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        set_now, held = given.get("train", {}), values.get("train") or {}
        if set_now.get(key) is not None and other not in set_now and held.get(other) is not None:
            notes.append(f"train.{key}={set_now[key]} replaces train.{other}={held[other]}")
            values["train"] = {**held, other: None}
    _merge(values, given)


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Builds the typed config from nested mappings (``config.yaml``, or merged files)."""
    for section in values:
        if section not in SECTIONS:
            raise UserError(
                f"no section '{section}'.{nearest(str(section), SECTIONS)} Allowed:"
                f" {', '.join(SECTIONS)}"
            )
        if section != "run_dir" and not isinstance(values[section] or {}, dict):
            raise UserError(f"{section}: expected keys under it, not {values[section]!r}")
    if not values.get("run_dir"):
        raise UserError(
            "run_dir is not set: add run_dir=runs/NAME, the folder for checkpoints and results"
        )
    if isinstance(values["run_dir"], dict | list):
        raise UserError(f"run_dir={values['run_dir']}: expected the name of one folder")
    values = {section: dict(values.get(section) or {}) for section in (*PLAIN, *NAMED)} | {
        "run_dir": values["run_dir"]
    }
    _fill_from_protocol(values["data"], values["evaluate"])
    sections: dict[str, Any] = {s: _build(c, values[s], s) for s, c in PLAIN.items()}
    for section, (_, _, default, _) in NAMED.items():
        given = values[section]
        given.setdefault("name", default)
        sections[section] = _build(config_class(section, str(given["name"])), given, section)
    config = RunConfig(run_dir=str(values["run_dir"]), **sections)
    _check(config)
    return config


def _fill_from_protocol(data: dict[str, Any], evaluate: dict[str, Any]) -> None:
    """Gives keys that are not set the values of ``data.protocol``."""
    cls: type[TaskConfig] = config_class("data", str(data.get("name", NAMED["data"][2])))
    name = data.get("protocol", getattr(cls, "protocol", None))
    if name is None:
        return
    if name not in cls.PROTOCOLS:
        raise UserError(f"data.protocol: {unknown('protocol', str(name), cls.PROTOCOLS)}")
    protocol = cls.PROTOCOLS[name]
    for given, fixed in ((data, protocol.data), (evaluate, protocol.evaluate)):
        for key, value in fixed.items():
            given.setdefault(key, value)


def deviations(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (the protocol's value, the one here) where a run departs from its
    ``data.protocol``; empty without one.
    """
    if config.data.protocol is None:
        return {}
    protocol = config.data.PROTOCOLS[config.data.protocol]
    sections = (
        ("data", config.data, protocol.data),
        ("evaluate", config.evaluate, protocol.evaluate),
    )
    limit = (
        {} if config.evaluate.limit is None else {"evaluate.limit": (None, config.evaluate.limit)}
    )
    return limit | {
        f"{section}.{key}": (value, getattr(held, key))
        for section, held, fixed in sections
        for key, value in fixed.items()
        if getattr(held, key) != value
    }


def adapter_config(values: dict[str, Any]) -> AdapterConfig:
    """Builds a method's config from a mapping with ``name``."""
    if "name" not in values:
        raise unknown("adapter", "", lookup.available("adapters"))
    built: AdapterConfig = _build(config_class("adapter", str(values["name"])), values, "adapter")
    return built


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _build(cls: type, values: dict[str, Any], section: str) -> Any:
    for key in values:
        if key not in _field_names(cls):
            name = f" of {values['name']}" if "name" in values else ""
            raise UserError(
                f"{section}.{key}={values[key]}: no such"
                f" key{name}.{nearest(str(key), _field_names(cls))} Allowed:"
                f" {', '.join(_field_names(cls))}"
            )
    try:
        built = cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a setting that does not go with another
            text = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{section}.{text}") from None
        path = ".".join(str(p) for p in (section, *first["loc"]))
        raise UserError(
            f"{path}={first.get('input')!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from None
    for key, value in values.items():
        if isinstance(value, bool) and getattr(built, key) is not value:  # true is no 1 here
            raise UserError(
                f"{section}.{key}={str(value).lower()}: Input should be a number, not true or false"
            )
    return built


def _check(config: RunConfig) -> None:
    """Refuses combinations in which a setting cannot take effect."""
    train, model, data = config.train, config.model, config.data
    if (train.max_steps is None) == (train.epochs is None):
        raise UserError(
            "give one of train.max_steps and train.epochs" + (", not both" if train.epochs else "")
        )
    if train.max_steps is not None:
        check_length(train, train.max_steps)
    if train.eval_every and not (data.valid or data.valid_size):
        raise UserError(
            "train.eval_every is set, but there are no held-out rows: set data.valid or"
            " data.valid_size"
        )
    if data.valid and data.valid_size:
        raise UserError("give one of data.valid and data.valid_size, not both")
    if model.double_quant and model.quant != "nf4":
        raise UserError(f"model.double_quant=true needs model.quant=nf4, not {model.quant}")
    if model.path != BUILTIN and model.pretrain_steps:
        raise UserError(
            f"model.pretrain_steps is for model.path={BUILTIN} alone, not for {model.path}"
        )
    if model.path == BUILTIN and (model.revision or model.tokenizer):
        raise UserError(
            f"model.revision and model.tokenizer have no effect with model.path={BUILTIN}; remove"
            " them"
        )


def check_length(train: TrainConfig, total: int) -> None:
    """Refuses a stop that a run of ``total`` steps never reaches."""
    end = f"train.max_steps={total}"
    if train.max_steps is None:
        end = f"train.epochs={train.epochs} ({total} steps)"
    if train.stop_at is not None and train.stop_at >= total:
        raise UserError(f"train.stop_at={train.stop_at} is not before the end, {end}")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns nested plain values: YAML, JSON and ``from_dict`` take them."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns dotted key -> (old, new) for every key that differs, without those that are free to
    change.
    """
    flat_old, flat_new = (dict(flatten(d)) for d in (old, new))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in keys
        if flat_old.get(key) != flat_new.get(key) and not matches_key(key, FREE_TO_CHANGE)
    }


def matches_key(key: str, listed: tuple[str, ...]) -> bool:
    """True if ``key`` is listed, or its section is (``engine.``)."""
    return any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in listed)


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flat += flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
