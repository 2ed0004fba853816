"""A few predictions of an evaluation, chosen by the digest of their id: the same every time."""

import hashlib
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from scalepeft.analysis.report.load import Evaluation, Run
from scalepeft.core.files import read_lines

BUDGET = 600_000  # characters of examples over the whole report

Rows = list[dict[str, Any]]


def rows_of(folder: Path) -> Rows:
    """Return the rows of an evaluation's scored.jsonl; broken lines are left out."""
    return read_lines(folder / "scored.jsonl", "id", "source", "prompt", "expected", "prediction")


def choose(evaluation: Evaluation) -> list[tuple[str, Rows]]:
    """Return (heading, rows): right and wrong ones over all sources, or some translations."""
    each = min(10, max(4, len(evaluation.scores["sources"])))
    rows: dict[bool | None, Rows] = {}
    for row in sorted(rows_of(evaluation.folder), key=lambda row: _digest(row["id"])):
        rows.setdefault(row.get("correct"), []).append(row)
    verdicts = {True: "Right", False: "Wrong", None: "Chosen by digest"}
    return [(title, _in_turn(rows[v], each)) for v, title in verdicts.items() if v in rows]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


def _in_turn(rows: Rows, count: int) -> Rows:
    """Take rows of each source in turn."""
    queues: dict[str, Rows] = {source: [] for source in sorted({row["source"] for row in rows})}
    for row in rows:
        queues[row["source"]].append(row)
    turns: Iterable[Any] = chain(*zip_longest(*queues.values()))
    return [row for row in turns if row][:count]


def examples(runs: list[Run]) -> dict[str, Any]:
    """Return examples of each run and task, of the tuned model where it was evaluated.

    Returns:
        ``evaluations``: (heading, [(heading, [(row, the base's row or None)])]); ``limit``:
        characters of a text that are shown.
    """
    evaluations, count = [], 1
    for run in runs:
        for task in dict.fromkeys(e.task for e in run.evaluations):
            by = {e.which: e for e in run.evaluations if e.task == task}
            best = by.get("tuned") or by.get("merged") or by["base"]
            groups = choose(best)
            chosen = {row["id"] for _, rows in groups for row in rows}
            base = rows_of(by["base"].folder) if "base" in by and best is not by["base"] else []
            beside = {row["id"]: row for row in base if row["id"] in chosen}
            pairs = [(title, [(r, beside.get(r["id"])) for r in rows]) for title, rows in groups]
            mark = f"{run.name}, " if len(runs) > 1 else ""
            evaluations.append((f"{mark}{task}, {best.which}", pairs))
            count += sum(len(rows) for _, rows in groups)
    return {"evaluations": evaluations, "limit": max(300, min(4000, BUDGET // (4 * count)))}
