"""What is compared: the methods at one budget, the rates of each, the seeds; as a file."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scalepeft.adapters import inject, sizing
from scalepeft.adapters.sizing import SHARED
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import digest, read_mapping
from scalepeft.core.log import say
from scalepeft.data.rows import expand, paths_of
from scalepeft.data.tokens import tokenizer_hash
from scalepeft.models import dimensions, hub, shapes
from scalepeft.models.weights import Weights

AT_THE_END = 10**9  # train.eval_every that leaves the held-out loss of the last step alone


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
        refused: why it cannot be put on this model; else empty.
    """

    label: str
    adapter: dict[str, Any]
    usual_lr: float
    rates: list[float]
    parameters: int = 0
    size: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Design:
    """A whole comparison.

    Attributes:
        values: the run's config as nested values; adapter, rate and seed are each cell's own.
        methods: the competitors.
        lrs: the sweep as it was asked for.
        sweep_seed: of the runs that choose the rate.
        seeds: of the runs that are reported; the sweep's is not among them.
        budget: what is equal: ``parameters`` or ``steps``.
        target: parameters, for ``parameters``.
        reference: the method that the others are held against.
        evaluate: generate and score ``data.test`` too.
        files: what ``read_inputs`` finds: data files by content, base and tokenizer.
    """

    values: dict[str, Any]
    methods: list[Method]
    lrs: str
    sweep_seed: int
    seeds: list[int]
    budget: str
    target: int | None
    reference: str
    evaluate: bool
    files: dict[str, Any]

    @property
    def swept(self) -> bool:
        """There is more than one rate to choose from."""
        return len(self.methods[0].rates) > 1

    def method(self, label: str) -> Method:
        """Return the method of this label."""
        return next(m for m in self.methods if m.label == label)

    def config(self, method: Method, lr: float, seed: int) -> RunConfig:
        """Return the config of a cell."""
        train = {**self.values["train"], "lr": lr, "seed": seed}
        return cfg.from_dict({**self.values, "adapter": method.adapter, "train": train})

    def stated(self) -> str:
        """Return the budget in words."""
        if self.budget == "steps":
            return "the same steps; sizes as configured"
        return (
            f"the same trained parameters, {self.target or 0:,}, where a method's size can be set,"
            " and the same steps"
        )

    def text(self) -> str:
        """Return what ``read`` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> "Design":
        """Read a comparison's file. Raise UserError if there is none, or a broken one."""
        values = read_mapping(file, json.loads, "name the config and --methods to begin one")
        try:
            methods = [Method(**m) for m in values.pop("methods")]
            return cls(methods=methods, **values)
        except (KeyError, TypeError):
            raise UserError(
                f"{file}: of another version of scalepeft; give the config and --methods again"
            ) from None


def parse_rates(text: str, usual: float) -> list[float]:
    """Return ``1e-4,3e-4`` as they are, ``x0.3,x1,x3`` times the method's usual rate; ascending.

    Raises:
        UserError: no such list.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    factors = [part.startswith("x") for part in parts]
    try:
        numbers = [float(part.removeprefix("x")) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or any(factors) != all(factors) or not all(0 < v < math.inf for v in numbers):
        raise UserError(
            f"--lrs {text}: expected rates (1e-4,3e-4,1e-3), or factors on each method's usual one"
            " (x0.3,x1,x3)"
        )
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--lrs {text}: a rate appears twice")
    # 0.3 * 1e-3 is 3.0000000000000003e-04 to a computer; a rate is a name here too.
    return sorted(float(f"{v * usual if factors[0] else v:.6g}") for v in numbers)


def read_method(name: str) -> tuple[str, dict[str, Any], float]:
    """Return (label, settings, usual rate) of a file of configs/adapters, or of a YAML file.

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


def bare_model(config: RunConfig) -> nn.Module:
    """Return the model without an adapter on the meta device."""
    source = dimensions.find(config.model)
    with source.folder(source.layers) as folder:
        model: nn.Module = shapes.meta_model(str(folder))
    return model


def fit_method(base: nn.Module, method: Method, target: int | None) -> Method:
    """Return the method at the size nearest to ``target`` (None: as configured), with its count.

    What has one size keeps it and says so; what does not fit the model is ``refused``.
    """
    key = sizing.size_key(inject.adapter_config(method.adapter))
    adapter, size = method.adapter, "as configured" if target is None else "its own size"
    try:
        if target is not None and key is not None:
            adapter = sizing.fit(adapter, key, sizing.adapted_shapes(base, adapter), target)
            size = f"{key}={adapter[key]}"
        parameters = sizing.count_parameters(base, adapter)
    except UserError as error:
        return dataclasses.replace(method, refused=" ".join(str(error).split()))
    if target is not None and key is not None and abs(parameters - target) > 0.1 * target:
        size += ", the nearest there is"
    return dataclasses.replace(method, adapter=adapter, parameters=parameters, size=size)


def target_parameters(
    base: nn.Module, reference: str, rank: int | None, shared: dict[str, Any]
) -> int:
    """Count the reference's parameters at ``rank`` (16), or at its own size where it has none.

    Raises:
        UserError: ``rank`` for a method that has none, or one that does not fit this model.
    """
    adapter = {**read_method(reference)[1], **shared}
    if sizing.size_key(inject.adapter_config(adapter)) == "rank":
        adapter = sizing.resize(adapter, "rank", rank or 16)
    elif rank is not None:
        raise UserError(f"--rank {rank}: {reference} has no rank; give --parameters N")
    return sizing.count_parameters(base, adapter)


def read_inputs(config: RunConfig, evaluate: bool) -> dict[str, Any]:
    """Return what the numbers depend on beside the config, wherever it lies: for each split the
    sha256 of its files (of a data set of the hub its name); ``base``, ``tokenizer`` if folders.
    """
    inputs: dict[str, Any] = {}
    for split in ("train", "valid", *(["test"] if evaluate else [])):
        sources = expand(getattr(config.data, split), f"data.{split}")
        inputs[split] = [
            part for s in sources for part in ([digest(path) for path in paths_of(s)] or [s])
        ]
    model = config.model
    folder = Path(model.path)
    if model.path != hub.BUILTIN and folder.is_dir():
        inputs["base"] = Weights(folder).fingerprint()
    if model.path != hub.BUILTIN and Path(model.tokenizer or folder).is_dir():
        inputs["tokenizer"] = tokenizer_hash(hub.load_tokenizer(model, folder))
    return inputs


def read_settings(path: str | None, settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (config without what each cell sets itself, adapter settings that all methods share).

    Raises:
        UserError: a setting that the comparison decides.
    """
    decided = {"train.lr": "--lrs", "run_dir": "--out", "adapter": "--methods"}
    shared = [s for s in settings if s.partition("=")[0] in [f"adapter.{name}" for name in SHARED]]
    rest = [s for s in settings if s not in shared]
    for setting in rest:
        key = setting.partition("=")[0]
        if key in decided or key.startswith("adapter."):
            raise UserError(
                f"{setting}: a comparison takes {decided.get(key, '--methods FILE.yaml with it')};"
                f" of the adapter, all methods share {' and '.join(SHARED)} alone"
            )
    notes: list[str] = []
    values = config_files.values_of(path, rest, notes)
    for note in notes:
        say(note)
    values.pop("adapter", None)  # of the file: each method brings its own
    return values, config_files.values_of(None, shared, [])["adapter"] if shared else {}
