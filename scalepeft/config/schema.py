"""The typed settings of a run; one line with the dotted path for every mistake in them."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from scalepeft.adapters.base import Adapter, AdapterConfig
from scalepeft.core import registry
from scalepeft.core.errors import UserError, nearest, refuse, unknown
from scalepeft.core.fields import (
    ON_OFF,
    STRICT,
    Decides,
    NotNegative,
    Positive,
    Seed,
    TextList,
    _build,
    deciding,
    split_commas,
)
from scalepeft.core.text import one_line, plain
from scalepeft.data.tasks.base import Task, TaskConfig
from scalepeft.models.hub import BUILTIN, ModelConfig
from scalepeft.parallel.base import Engine, EngineConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The optimization.

    Attributes:
        max_steps: optimizer steps; or give ``epochs``.
        epochs: passes over the training data, a fraction allowed.
        global_batch: rows a step over all ranks; fixed for the life of a run.
        micro_batch: rows a forward on one rank, at most; where rows are packed, see micro_tokens.
        batching: ``packed``: rows lie one behind the other in lines without padding, and none sees
            another; ``padded``: each is a line; ``auto``: packed where the base's attention can.
            The losses are the same.
        micro_tokens: tokens a forward on one rank, at most (a longer row is alone), where rows are
            packed; null: micro_batch * data.cutoff.
        lr: peak learning rate.
        schedule: after warm-up: ``linear`` or ``cosine`` to zero, or ``constant``.
        warmup_steps: linear from zero.
        weight_decay: AdamW's, where decay means "towards the base" (never on rotations, scales).
        beta1: AdamW.
        beta2: AdamW.
        eps: AdamW.
        max_grad_norm: clipping; 0 switches it off.
        max_nonfinite: a step whose loss or gradient is not finite is skipped; so many in a row stop
            the run.
        seed: of start values, data order, dropout.
        precision: dtype of base and activations; the adapter and its optimizer stay fp32.
        deterministic: ``on``: each operation by an algorithm that gives the same bits every time
            (a slower attention backward on GPUs); one that has none ends the run. ``auto``: on GPUs
            what costs next to nothing, cuBLAS and cuDNN. CPUs are deterministic without it.
        loss_chunk: tokens whose logits exist at one time.
        save_every: steps between checkpoints.
        save_mode: ``gathered``: rank 0 writes all; ``sharded``: each rank its own part; ``async``:
            that too, from a copy while the training goes on; ``auto``: async once parameters and
            moments exceed 64 MiB, else gathered.
        keep_checkpoints: newest verified checkpoints that are kept.
        eval_every: steps between held-out losses; 0 switches them off.
        diagnose_every: steps between rows of diagnostics.jsonl (how far layers moved); 0: none.
        stop_at: save and leave with exit code 75 when this step is done (a planned stop).
        tensorboard: write TensorBoard events to RUN_DIR/tensorboard.
        wandb: W&B project to log to.
    """

    max_steps: Annotated[Positive | None, Decides.LENGTH] = None
    epochs: Annotated[Annotated[float, Field(gt=0)] | None, Decides.LENGTH] = None
    global_batch: Annotated[Positive, Decides.TRAINING, Decides.SPEED] = 16
    micro_batch: Annotated[Positive, Decides.SPEED] = 4
    batching: Annotated[Literal["auto", "packed", "padded"], Decides.SPEED] = "auto"
    micro_tokens: Annotated[Positive | None, Decides.SPEED] = None
    lr: Annotated[float, Field(gt=0), Decides.TRAINING] = 1e-4
    schedule: Annotated[Literal["linear", "cosine", "constant"], Decides.TRAINING] = "linear"
    warmup_steps: Annotated[NotNegative, Decides.TRAINING] = 0
    weight_decay: Annotated[float, Field(ge=0), Decides.TRAINING] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1), Decides.TRAINING] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1), Decides.TRAINING] = 0.999
    eps: Annotated[float, Field(gt=0), Decides.TRAINING] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0), Decides.TRAINING] = 1.0
    max_nonfinite: Annotated[Positive, Decides.RECORDS] = 5
    seed: Annotated[Seed, Decides.TRAINING] = 0
    precision: Annotated[
        Literal["fp32", "bf16"], Decides.TRAINING, Decides.PREDICTIONS, Decides.SPEED
    ] = "bf16"
    deterministic: Annotated[Literal["auto", "on", "off"], ON_OFF, Decides.SPEED] = "auto"
    loss_chunk: Annotated[Positive, Decides.SPEED] = 1024
    save_every: Annotated[Positive, Decides.RECORDS] = 100
    save_mode: Annotated[Literal["auto", "gathered", "sharded", "async"], Decides.RECORDS] = "auto"
    keep_checkpoints: Annotated[int, Field(ge=2), Decides.RECORDS] = 2
    eval_every: Annotated[NotNegative, Decides.RECORDS] = 0
    diagnose_every: Annotated[NotNegative, Decides.RECORDS] = 0
    stop_at: Annotated[Positive | None, Decides.NOTHING] = None
    tensorboard: Annotated[bool, Decides.RECORDS] = False
    wandb: Annotated[str | None, Decides.RECORDS] = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """Generation for ``scalepeft evaluate``.

    Attributes:
        batch_size: rows a rank answers at once; a greedy one that ends makes room for the next.
        max_new_tokens: length limit of an answer.
        max_tokens: of prompt and answer together, greedy only; null: the model's positions.
        num_beams: of a beam search; 1 is greedy. Nothing is ever sampled.
        stop: texts at which an answer ends; they and what follows are cut.
        limit: score only the first so many rows of each source; null scores all.
        backend: ``hf``: any base with its adapter, on the run's engine; ``vllm``: merged
            checkpoints, and adapters that export as a LoRA, where vLLM is installed.
    """

    batch_size: Annotated[Positive, Decides.NOTHING] = 16
    max_new_tokens: Annotated[Positive, Decides.PREDICTIONS] = 32
    max_tokens: Annotated[Positive | None, Decides.PREDICTIONS] = None
    num_beams: Annotated[Positive, Decides.PREDICTIONS] = 1
    stop: Annotated[TextList, Decides.PREDICTIONS] = Field(default_factory=list)
    limit: Annotated[Positive | None, Decides.SCORES] = None
    backend: Annotated[Literal["hf", "vllm"], Decides.PREDICTIONS] = "hf"


Subject = Literal["adapter", "merged", "base"]  # what an evaluation scores


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PipelineConfig:
    """What ``scalepeft pipeline`` does after the training.

    Attributes:
        merge: into the base's ``original`` weights, into what the adapter saw in training
            (``dequantized``; the same for a base that is not quantized), or ``none``.
        dtype: of the merged weights: as the ``base``, ``fp32`` or ``bf16``.
        evaluate: what is scored: the ``adapter`` over the run's base, the ``merged`` checkpoint,
            or the ``base`` alone; several by comma.
    """

    DECIDES: ClassVar = (Decides.NOTHING,)

    merge: Literal["dequantized", "original", "none"] = "dequantized"
    dtype: Literal["base", "fp32", "bf16"] = "base"
    evaluate: Annotated[list[Subject], BeforeValidator(split_commas)] = Field(
        default_factory=lambda: list[Subject](("base", "merged"))
    )


@plain_dataclass(frozen=True)
class RunConfig:
    """All that defines a run; adapter, engine and data are of the class that ``name`` picks."""

    run_dir: str
    model: ModelConfig
    data: TaskConfig
    adapter: AdapterConfig
    engine: EngineConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    extensions: str | None = None


# section -> (folder of scalepeft, what to call an entry, the name if none is given, its protocol,
# the settings of every one)
NAMED: dict[str, tuple[str, str, str, Any, type]] = {
    "adapter": ("adapters.methods", "adapter", "hoft", Adapter, AdapterConfig),
    "engine": ("parallel", "engine", "single", Engine, EngineConfig),
    "data": ("data.tasks", "task", "toy", Task, TaskConfig),
}
PLAIN: dict[str, type] = {
    "model": ModelConfig, "train": TrainConfig, "evaluate": EvaluateConfig,
    "pipeline": PipelineConfig,
}  # fmt: skip
SECTIONS = [f.name for f in dataclasses.fields(RunConfig) if f.name != "extensions"]
TOP = ("run_dir", "run_name", "recipe", "extensions")
"""Keys that are no section. ``run_name`` and ``recipe`` are there for other settings to refer to;
``extensions`` is a folder with methods, engines and tasks of others.
"""
ALIASES = {"data.tokenise": "data.tokenize", "model.quantised_cache": "model.quantized_cache"}
"""Former spellings, taken in files, on the command line and in older runs."""


def renamed_key(key: str) -> str:
    """A dotted key as it is spelled now."""
    return ALIASES.get(key, key)


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with every key as it is spelled now. Raise UserError for both spellings of one."""
    for old, new in ALIASES.items():
        (section, was), now = old.split("."), new.split(".")[1]
        keys = values.get(section)
        if isinstance(keys, dict) and was in keys:
            if now in keys:
                raise UserError(f"{new} and {old} are one setting, both are set: remove {old}")
            values = {**values, section: {now if k == was else k: v for k, v in keys.items()}}
    return values


def config_class(section: str, name: str) -> type:
    """Return the config dataclass of a section whose ``name`` picks it."""
    package, kind, _, protocol, _ = NAMED[section]
    return registry.find_class(package, name, kind, protocol).Config


def every_class() -> Iterator[tuple[str, type]]:
    """Section and config dataclass: of the plain sections, of every adapter, engine and task."""
    yield from PLAIN.items()
    for section, (package, *_) in NAMED.items():
        for name in registry.available(package):
            yield section, config_class(section, name)


def use_extensions(folder: Any) -> str | None:
    """Register the names of a folder (else ``$SCALEPEFT_EXTENSIONS``); return its absolute path."""
    folder = folder or os.environ.get("SCALEPEFT_EXTENSIONS")
    if not folder:
        return None
    if not isinstance(folder, str):
        raise UserError(f"extensions={folder!r}: expected the name of one folder")
    registry.extend(folder)
    return str(Path(folder).resolve())


def check_sections(values: dict[str, Any], where: str = "") -> None:
    """Raise UserError, after ``where``, if a section is none of ours or holds no keys."""
    for section, value in values.items():
        if section not in (*SECTIONS, *TOP):
            near = nearest(str(section), SECTIONS)
            raise UserError(f"{where}no section '{section}'.{near} Allowed: {', '.join(SECTIONS)}")
        if section not in TOP and not isinstance(value, dict | None):
            fix = f"set keys of it, {section}.KEY=VALUE"
            raise UserError(f"{where}{section} is a section, not {value!r}: {fix}")


def from_dict(values: dict[str, Any], saved: bool = False) -> RunConfig:
    """Build the typed config from nested mappings: merged files, or ``saved`` ones of a run."""
    values = renamed(values)
    check_sections(values)
    run_dir = values.get("run_dir")
    if not run_dir:
        fix = "add run_dir=runs/NAME, the folder for checkpoints and results"
        raise UserError(f"run_dir is not set: {fix}")
    if isinstance(run_dir, dict | list):
        raise UserError(f"run_dir={run_dir}: expected the name of one folder")
    extensions = use_extensions(values.get("extensions"))
    found = {section: dict(values.get(section) or {}) for section in (*PLAIN, *NAMED)}
    classes: dict[str, Any] = dict(PLAIN)
    for section, (_, _, default, *_) in NAMED.items():
        found[section].setdefault("name", default)
        classes[section] = config_class(section, str(found[section]["name"]))
    found["adapter"] = {**(classes["adapter"].BEFORE if saved else {}), **found["adapter"]}
    task: type[TaskConfig] = classes["data"]
    name = found["data"].get("protocol", getattr(task, "protocol", None))
    for section, fixed in protocol_values(task, name).items():
        found[section] = {**fixed, **found[section]}
    built = {section: _build(cls, found[section], section) for section, cls in classes.items()}
    config = RunConfig(run_dir=str(run_dir), extensions=extensions, **built)
    _check_plain(config)
    _check(config)
    return config


TEXTS = (Decides.ROWS, Decides.PREDICTIONS, Decides.SCORES)
"""What fields decide that may hold any text."""


def _check_plain(config: RunConfig) -> None:
    """Raise UserError for a control character in all but the texts of prompts and answers."""
    for key, value in flatten(to_dict(config)):
        section, _, name = key.partition(".")
        texts = value if isinstance(value, list) else [value]
        wrong = [text for text in texts if isinstance(text, str) and not plain(text)]
        if wrong and not (name and name in deciding(type(getattr(config, section)), *TEXTS)):
            raise UserError(
                f"{key}={one_line(wrong[0], 100)}: has control characters, or is not UTF-8; a path,"
                " a name or a setting of one line may not"
            )


def protocol_values(task: type[TaskConfig], name: str | None) -> dict[str, dict[str, Any]]:
    """What a ``data.protocol`` sets, by section; nothing for None. Raise UserError if unknown."""
    if name is None:
        return {}
    if name not in task.PROTOCOLS:
        raise UserError(f"data.protocol: {unknown('protocol', str(name), task.PROTOCOLS)}")
    protocol = task.PROTOCOLS[name]
    return {"data": protocol.data, "evaluate": protocol.evaluate}


def deviations(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (the value of ``data.protocol``, the one here) where they differ."""
    values = dict(flatten(to_dict(config)))
    fixed = dict(flatten(protocol_values(type(config.data), config.data.protocol)))
    expected = {"evaluate.limit": None, **fixed} if fixed else {}
    return {key: (was, values[key]) for key, was in expected.items() if was != values[key]}


def _check(config: RunConfig) -> None:
    """Raise UserError for a combination in which a setting cannot take effect."""
    train, model, data = config.train, config.model, config.data
    both = ", not both" if train.epochs else ""
    length = (train.max_steps is None) != (train.epochs is None)
    rows = data.valid or data.valid_size or data.OWN_VALID
    tiny, elsewhere = model.path == BUILTIN, model.revision or model.tokenizer
    refuse({
        f"give one of train.max_steps and train.epochs{both}": not length,
        "train.eval_every needs held-out rows: set data.valid or data.valid_size":
            train.eval_every and not rows,
        "give one of data.valid and data.valid_size, not both": data.valid and data.valid_size,
        f"model.double_quant=true needs model.quant=nf4, not {model.quant}":
            model.double_quant and model.quant != "nf4",
        f"model.pretrain_steps is for model.path={BUILTIN} alone, not for {model.path}":
            model.pretrain_steps and not tiny,
        f"model.path={BUILTIN} takes no model.revision and no model.tokenizer; remove them":
            tiny and elsewhere,
    })  # fmt: skip
    if train.max_steps is not None:
        check_length(train, train.max_steps)


def check_length(train: TrainConfig, total: int) -> None:
    """Raise UserError for a stop that a run of ``total`` steps never reaches."""
    end = f"train.max_steps={total}"
    if train.max_steps is None:
        end = f"train.epochs={train.epochs} ({total} steps)"
    if train.stop_at is not None and train.stop_at >= total:
        raise UserError(f"train.stop_at={train.stop_at} is not before the end, {end}")


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat += flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested plain values: YAML, JSON and ``from_dict`` take them."""
    return dataclasses.asdict(config)


RESOLVED = "# resolved: each ${ below is text\n"


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; ``files`` resolves no ``${...}`` of it again."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    return RESOLVED + text if "${" in text else text
