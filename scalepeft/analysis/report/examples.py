"""A few predictions of an evaluation, chosen by the digest of their id: the same every time."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from scalepeft.analysis.report.load import Run
from scalepeft.core.files import read_lines

EACH = 10  # right ones, and wrong ones
VERDICTS = {True: "Right", False: "Wrong", None: "Chosen by digest"}
Rows = list[dict[str, Any]]


def rows_of(folder: Path) -> Rows:
    """Return the rows of an evaluation's scored.jsonl; broken lines are left out."""
    keys = ("id", "source", "prompt", "expected", "prediction")
    return list(read_lines(folder / "scored.jsonl", *keys))


def choose(folder: Path) -> list[tuple[str, Rows]]:
    """Return (heading, rows): right and wrong ones, or translations, of each source in turn."""
    rows, turns = rows_of(folder), Counter[tuple[Any, str]]()
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode(errors="replace")).digest())
    for row in rows:
        group = row.get("correct"), row["source"]
        row["turn"] = turns[group]
        turns[group] += 1
    rows.sort(key=lambda row: (row["turn"], row["source"]))
    groups = {v: [row for row in rows if row.get("correct") is v] for v in VERDICTS}
    return [(VERDICTS[v], found[:EACH]) for v, found in groups.items() if found]


def examples(runs: list[Run]) -> list[tuple[str, Any]]:
    """(heading, [(heading, [(row, the base's row or None)])]) of each run's best model and task."""
    evaluations: list[tuple[str, Any]] = []
    for run in runs:
        for task in dict.fromkeys(e.task for e in run.evaluations):
            by = {e.which: e for e in run.evaluations if e.task == task}
            best = by.get("tuned") or by.get("merged") or by["base"]
            base = rows_of(by["base"].folder) if "base" in by and best is not by["base"] else []
            beside, groups = {row["id"]: row for row in base}, choose(best.folder)
            pairs = [(title, [(r, beside.get(r["id"])) for r in rows]) for title, rows in groups]
            mark = f"{run.name}, " if len(runs) > 1 else ""
            evaluations.append((f"{mark}{task}, {best.which}", pairs))
    return evaluations
