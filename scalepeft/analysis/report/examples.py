"""A few predictions of an evaluation, chosen by the digest of their id: the same every time."""

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalepeft.analysis.report.load import Evaluation, Run

TEXTS = ("id", "prompt", "expected", "prediction")
BUDGET = 600_000  # characters of examples over the whole report
SAMPLE = 400  # translations that are ranked: sentence chrF takes its time

Rows = list[dict[str, Any]]


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a scored.jsonl; broken lines are left out."""
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
    """Return where a row came from."""
    source = row.get("source")
    return source if isinstance(source, str) else str(row["id"].rpartition("#")[0])


def choose(evaluation: Evaluation) -> list[tuple[str, Rows]]:
    """Return (heading, rows): right and wrong ones over all sources, or best and worst
    translations.
    """
    sources = max(1, len(evaluation.scores["sources"]))
    each = min(10, max(4, sources))
    kept: dict[Any, dict[str, list[tuple[int, int, dict[str, Any]]]]] = {}
    for number, row in enumerate(rows_of(evaluation.folder / "scored.jsonl")):
        verdict = row.get("correct") if isinstance(row.get("correct"), bool) else None
        size = each if verdict is not None else -(-SAMPLE // sources)
        heap = kept.setdefault(verdict, {}).setdefault(source_of(row), [])
        key = int(hashlib.sha256(row["id"].encode(errors="replace")).hexdigest()[:12], 16)
        heapq.heappush(heap, (-key, number, row))  # the heap's first is the one to go
        if len(heap) > size:
            heapq.heappop(heap)
    found = [
        (heading, _in_turn(kept[verdict], each))
        for verdict, heading in ((True, "Right"), (False, "Wrong"))
        if verdict in kept
    ]
    return found + (_ranked(_in_turn(kept[None], SAMPLE), each) if None in kept else [])


def _in_turn(heaps: dict[str, Any], count: int) -> Rows:
    """Take from each source in turn, by digest."""
    queues = [sorted(heaps[source], reverse=True) for source in sorted(heaps)]
    longest = max(map(len, queues))
    rows = [queue[i][2] for i in range(longest) for queue in queues if i < len(queue)]
    return rows[:count]


def _ranked(rows: Rows, each: int) -> list[tuple[str, Rows]]:
    try:
        from sacrebleu import sentence_chrf
    except ImportError:
        return [("First by digest (sacrebleu, which ranks them, is not installed)", rows[:each])]
    marked = [
        {**row, "chrf": sentence_chrf(row["prediction"].strip(), [row["expected"].strip()]).score}
        for row in rows
        if max(len(row["prediction"]), len(row["expected"])) < 5000
    ]
    marked.sort(key=lambda row: -row["chrf"])
    among = f"of {len(marked)} rows chosen by digest"
    half = min(each, len(marked) // 2 or 1)
    return [
        (f"Best by sentence chrF, {among}", marked[:half]),
        (f"Worst by sentence chrF, {among}", marked[half:][-half:]),
    ]


def examples(runs: list[Run]) -> list[dict[str, Any]]:
    """Return examples of each run and task, of the tuned model where it was evaluated."""
    picked = []
    for run in runs:
        for task in dict.fromkeys(e.task for e in run.evaluations):
            by = {e.which: e for e in run.evaluations if e.task == task}
            best = by.get("tuned") or by.get("merged") or next(iter(by.values()))
            base = by["base"].folder if "base" in by and best is not by["base"] else None
            mark = f"{run.name}, " if len(runs) > 1 else ""
            picked.append((f"{mark}{task}, {best.which}", choose(best), base))
    count = sum(len(rows) for _, groups, _ in picked for _, rows in groups)
    limit = max(300, min(4000, BUDGET // max(1, 4 * count)))
    listed = []
    for heading, groups, base in picked:
        ids = {row["id"] for _, rows in groups for row in rows}
        other = rows_of(base / "scored.jsonl") if base else ()
        beside = {row["id"]: row for row in other if row["id"] in ids}
        shown = [
            {
                "title": f"{title}: {len(rows)} examples",
                "rows": [_example(row, beside.get(row["id"]), limit) for row in rows],
            }
            for title, rows in groups
        ]
        listed.append({"heading": heading, "groups": shown})
    return listed


def _example(row: dict[str, Any], base: dict[str, Any] | None, limit: int) -> dict[str, Any]:
    quality = f", chrF {row['chrf']:.1f}" if "chrf" in row else ""
    found, right, strict = row.get("extracted"), row.get("correct"), row.get("strict")
    answer = ""
    if right is not None:
        answer = ", no answer found" if found is None else f", answer taken: {str(found)[:120]}"
    if strict is not None and strict != right:
        answer += f"; the published extraction calls it {'right' if strict else 'wrong'}"
    texts = [
        _quote("prompt", row["prompt"], limit, folded=True),
        _quote("expected", row["expected"], limit),
        _quote(f"prediction{answer}", row["prediction"], limit),
    ]
    if base:
        verdict = {"True": ", right", "False": ", wrong"}.get(str(base.get("correct")), "")
        texts.append(_quote(f"prediction of the base{verdict}", base["prediction"], limit))
    return {"title": f"{row['id']}{quality}", "texts": texts}


def _quote(label: str, text: str, limit: int, folded: bool = False) -> dict[str, Any]:
    """A text of a model or a data set, cut where it is long; a longer one is folded."""
    folded = folded or len(text) > 600 or text.count("\n") > 12
    if len(text) > limit:
        text = f"{text[:limit]} […] (cut here)"
        label += f" (its first {limit:,} characters)"
    return {"label": label if text else f"{label} (empty)", "text": text, "folded": folded}
