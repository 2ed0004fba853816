"""What a run's folder says: what is broken is named in a line, the rest is used."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalepeft.adapters.layout import description_file, weights_file
from scalepeft.analysis import rows
from scalepeft.config import changes
from scalepeft.config.files import parse_yaml
from scalepeft.config.schema import renamed
from scalepeft.core.errors import UserError
from scalepeft.core.files import digest, read_lines, read_mapping
from scalepeft.core.text import one_line
from scalepeft.eval import comet, scores
from scalepeft.run import status
from scalepeft.run.checkpoint import DamagedCheckpoint, steps_of, verify
from scalepeft.run.goodput import Goodput, goodput

SUBJECTS = {"eval-base": "base", "eval": "tuned", "eval-merged": "merged"}
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds", "sample_index",
           "time", "memory_reserved")  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """A scores.json: ``which`` is base, tuned or merged; ``about`` its settings.json."""

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
        return {name: scores.shown({**metrics[name], "value": v}) for name, v in means.items()}


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    name: str
    config: dict[str, dict[str, Any]]
    newest: dict[str, Any]  # the last row of metrics.jsonl; empty without one
    columns: dict[str, np.ndarray]  # of all its rows, by key, NaN where a row has no number
    held_out: list[tuple[int, float]]  # step and loss
    moved: list[dict[str, Any]]  # rows of diagnostics.jsonl
    data: dict[str, dict[str, Any]]  # counts of the rows by split, as a pipeline took them
    starts: list[dict[str, Any]]
    peak: dict[str, Any]  # the newest event that tells how much memory was held
    status: dict[str, Any]
    goodput: Goodput | None
    evaluations: list[Evaluation]
    checkpoint: dict[str, Any]  # manifest and state of the newest one that verifies
    adapter: dict[str, Any]
    unscored: list[str]  # what of the evaluations could not be read, a line each
    problems: list[str]  # what could not be read at all, those lines among them

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
    """Read runs in the order given, each once. Raise UserError if one is no run folder."""
    unique = {folder.resolve(): folder for folder in folders}
    for folder in unique.values():
        names = ("config.yaml", "events.jsonl", "metrics.jsonl")
        if not any((folder / name).is_file() for name in names):
            what = "no config.yaml, events.jsonl or metrics.jsonl in it"
            raise UserError(f"{folder} is no run folder: {what}; name the run_dir of a training")
    short = len({path.name for path in unique}) == len(unique)
    return [read(folder, path.name if short else str(folder)) for path, folder in unique.items()]


def read(folder: Path, name: str) -> Run:
    """Read one run."""
    problems: list[str] = []
    config = _mapping(folder / "config.yaml", parse_yaml, problems)
    with contextlib.suppress(UserError):  # a key under both spellings: shown as it stands
        config = renamed(config)
    adapter, checkpoint = _adapter(folder / "adapter", problems), _newest(folder, problems)
    evaluations, unscored = evaluations_of(folder)
    file, keys = folder / "metrics.jsonl", ("step", "loss", "sample_index")
    rows = ([number(row.get(key)) for key in COLUMNS] for row in read_lines(file, *keys))
    values = np.fromiter(rows, np.dtype((float, len(COLUMNS))))
    valid = read_lines(folder / "validation.jsonl", "step", "loss")
    events = list(read_lines(folder / "events.jsonl", "event", "time", "step"))
    spent = goodput(folder)
    return Run(
        folder=folder,
        name=name,
        config={k: v for k, v in config.items() if isinstance(v, dict)},
        newest=next(read_lines(file, *keys, newest_first=True), {}),
        columns=dict(zip(COLUMNS, values.T, strict=True)),
        held_out=[(r["step"], loss) for r in valid if np.isfinite(loss := number(r["loss"]))],
        moved=list(read_lines(folder / "diagnostics.jsonl", "step", "layers")),
        data=_data(folder / "data/summary.json", problems),
        starts=[e for e in events if e["event"] == "start" and "world_size" in e],
        peak=next((e for e in reversed(events) if "peak_resident" in e), {}),
        status=status.status(folder),
        goodput=spent if spent and spent.wall > 0 else None,
        evaluations=evaluations,
        checkpoint=checkpoint,
        adapter=adapter,
        unscored=unscored,
        problems=problems + unscored,
    )


def number(value: Any) -> float:
    """Return a finite number as it is, anything else as NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else np.nan


def _mapping(file: Path, parse: Callable[[str], object], problems: list[str]) -> dict[str, Any]:
    try:
        return read_mapping(file, parse, "restore it")
    except UserError as error:
        problems.append(one_line(error))
        return {}


def _data(file: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Counts by split; none where no pipeline counted tokens."""
    held = _mapping(file, json.loads, problems) if file.is_file() else {}
    if "tokens" not in held:
        return {}
    try:
        columns = rows.columns(held)
        rows.cells(columns)  # all that is shown is there
        for split in ("train", *(s for s, counts in columns.items() if "histogram" in counts)):
            edges, bins = (columns[split]["histogram"][key] for key in ("edges", "counts"))
            values = [number(value) for value in (*edges, *bins, columns[split]["cutoff"])]
            if not (all(abs(v) < 1e15 for v in values) and len(edges) == len(bins) + 1 > 1):
                raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problems.append(f"{file}: damaged, or of another version ({type(error).__name__})")
        return {}
    return columns


def evaluations_of(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """Return every evaluation of a run, base first, and what of them cannot be used."""
    found: list[Evaluation] = []
    problems: list[str] = []
    places = [(w, p) for s, w in SUBJECTS.items() for p in sorted(folder.glob(f"{s}/*"))]
    for which, place in places:
        if not place.is_dir() or ".old-" in place.name:  # of an older adapter, or other settings
            continue
        try:
            held = scores.read(place / "scores.json")
            scores.lines(held)  # all that is shown of it is there
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
            said = f"{place / 'scores.json'}: damaged, or of another version"
            said += f" ({type(error).__name__}: {one_line(error, 100)}); evaluate again"
            said = one_line(error) if isinstance(error, UserError) else said
            count = sum(1 for _ in read_lines(place / "predictions.jsonl"))
            problems.append(said + (f" ({count} predictions there)" if count else ""))
            continue
        about = _mapping(place / "settings.json", json.loads, problems)
        found.append(Evaluation(which, place.name, place, held, about, _comet(place, problems)))
    return found, problems


def _comet(place: Path, problems: list[str]) -> dict[str, Any] | None:
    """COMET's scores of these very translations, where they were computed."""
    stored = comet.read(place)
    if stored is None or stored["texts"] == comet.digest_of(place):
        return stored
    problems.append(f"{place / 'comet.json'}: is of other translations; evaluate again")
    return None


def _newest(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Manifest and ``state`` of the newest checkpoint that verifies; the folder is not touched."""
    for step in steps_of(folder):
        place = folder / "checkpoints" / f"step-{step:06d}"
        try:
            return verify(place)
        except DamagedCheckpoint as error:
            problems.append(f"checkpoint {place.name} does not verify: {error}")
    return {}


def _adapter(folder: Path, problems: list[str]) -> dict[str, Any]:
    """What describes the adapter; nothing before it is written."""
    told, file = description_file(folder), weights_file(folder)
    if told is None or not told.is_file():
        return {}
    held = _mapping(told, json.loads, problems)
    if not file.is_file():
        problems.append(f"{file}: no such file, though {told.name} says that it was written")
    elif held.get("sha256") not in (None, digest(file)):
        problems.append(f"{file}: has changed: sha256 differs from {told.name}")
    return held


def not_comparable(one: Evaluation, other: Evaluation) -> list[str]:
    """Return what differs between two evaluations that must not where their scores are compared."""
    about = {"examples": "rows", "prompt": "prompt", "task_version": "task version"}
    about["generation"] = "generation settings"
    pairs = [(word, one.about.get(key), other.about.get(key)) for key, word in about.items()]
    for key, word in {"count": "rows", "headline": "metric"}.items():
        pairs.append((word, one.scores[key], other.scores[key]))
    return list(dict.fromkeys(word for word, a, b in pairs if None not in (a, b) and a != b))


def same_rows(runs: list[Run]) -> bool:
    """Return whether the losses of runs are over the same rows, as far as their settings tell."""

    def rows(run: Run) -> dict[str, Any]:
        data = run.config.get("data", {})
        kept = {k: v for k, v in data.items() if changes.decides_rows(f"data.{k}")}
        # Held-out rows that are taken out of the training rows are chosen by the seed.
        return {**kept, "seed": run.get("train.seed") if run.get("data.valid_size") else None}

    return all(run.config.get("data") and rows(run) == rows(runs[0]) for run in runs)
