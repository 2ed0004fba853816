"""What is compared, fairly: the methods at one budget, the rates of each, the seeds; as a file."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scalepeft.adapters import inject, sizing
from scalepeft.adapters.sizing import SHARED, count_parameters, resize, size_key
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping
from scalepeft.core.log import say
from scalepeft.data.rows import expand, paths_of
from scalepeft.data.tokens import tokenizer_hash
from scalepeft.models import dimensions as sources
from scalepeft.models import hub as models
from scalepeft.models import shapes
from scalepeft.models.hub import BUILTIN
from scalepeft.models.weights import Weights

AT_THE_END = 10**9  # train.eval_every that leaves the held-out loss of the last step alone
CALIBRATION_STEPS = 10


@dataclass(frozen=True)
class Method:
    """One competitor.

    Attributes:
        label: name of its config file.
        adapter: its settings, at the size it competes with.
        usual_lr: the rate of its config file.
        rates: those it is tried at.
        parameters: how many it trains.
        size: how it came to that, in words.
        follows: its size could be set to the budget's.
        refused: why it cannot be put on this model; else empty.
    """

    label: str
    adapter: dict[str, Any]
    usual_lr: float
    rates: list[float]
    parameters: int = 0
    size: str = ""
    follows: bool = True
    refused: str = ""


@dataclass(frozen=True)
class Design:
    """A whole comparison.

    Attributes:
        values: the run's config as nested values; adapter, rate, seed, steps are each cell's own.
        methods: the competitors.
        lrs: the sweep as it was asked for.
        sweep_seed: of the runs that choose the rate.
        seeds: of the runs that are reported; the sweep's is not among them.
        budget: what is equal: ``parameters``, ``time`` or ``steps``.
        seconds: of training, for ``time``.
        target: parameters, for ``parameters``.
        reference: the method that the others are held against.
        evaluate: generate and score ``data.test`` too.
        inputs: what ``inputs`` finds: data files by content, base and tokenizer.
    """

    values: dict[str, Any]
    methods: list[Method]
    lrs: str
    sweep_seed: int
    seeds: list[int]
    budget: str
    seconds: float | None
    target: int | None
    reference: str
    evaluate: bool
    inputs: dict[str, Any]

    @property
    def swept(self) -> bool:
        """There is more than one rate to choose from."""
        return len(self.methods[0].rates) > 1

    def method(self, label: str) -> Method:
        """The method of this label."""
        return next(m for m in self.methods if m.label == label)

    def config(self, method: Method, lr: float, seed: int, steps: int | None = None) -> RunConfig:
        """The config of a cell; ``steps`` in place of those of the config."""
        train = {**self.values["train"], "lr": lr, "seed": seed}
        if steps is not None:
            train |= {"max_steps": steps, "epochs": None}
        return cfg.from_dict({**self.values, "adapter": method.adapter, "train": train})

    def stated(self) -> str:
        """The budget in words."""
        if self.budget == "time":
            return (
                f"the same training time, {self.seconds:g} s (steps from a short calibration);"
                " sizes as configured"
            )
        if self.budget == "steps":
            return "the same steps; sizes as configured"
        return (
            f"the same trained parameters, {self.target or 0:,}, where a method's size can be set,"
            " and the same steps"
        )

    def text(self) -> str:
        """What ``read`` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> "Design":
        """Reads a comparison's file. Raises UserError: none there, or broken."""
        values = read_mapping(file, json.loads, "name the config and --methods to begin one")
        try:
            methods = [Method(**m) for m in values.pop("methods")]
            return cls(methods=methods, **values)
        except (KeyError, TypeError):
            raise UserError(
                f"{file}: of another version of scalepeft; give the config and --methods again"
            ) from None


def rates(text: str, usual: float) -> list[float]:
    """``1e-4,3e-4`` as they are, ``x0.3,x1,x3`` times the method's usual rate; ascending.

    Raises:
        UserError: no such list.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    factors = [part.startswith("x") for part in parts]
    try:
        found = [float(part.removeprefix("x")) for part in parts]
    except ValueError:
        found = []
    if not found or any(factors) != all(factors) or not all(0 < v < math.inf for v in found):
        raise UserError(
            f"--lrs {text}: expected rates (1e-4,3e-4,1e-3), or factors on each method's usual one"
            " (x0.3,x1,x3)"
        )
    if len(set(found)) < len(found):
        raise UserError(f"--lrs {text}: the same rate stands there twice")
    # 0.3 * 1e-3 is 3.0000000000000003e-04 to a computer; a rate is a name here too.
    return sorted(float(f"{v * usual if factors[0] else v:.6g}") for v in found)


def named(name: str) -> tuple[str, dict[str, Any], float]:
    """(label, settings, usual rate) of a file of configs/adapters, or of a YAML file of one's own.

    Raises:
        UserError: no such file, or one without a method or a rate.
    """
    if name.endswith((".yaml", ".yml")):
        label, values = Path(name).stem, config_files.values_of(name, [], [])
    else:
        label, values = name, config_files.named_file("adapter", name)
    adapter, lr = values.get("adapter"), (values.get("train") or {}).get("lr")
    if not isinstance(adapter, dict) or not isinstance(lr, int | float):
        raise UserError(
            f"--methods {name}: needs adapter settings and train.lr, as the files of"
            f" {config_files.config_root()}/adapters have them"
        )
    return label, adapter, float(lr)


def bare(config: RunConfig) -> nn.Module:
    """The bare model on the meta device."""
    source = sources.find(config.model)
    with source.folder(source.layers) as folder:
        model: nn.Module = shapes.meta_model(str(folder))
    return model


def sized(base: nn.Module, methods: list[Method], target: int | None, fitted: bool) -> list[Method]:
    """The methods with their counts; ``fitted``: at the size nearest to ``target``.

    What cannot follow keeps its size and says so; what does not fit the model is ``refused``.
    """
    found = []
    for method in methods:
        key = size_key(inject.adapter_config(method.adapter))
        adapter, size = method.adapter, "as configured"
        try:
            if fitted and key is None:
                size = "its own size"
            elif fitted and key:
                assert target is not None
                shapes_of_layers = sizing.adapted_shapes(base, adapter)
                adapter = sizing.fit(adapter, key, shapes_of_layers, target)
                size = f"{key}={adapter[key]}"
            number = count_parameters(base, adapter)
        except UserError as error:
            found.append(dataclasses.replace(method, refused=" ".join(str(error).split())))
            continue
        if fitted and key and target and abs(number - target) > 0.1 * target:
            size += ", the nearest there is"
        follows = not fitted or key is not None
        found.append(
            dataclasses.replace(
                method, adapter=adapter, parameters=number, size=size, follows=follows
            )
        )
    return found


def target_of(base: nn.Module, reference: str, rank: int | None, own: dict[str, Any]) -> int:
    """Parameters of the reference method at ``rank`` (16), or at its own size where it has none.

    Raises:
        UserError: ``rank`` for a method that has none, or one that does not fit this model.
    """
    _, adapter, _ = named(reference)
    adapter = {**adapter, **own}
    if size_key(inject.adapter_config(adapter)) == "rank":
        adapter = resize(adapter, "rank", rank or 16)
    elif rank is not None:
        raise UserError(f"--rank {rank}: {reference} has no rank; give --parameters N")
    return count_parameters(base, adapter)


def inputs(config: RunConfig, evaluate: bool) -> dict[str, Any]:
    """What the numbers depend on beside the config, wherever it lies.

    Returns:
        For each split the sha256 of its files in their order (of a data set of the hub its name);
        ``base`` and ``tokenizer`` where they are folders.
    """
    found: dict[str, Any] = {}
    for split in ("train", "valid", "test") if evaluate else ("train", "valid"):
        given: list[str] = getattr(config.data, split)
        found[split] = [
            part for source in expand(given, f"data.{split}") for part in _contents(source)
        ]
    model = config.model
    folder = Path(model.path)
    if model.path != BUILTIN and folder.is_dir():
        found["base"] = Weights(folder).fingerprint()
    if model.path != BUILTIN and Path(model.tokenizer or folder).is_dir():
        found["tokenizer"] = tokenizer_hash(models.load_tokenizer(model, folder))
    return found


def _contents(source: str) -> list[str]:
    found = []
    for path in paths_of(source):
        with path.open("rb") as f:
            found.append(hashlib.file_digest(f, "sha256").hexdigest())
    return found or [source]


def read_settings(path: str | None, settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config without what each cell sets itself, adapter settings that all methods share).

    Raises:
        UserError: a setting that the comparison decides.
    """
    decided = {"train.lr": "--lrs", "run_dir": "--out", "adapter": "--methods"}
    shared = []
    for setting in settings:
        key = setting.partition("=")[0]
        section, _, last = key.partition(".")
        if section == "adapter" and last in SHARED:
            shared.append(setting)
        elif key in decided or section == "adapter":
            option = decided.get(key, "--methods FILE.yaml with it")
            raise UserError(
                f"{setting}: a comparison takes {option}; of the adapter, all methods share"
                f" {' and '.join(f'adapter.{name}' for name in SHARED)} alone"
            )
    rest = [s for s in settings if s not in shared]
    notes: list[str] = []
    values = config_files.values_of(path, rest, notes)
    for note in notes:
        say(note)
    values.pop("adapter", None)  # of the file: each method brings its own
    return values, config_files.values_of(None, shared, [])["adapter"] if shared else {}
