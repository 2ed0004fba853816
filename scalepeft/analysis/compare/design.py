"""What is compared: the methods at one budget, the rates of each, the seeds; as a file."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from scalepeft.adapters import inject, sizing
from scalepeft.build import task_of
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.files import digest, read_mapping
from scalepeft.core.log import say
from scalepeft.data.rows import expand, paths_of
from scalepeft.data.tasks.base import SPLITS
from scalepeft.models import hub

AT_THE_END = 10**9  # train.eval_every that leaves the held-out loss of the last step alone


@dataclass(frozen=True)
class Method:
    """One competitor."""

    label: str  # name of its config file
    adapter: dict[str, Any]  # at the size it competes with
    usual_lr: float  # of its config file, at the size it competes with
    rates: list[float]  # those it is tried at
    parameters: int = 0  # how many it trains
    size: str = ""  # how it came to that, in words
    refused: str = ""  # why it cannot be put on this model; else empty


@dataclass(frozen=True)
class Design:
    """A whole comparison."""

    values: dict[str, Any]  # the run's config; adapter, rate and seed are each cell's own
    methods: list[Method]
    lrs: str  # the sweep as it was asked for
    sweep_seed: int  # of the runs that choose the rate
    seeds: list[int]  # of the runs that are reported; the sweep's is not among them
    budget: str  # what is equal: parameters or steps
    target: int | None  # number of parameters, for the budget of these
    reference: str  # label of the method that the others are held against
    evaluate: bool  # generate and score data.test too
    files: dict[str, Any]  # as read_inputs returns them

    @property
    def swept(self) -> bool:
        """There is more than one rate to choose from."""
        return len(self.methods[0].rates) > 1

    def method(self, label: str) -> Method:
        """Return the method of this label."""
        return next(m for m in self.methods if m.label == label)

    def config(self, method: Method, lr: float, seed: int) -> cfg.RunConfig:
        """Return the config of a cell."""
        train = {**self.values["train"], "lr": lr, "seed": seed}
        return cfg.from_dict({**self.values, "adapter": method.adapter, "train": train}, saved=True)

    def text(self) -> str:
        """Return what ``read`` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> "Design":
        """Read a comparison's file. Raise UserError if there is none, or a broken one."""
        values = read_mapping(file, json.loads, "name the config and --methods to begin one")
        try:
            return cls(**{**values, "methods": [Method(**m) for m in values["methods"]]})
        except (KeyError, TypeError):
            fix = "give the config and --methods again"
            raise UserError(f"{file}: of another version of scalepeft; {fix}") from None


def parse_rates(text: str, usual: float) -> list[float]:
    """Rates, or factors (``x3``) of the usual one, ascending. Raises UserError: no such list."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    factors = {part.startswith("x") for part in parts}
    try:
        numbers = {float(part.removeprefix("x")) for part in parts}
    except ValueError:
        numbers = set()
    if len(factors) != 1 or len(numbers) < len(parts) or not all(0 < n < math.inf for n in numbers):
        raise UserError(
            f"--lrs {text}: expected rates (1e-4,3e-4,1e-3), or factors on each method's usual one"
            " (x0.3,x1,x3), each once"
        )
    # 0.3 * 1e-3 is 3.0000000000000003e-04 to a computer; a rate is a name here too.
    return sorted(float(f"{n * usual if factors == {True} else n:.6g}") for n in numbers)


def read_method(name: str, shared: dict[str, Any] | None = None, lrs: str = "x1") -> Method:
    """A method of configs/adapters, or a YAML file, and ``shared`` settings. Raises UserError."""
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
    settings = cfg.to_dict(inject.adapter_config({**adapter, **(shared or {})}))
    return Method(label, settings, float(lr), parse_rates(lrs, lr))


def fit_method(base: nn.Module, method: Method, target: int | None, lrs: str = "x1") -> Method:
    """The method at the size nearest to ``target``, rates by its root, or ``refused``."""
    adapter, size = method.adapter, "as configured" if target is None else "its own size"
    lr = method.usual_lr
    try:
        key = sizing.size_key(inject.adapter_config(adapter))
        if target is not None and key is not None:
            adapter = sizing.fit(adapter, key, sizing.adapted_shapes(base, adapter), target)
            size = f"{key}={adapter[key]}"
            lr = float(f"{lr * math.sqrt(method.adapter[key] / adapter[key]):.3g}")
        parameters = sizing.count_parameters(base, adapter)
    except UserError as error:
        return replace(method, refused=" ".join(str(error).split()))
    if target and adapter is not method.adapter and abs(parameters - target) > 0.1 * target:
        size += ", the nearest there is"
    return Method(method.label, adapter, lr, parse_rates(lrs, lr), parameters, size)


def target_parameters(base: nn.Module, reference: Method, rank: int | None) -> int:
    """The reference's parameters at ``rank`` (16), or its own size. Raises UserError: no rank."""
    adapter = reference.adapter
    if sizing.size_key(inject.adapter_config(adapter)) == "rank":
        adapter = sizing.resize(adapter, "rank", rank or 16)
    elif rank is not None:
        raise UserError(f"--rank {rank}: {reference.label} has no rank; leave it out")
    return sizing.count_parameters(base, adapter)


def read_settings(settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Config without what each cell sets itself, adapter settings that all share) of ``[CONFIG]
    KEY=VALUE ...``. Raises UserError: a setting that the comparison decides, or nothing to compare.
    """
    decided = {"train.lr": "--lrs", "run_dir": "--out", "adapter": "--methods"}
    names = [f"adapter.{name}" for name in sizing.SHARED]
    path, settings = config_files.config_first(settings)
    shared = [s for s in settings if s.partition("=")[0] in names]
    rest = [s for s in settings if s not in shared]
    for setting in rest:
        key = setting.partition("=")[0]
        if key in decided or key.startswith("adapter."):
            raise UserError(
                f"{setting}: a comparison takes {decided.get(key, '--methods FILE.yaml with it')};"
                f" of the adapter, all methods share {' and '.join(sizing.SHARED)} alone"
            )
    notes: list[str] = []
    values = config_files.values_of(path, rest, notes)
    for note in notes:
        say(note)
    values.pop("adapter", None)  # of the file: each method brings its own
    data, train = values.get("data") or {}, values.get("train") or {}
    if not data.get("valid") and not data.get("valid_size"):
        fix = "set data.valid=FILES, or data.valid_size=ROWS to take them out of data.train"
        raise UserError(f"a comparison is by held-out loss: {fix}")
    if train.get("stop_at"):
        raise UserError(f"train.stop_at={train['stop_at']}: no cell could finish; remove it")
    values["train"] = {**train, "eval_every": train.get("eval_every") or AT_THE_END}
    return values, config_files.values_of(None, shared, [])["adapter"] if shared else {}


def read_inputs(config: cfg.RunConfig, evaluate: bool) -> dict[str, Any]:
    """What the numbers depend on beside the config: of each split the sha256 of its files (of a hub
    set its name), of ``base`` and ``tokenizer`` if folders. Raises UserError: a file or its rows.
    """
    inputs: dict[str, Any] = {}
    task, model = task_of(config), config.model
    for split in SPLITS if evaluate else SPLITS[:2]:
        sources = expand(getattr(config.data, split), f"data.{split}")
        if sources or split != "valid":
            task.examples(split)
        inputs[split] = [
            part for s in sources for part in ([digest(path) for path in paths_of(s)] or [s])
        ]
    base = hub.Base(model, Path(model.path))
    if base.folder.is_dir():
        inputs["base"] = base.fingerprint
    if Path(model.tokenizer or model.path).is_dir():
        inputs["tokenizer"] = base.tokenizer_hash
    return inputs
