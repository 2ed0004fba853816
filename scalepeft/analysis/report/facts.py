"""What a run's folder says, without believing it: what is broken is named, the rest is used."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from scalepeft.config import changes
from scalepeft.config import schema as cfg
from scalepeft.config.schema import renamed
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_lines, read_mapping
from scalepeft.eval import comet, scores
from scalepeft.run import status
from scalepeft.run.checkpoint import DamagedCheckpoint, NewerCheckpoint, RunFolder, verify
from scalepeft.run.goodput import Goodput, goodput

SUBJECTS = {"eval-base": "base", "eval": "tuned", "eval-merged": "merged"}
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "time")
MARKS = ("config.yaml", "events.jsonl", "metrics.jsonl")
"""One of them makes a folder a run's."""
SET_ASIDE = re.compile(r"\.old-\d+$")


@dataclass(frozen=True)
class Evaluation:
    """One scores.json: ``which`` is base, tuned or merged; ``about`` decides what may be compared
    with it.
    """

    which: str
    task: str
    folder: Path
    scores: dict[str, Any]
    about: dict[str, Any]
    comet: dict[str, Any] | None

    @property
    def metric(self) -> dict[str, Any]:
        """The one that tables show first."""
        return scores.first(self.scores)[1]

    @property
    def metric_name(self) -> str:
        """Its name."""
        return scores.first(self.scores)[0]

    @property
    def mean(self) -> float | None:
        """Unweighted mean of it over the sources; None with one source."""
        found: float | None = self.scores.get("mean_of_sources", {}).get(self.scores["headline"])
        return found


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        name: what it is called beside other runs.
        config: sections of config.yaml; empty where it is lost.
        metrics: rows of metrics.jsonl.
        columns: the same by key, NaN where a row has no number.
        checkpoint: manifest and state of the newest checkpoint that verifies.
        peak: the newest event that tells how much memory was held.
        adapter: adapter_config.json; empty before the end.
        problems: what could not be read, one line each.
    """

    folder: Path
    name: str
    config: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]
    columns: dict[str, np.ndarray]
    held_out: list[tuple[int, float]]
    starts: list[dict[str, Any]]
    peak: dict[str, Any]
    status: dict[str, Any]
    goodput: Goodput | None
    evaluations: list[Evaluation]
    checkpoint: dict[str, Any] | None
    adapter: dict[str, Any]
    problems: list[str]

    def get(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key."""
        section, _, name = key.partition(".")
        return self.config.get(section, {}).get(name, default)

    @property
    def last(self) -> dict[str, Any]:
        """The newest start event."""
        return self.starts[-1] if self.starts else {}

    @property
    def skipped(self) -> list[int]:
        """Steps whose loss was not finite."""
        steps, losses = self.columns["step"], self.columns["loss"]
        return [int(s) for s in steps[~np.isfinite(losses)]]


def read_all(folders: list[Path]) -> list[Run]:
    """Reads runs in the order given, each once.

    Raises:
        UserError: one of them is no run folder.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    for folder in unique:
        if not any((folder / name).is_file() for name in MARKS):
            raise UserError(
                f"{folder} is no run folder: no config.yaml, events.jsonl or metrics.jsonl in it;"
                " name the run_dir of a training"
            )
    short = [folder.resolve().name for folder in unique]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in unique]
    return [read(folder, name) for folder, name in zip(unique, names, strict=True)]


def read(folder: Path, name: str) -> Run:
    """Reads one run."""
    problems: list[str] = []
    metrics = read_lines(folder / "metrics.jsonl", "step", "loss", "sample_index")
    metrics = [row for row in metrics if np.isfinite(number(row["step"]))]
    columns = {
        key: np.array([number(row.get(key)) for row in metrics], dtype=float) for key in COLUMNS
    }
    held_out = [
        (row["step"], number(row["loss"]))
        for row in read_lines(folder / "validation.jsonl", "step", "loss")
        if np.isfinite([number(row["step"]), number(row["loss"])]).all()
    ]
    events = read_lines(folder / "events.jsonl", "event", "step", "world_size")
    ended = read_lines(folder / "events.jsonl", "event", "time")
    spent = goodput(folder)
    evaluations, broken = evaluations_of(folder)
    config = _mapping(folder / "config.yaml", yaml.safe_load, problems)
    with contextlib.suppress(UserError):  # a key under both spellings: shown as it stands
        config = renamed(config)
    adapter = folder / "adapter/adapter_config.json"
    return Run(
        folder=folder,
        name=name,
        config={k: v for k, v in config.items() if isinstance(v, dict)},
        metrics=metrics,
        columns=columns,
        held_out=held_out,
        starts=[event for event in events if event["event"] == "start"],
        peak=next((e for e in reversed(ended) if "peak_resident" in e), {}),
        status=status.status(folder),
        goodput=spent if spent and spent.wall > 0 else None,
        evaluations=evaluations,
        checkpoint=_newest(folder, problems),
        adapter=_mapping(adapter, json.loads, problems) if adapter.is_file() else {},
        problems=problems + broken + _adapter_problems(folder),
    )


def number(value: Any) -> float:
    """A finite number as it is, anything else as NaN."""
    try:
        found = float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        return np.nan
    return found if np.isfinite(found) else np.nan


def _mapping(file: Path, parse: Callable[[str], object], problems: list[str]) -> dict[str, Any]:
    try:
        return read_mapping(file, parse, "restore it")
    except UserError as error:
        problems.append(" ".join(str(error).split()))
        return {}


def evaluations_of(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """Every evaluation of a run, base first, and what of them cannot be used."""
    found: list[Evaluation] = []
    problems: list[str] = []
    known = [*SUBJECTS, *sorted({p.name for p in folder.glob("eval-*")} - set(SUBJECTS))]
    for sub in known:
        for place in sorted(p for p in (folder / sub).glob("*") if p.is_dir()):
            if SET_ASIDE.search(place.name):
                continue  # of an older adapter, or other settings
            which = SUBJECTS.get(sub, sub.removeprefix("eval-"))
            try:
                found.append(_evaluation(which, place, problems))
            except UserError as error:
                done = _lines_in(place / "predictions.jsonl")
                so_far = f" ({done} predictions there)" if done else ""
                problems.append(" ".join(str(error).split()) + so_far)
    return found, problems


def _evaluation(which: str, place: Path, problems: list[str]) -> Evaluation:
    held = scores.read(place / "scores.json")
    try:
        _check(held)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place / 'scores.json'}: damaged, or of another version"
            f" ({type(error).__name__}: {error}); evaluate again"
        ) from None
    about = _mapping(place / "settings.json", json.loads, problems)
    return Evaluation(which, place.name, place, held, about, _comet(place, problems))


def _comet(place: Path, problems: list[str]) -> dict[str, Any] | None:
    """COMET's scores of these very translations, where they were computed."""
    if not (place / "comet.json").is_file():
        return None
    held = comet.read(place)
    try:
        low, high = (held or {})["ci95"]
        texts = [(place / "comet" / name).read_bytes() for name in comet.TEXTS]
        figures = [number(value) for value in ((held or {})["score"], low, high)]
    except (KeyError, TypeError, ValueError, OSError):
        held, figures, texts = None, [], []
    if not held or not np.isfinite(figures).all():
        problems.append(f"{place / 'comet.json'}: damaged; evaluate again to have it computed")
        return None
    if hashlib.sha256(b"\0".join(texts)).hexdigest() != held["texts"]:
        problems.append(f"{place / 'comet.json'}: is of other translations; evaluate again")
        return None
    return held


def _check(held: dict[str, Any]) -> None:
    for part in (held, *held["sources"].values()):
        if type(part["count"]) is not int or type(part["no_answer_found"]) is not int:
            raise ValueError("a count that is none")
        for metric in part["metrics"].values():
            low, high = metric["ci95"]
            if not np.isfinite([number(v) for v in (metric["value"], low, high)]).all():
                raise ValueError("a metric that is no number")
            metric["share"] = bool(metric["share"])
    if not np.isfinite([number(v) for v in held.get("mean_of_sources", {}).values()]).all():
        raise ValueError("a mean that is no number")
    held["metrics"][held["headline"]]


def _lines_in(file: Path) -> int:
    if not file.is_file():
        return 0
    with file.open("rb") as f:
        return sum(1 for _ in f)


def _newest(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """Looks for the newest checkpoint that verifies, without touching the folder."""
    for step in RunFolder.steps_in(folder / "checkpoints"):
        place = folder / "checkpoints" / f"step-{step:06d}"
        try:
            manifest = verify(place)
            state = json.loads((place / "state.json").read_text())
            return {**manifest, "state": state if isinstance(state, dict) else {}}
        except (DamagedCheckpoint, NewerCheckpoint, OSError, ValueError) as error:
            problems.append(f"checkpoint {place.name} does not verify: {error}")
    return None


def _adapter_problems(folder: Path) -> list[str]:
    held, file = folder / "adapter/adapter_config.json", folder / "adapter/adapter.safetensors"
    if not held.is_file():
        return []
    told = _mapping(held, json.loads, []).get("sha256")
    if not file.is_file():
        return [f"{file}: no such file, though {held.name} says that it was written"]
    with file.open("rb") as f:
        same = told is None or hashlib.file_digest(f, "sha256").hexdigest() == told
    return [] if same else [f"{file}: has changed: sha256 differs from {held.name}"]


def not_comparable(one: Evaluation, other: Evaluation) -> list[str]:
    """What differs between two evaluations that must not where their scores are compared."""
    words = {"examples": "rows", "prompt": "prompt", "task_version": "task version"}
    found = [
        word
        for key, word in words.items()
        if None not in (one.about.get(key), other.about.get(key))
        and one.about[key] != other.about[key]
    ]
    if one.scores["count"] != other.scores["count"] and "rows" not in found:
        found.append("rows")
    if one.scores["headline"] != other.scores["headline"]:
        found.append("metric")
    how: list[Any] = [a.about.get("generation") for a in (one, other)]
    if all(isinstance(v, list) for v in how) and how[0] != how[1]:
        found.append("generation settings")
    return found


def same_rows(runs: list[Run]) -> bool:
    """True if the losses of runs are over the same rows, as far as their settings tell."""

    def rows(run: Run) -> dict[str, Any]:
        data = run.config.get("data", {})
        kept = {k: v for k, v in data.items() if changes.decides_rows(f"data.{k}")}
        # Held-out rows that are taken out of the training rows are chosen by the seed.
        return {**kept, "seed": run.get("train.seed") if run.get("data.valid_size") else None}

    return all(run.config.get("data") and rows(run) == rows(runs[0]) for run in runs)


def defaults_of(run: Run) -> dict[str, Any] | None:
    """Dotted key -> default of every setting of a run; None where its config is not one of this
    version.
    """
    found: dict[str, Any] = {}
    try:
        for section, plain in cfg.PLAIN.items():
            found |= dict(changes.flatten({section: cfg.to_dict(plain())}))
        for section in cfg.NAMED:
            name = str(run.get(f"{section}.name"))
            built = cfg.config_class(section, name)(name=name)
            found |= dict(changes.flatten({section: cfg.to_dict(built)}))
    except (UserError, TypeError, ValueError):
        return None
    return found


def protocol_of(run: Run) -> dict[str, Any]:
    """Dotted key -> value of the protocol that a run names; empty without one."""
    try:
        cls = cfg.config_class("data", str(run.get("data.name")))
        protocol = cls.PROTOCOLS[run.get("data.protocol")]  # type: ignore[attr-defined]
    except (UserError, KeyError):
        return {}
    return dict(changes.flatten({"data": protocol.data, "evaluate": protocol.evaluate}))
