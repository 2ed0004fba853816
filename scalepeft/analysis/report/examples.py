"""A few predictions of an evaluation, chosen by the digest of their id: the same every time."""

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalepeft.analysis.report.blocks import Block, Fold, Heading, Quote, Text
from scalepeft.analysis.report.facts import Evaluation, Run

TEXTS = ("id", "prompt", "expected", "prediction")
BUDGET = 600_000  # characters of examples over the whole report
SAMPLE = 400  # translations that are ranked: sentence chrF takes its time

Rows = list[dict[str, Any]]


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a scored.jsonl; broken lines are left out."""
    if not file.is_file():
        return
    with file.open("rb") as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in TEXTS):
                yield row


def source_of(row: dict[str, Any]) -> str:
    """Where a row came from."""
    source = row.get("source")
    return source if isinstance(source, str) else str(row["id"].rpartition("#")[0])


def choose(evaluation: Evaluation) -> list[tuple[str, Rows]]:
    """(heading, rows): right and wrong ones over all sources, or best and worst translations."""
    file = evaluation.folder / "scored.jsonl"
    sources = max(1, len(evaluation.scores["sources"]))
    each = min(10, max(4, sources))
    kept: dict[Any, dict[str, list[tuple[int, int, dict[str, Any]]]]] = {}
    for number, row in enumerate(rows_of(file)):
        verdict = row.get("correct") if isinstance(row.get("correct"), bool) else None
        size = each if verdict is not None else -(-SAMPLE // sources)
        heap = kept.setdefault(verdict, {}).setdefault(source_of(row), [])
        key = int(hashlib.sha256(row["id"].encode(errors="replace")).hexdigest()[:12], 16)
        entry = (-key, number, row)  # the heap's first is the one to go
        if len(heap) < size:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    found = [
        (heading, _in_turn(kept[verdict], each))
        for verdict, heading in ((True, "Right"), (False, "Wrong"))
        if verdict in kept
    ]
    if None in kept:
        found += _ranked(_in_turn(kept[None], SAMPLE), each)
    return found


def _in_turn(heaps: dict[str, Any], count: int) -> Rows:
    """Takes from each source in turn, by digest."""
    queues = [sorted(heaps[source], reverse=True) for source in sorted(heaps)]
    longest = max(map(len, queues))
    rows = [queue[i][2] for i in range(longest) for queue in queues if i < len(queue)]
    return rows[:count]


def _ranked(rows: Rows, each: int) -> list[tuple[str, Rows]]:
    try:
        from sacrebleu import sentence_chrf
    except ImportError:
        return [("First by digest (sacrebleu, which ranks them, is not installed)", rows[:each])]
    scored = [
        (sentence_chrf(row["prediction"].strip(), [row["expected"].strip()]).score, row)
        for row in rows
        if max(len(row["prediction"]), len(row["expected"])) < 5000
    ]
    scored.sort(key=lambda pair: -pair[0])
    among = f"of {len(scored)} rows chosen by digest"
    marked = [{**row, "chrf": value} for value, row in scored]
    half = min(each, len(marked) // 2 or 1)
    return [
        (f"Best by sentence chrF, {among}", marked[:half]),
        (f"Worst by sentence chrF, {among}", marked[half:][-half:]),
    ]


def predictions(file: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    """The rows with these ids of another evaluation."""
    return {row["id"]: row for row in rows_of(file) if row["id"] in ids}


def examples(runs: list[Run]) -> list[Block]:
    """Examples of each run and task, of the tuned model where it was evaluated."""
    chosen: list[tuple[Run, Evaluation, Evaluation | None]] = []
    for run in runs:
        for task in dict.fromkeys(e.task for e in run.evaluations):
            by = {e.which: e for e in run.evaluations if e.task == task}
            best = by.get("tuned") or by.get("merged") or next(iter(by.values()))
            base = by.get("base")
            chosen.append((run, best, base if base is not best else None))
    picked = [(run, e, base, choose(e)) for run, e, base in chosen]
    count = sum(len(rows) for *_, groups in picked for _, rows in groups)
    limit = max(300, min(4000, BUDGET // max(1, 4 * count)))
    blocks: list[Block] = []
    for run, evaluation, base, groups in picked:
        mark = f"{run.name}, " if len(runs) > 1 else ""
        blocks.append(Heading(f"{mark}{evaluation.task}, {evaluation.which}"))
        ids = {row["id"] for _, rows in groups for row in rows}
        beside = predictions(base.folder / "scored.jsonl", ids) if base else {}
        if not groups:
            blocks.append(Text("No scored rows there."))
        for heading, rows in groups:
            inner = [b for row in rows for b in _example(row, beside.get(row["id"]), limit)]
            blocks.append(Fold(f"{heading}: {len(rows)} examples", inner))
    return blocks or [Text("Nothing was evaluated yet.")]


def _example(row: dict[str, Any], base: dict[str, Any] | None, limit: int) -> list[Block]:
    quality = f", chrF {row['chrf']:.1f}" if "chrf" in row else ""
    found = row.get("extracted")
    answer = "no answer found" if found is None else f"answer taken: {str(found)[:120]}"
    if row.get("correct") is None:
        answer = ""
    strict = row.get("strict")
    if strict is not None and strict != row.get("correct"):
        answer += f"; the published extraction calls it {'right' if strict else 'wrong'}"
    blocks: list[Block] = [
        Heading(f"{row['id']}{quality}"),
        _quote("prompt", row["prompt"], limit, always=True),
        _quote("expected", row["expected"], limit),
        _quote(f"prediction{', ' + answer if answer else ''}", row["prediction"], limit),
    ]
    if base:
        verdict = {True: ", right", False: ", wrong"}.get(base.get("correct"), "")  # type: ignore[arg-type]
        blocks.append(_quote(f"prediction of the base{verdict}", base["prediction"], limit))
    return blocks


def _quote(label: str, text: str, limit: int, always: bool = False) -> Quote:
    folded = len(text) > 600 or text.count("\n") > 12 or always
    if len(text) > limit:
        text = f"{text[:limit]} […] (cut here)"
        label += f" (its first {limit:,} characters)"
    if not text:
        label, text = f"{label} (empty)", ""
    return Quote(label, text, folded)
