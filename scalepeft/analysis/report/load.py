"""What a run's folder says: what is broken or foreign is named in a line, the rest is used."""

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
from scalepeft.config.schema import renamed
from scalepeft.core.errors import UserError
from scalepeft.core.files import digest, read_lines, read_mapping
from scalepeft.eval import comet, scores
from scalepeft.run import status
from scalepeft.run.checkpoint import DamagedCheckpoint, NewerCheckpoint, RunFolder, verify
from scalepeft.run.goodput import Goodput, goodput

SUBJECTS = {"eval-base": "base", "eval": "tuned", "eval-merged": "merged"}
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_second")
MARKS = ("config.yaml", "events.jsonl", "metrics.jsonl")
"""One of them makes a folder a run's."""
SET_ASIDE = re.compile(r"\.old-\d+$")
FOREIGN = (KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Evaluation:
    """One scores.json: ``which`` is base, tuned or merged; ``about``, its settings.json, decides
    what may be compared with it.
    """

    which: str
    task: str
    folder: Path
    scores: dict[str, Any]
    about: dict[str, Any]
    comet: dict[str, Any] | None

    @property
    def first(self) -> tuple[str, dict[str, Any]]:
        """The metric that tables show first, with its name."""
        return scores.first(self.scores)

    @property
    def means(self) -> dict[str, str]:
        """The unweighted mean of each metric over the sources, as text; none with one source."""
        means, metrics = self.scores.get("mean_of_sources", {}), self.scores["metrics"]
        held = {name: {**m, "value": means[name]} for name, m in metrics.items() if name in means}
        return {name: scores.shown(metric) for name, metric in held.items()}


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        metrics: rows of metrics.jsonl; in ``columns`` by key, NaN where a row has no number.
        held_out: step and held-out loss.
        peak: the newest event that tells how much memory was held.
        checkpoint: manifest and state of the newest one that verifies.
        unscored: what of the evaluations could not be read, a line each.
        problems: what could not be read at all, those lines among them.
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
    unscored: list[str]
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
        return [int(s) for s in self.columns["step"][~np.isfinite(self.columns["loss"])]]


def read_all(folders: list[Path]) -> list[Run]:
    """Read runs in the order given, each once.

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
    """Read one run."""
    problems: list[str] = []
    metrics = read_lines(folder / "metrics.jsonl", "step", "loss", "sample_index")
    metrics = [row for row in metrics if np.isfinite(number(row["step"]))]
    held_out = [
        (row["step"], number(row["loss"]))
        for row in read_lines(folder / "validation.jsonl", "step", "loss")
    ]
    events = read_lines(folder / "events.jsonl", "event")
    starts = [e for e in events if e["event"] == "start" and {"step", "world_size"} <= e.keys()]
    spent = goodput(folder)
    whole = spent and spent.wall > 0 and np.isfinite([*vars(spent).values()]).all()
    evaluations, unscored = evaluations_of(folder)
    config = _mapping(folder / "config.yaml", yaml.safe_load, problems)
    with contextlib.suppress(UserError):  # a key under both spellings: shown as it stands
        config = renamed(config)
    adapter = folder / "adapter/adapter_config.json"
    told = _mapping(adapter, json.loads, problems) if adapter.is_file() else {}
    return Run(
        folder=folder,
        name=name,
        config={k: v for k, v in config.items() if isinstance(v, dict)},
        metrics=metrics,
        columns={key: np.array([number(row.get(key)) for row in metrics]) for key in COLUMNS},
        held_out=[pair for pair in held_out if np.isfinite([number(v) for v in pair]).all()],
        starts=[_start(event) for event in starts],
        peak=next((e for e in reversed(events) if "peak_resident" in e), {}),
        status=status.status(folder),
        goodput=spent if whole else None,
        evaluations=evaluations,
        checkpoint=_newest(folder, problems),
        adapter=told,
        unscored=unscored,
        problems=problems + unscored + _adapter_problems(adapter, told),
    )


def number(value: Any) -> float:
    """Return a finite number as it is, anything else as NaN."""
    try:
        found = float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        return np.nan
    return found if np.isfinite(found) else np.nan


def _start(event: dict[str, Any]) -> dict[str, Any]:
    """A start event; what it says of ranks and versions only where that is of this form."""
    ranks, versions = (event.get(key) for key in ("per_rank", "versions"))
    ranks = [r for r in ranks if isinstance(r, dict)] if isinstance(ranks, list) else []
    return event | {"per_rank": ranks, "versions": versions if isinstance(versions, dict) else {}}


def _mapping(file: Path, parse: Callable[[str], object], problems: list[str]) -> dict[str, Any]:
    try:
        return read_mapping(file, parse, "restore it")
    except UserError as error:
        problems.append(" ".join(str(error).split()))
        return {}


def evaluations_of(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """Return every evaluation of a run, base first, and what of them cannot be used."""
    found: list[Evaluation] = []
    problems: list[str] = []
    known = [*SUBJECTS, *sorted({p.name for p in folder.glob("eval-*")} - {*SUBJECTS})]
    for sub in known:
        for place in sorted(p for p in (folder / sub).glob("*") if p.is_dir()):
            if SET_ASIDE.search(place.name):
                continue  # of an older adapter, or other settings
            try:
                held = _scores(place / "scores.json")
            except UserError as error:
                done = place / "predictions.jsonl"
                count = len(done.read_bytes().splitlines()) if done.is_file() else 0
                so_far = f" ({count} predictions there)" if count else ""
                problems.append(" ".join(str(error).split()) + so_far)
                continue
            which = SUBJECTS.get(sub, sub.removeprefix("eval-"))
            about = _mapping(place / "settings.json", json.loads, problems)
            comets = _comet(place, problems)
            found.append(Evaluation(which, place.name, place, held, about, comets))
    return found, problems


def _scores(file: Path) -> dict[str, Any]:
    """A scores.json, once all that is shown of it can be written down."""
    held = scores.read(file)
    try:
        for part in (held, *held["sources"].values()):
            f"{part['count']:,d} {part['no_answer_found']:,d}"
            for metric in part["metrics"].values():
                metric["share"] = bool(metric["share"])
                scores.shown(metric), scores.between(metric)
        scores.between(scores.first(held)[1])
        f"{held.get('step') or '-':>6} {held.get('prompts_cut') or 0:,d}"
        [f"{value:.2f}" for value in held.get("mean_of_sources", {}).values()]
        held["deviations"] = {k: (v, w) for k, (v, w) in (held.get("deviations") or {}).items()}
        held["evaluate"] = dict(held.get("evaluate") or {})
        held["metrics"][held["headline"]]
    except FOREIGN as error:
        raise UserError(
            f"{file}: damaged, or of another version ({type(error).__name__}: {error});"
            " evaluate again"
        ) from None
    return held


def _comet(place: Path, problems: list[str]) -> dict[str, Any] | None:
    """COMET's scores of these very translations, where they were computed."""
    if not (place / "comet.json").is_file():
        return None
    held = comet.read(place) or {}
    try:
        low, high = held["ci95"]
        parts = {name: f"{value:.2f}" for name, value in (held.get("sources") or {}).items()}
        held["texts_of"] = {**parts, None: f"{held['score']:.2f} ({low:.2f} to {high:.2f})"}
        texts = b"\0".join((place / "comet" / name).read_bytes() for name in comet.TEXTS)
    except (*FOREIGN, OSError):
        problems.append(f"{place / 'comet.json'}: damaged; evaluate again to have it computed")
        return None
    if hashlib.sha256(texts).hexdigest() != held["texts"]:
        problems.append(f"{place / 'comet.json'}: is of other translations; evaluate again")
        return None
    return held


def _newest(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """The newest checkpoint that verifies; the folder is not touched."""
    for step in RunFolder.steps_in(folder / "checkpoints"):
        place = folder / "checkpoints" / f"step-{step:06d}"
        try:
            manifest = verify(place)
            state = json.loads((place / "state.json").read_text())
            return {**manifest, "state": state if isinstance(state, dict) else {}}
        except (DamagedCheckpoint, NewerCheckpoint, OSError, ValueError) as error:
            problems.append(f"checkpoint {place.name} does not verify: {error}")
    return None


def _adapter_problems(told: Path, held: dict[str, Any]) -> list[str]:
    file = told.with_name("adapter.safetensors")
    if not told.is_file():
        return []
    if not file.is_file():
        return [f"{file}: no such file, though {told.name} says that it was written"]
    same = held.get("sha256") in (None, digest(file))
    return [] if same else [f"{file}: has changed: sha256 differs from {told.name}"]


def not_comparable(one: Evaluation, other: Evaluation) -> list[str]:
    """Return what differs between two evaluations that must not where their scores are compared."""
    words = {"examples": "rows", "prompt": "prompt", "task_version": "task version"}
    pairs = {word: (one.about.get(key), other.about.get(key)) for key, word in words.items()}
    found = [word for word, (a, b) in pairs.items() if None not in (a, b) and a != b]
    if one.scores["count"] != other.scores["count"] and "rows" not in found:
        found.append("rows")
    if one.scores["headline"] != other.scores["headline"]:
        found.append("metric")
    how: list[Any] = [a.about.get("generation") for a in (one, other)]
    if all(isinstance(v, list) for v in how) and how[0] != how[1]:
        found.append("generation settings")
    return found


def same_rows(runs: list[Run]) -> bool:
    """Return whether the losses of runs are over the same rows, as far as their settings tell."""

    def rows(run: Run) -> dict[str, Any]:
        data = run.config.get("data", {})
        kept = {k: v for k, v in data.items() if changes.decides_rows(f"data.{k}")}
        # Held-out rows that are taken out of the training rows are chosen by the seed.
        return {**kept, "seed": run.get("train.seed") if run.get("data.valid_size") else None}

    return all(run.config.get("data") and rows(run) == rows(runs[0]) for run in runs)
