"""Scored predictions summed up: scores.json, and the same as lines to read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping, write_atomically
from scalepeft.core.stats import mean_of_shares
from scalepeft.core.text import table
from scalepeft.data.chat import SEAM
from scalepeft.data.tasks.base import Example, Scored, Task


def cut_at(text: str, stop: list[str]) -> str:
    """The text before the first of the stop texts in it."""
    return text[: min((i for i in map(text.find, stop) if i >= 0), default=len(text))]


def summarize(
    task: Task, examples: list[Example], predictions: dict[str, str]
) -> tuple[dict[str, Any], list[Scored]]:
    """Scores predictions (example id -> text) over all rows and each source: scores.json's numbers,
    and the scored rows. ``mean_of_sources`` is unweighted; ``mean`` the headline's, for a task
    whose papers report it, with an interval; broken rows, ``left_out``, are in none.
    """
    rows = [Scored(e, predictions[e.id], task.score(predictions[e.id], e)) for e in examples]
    groups: dict[str, list[Scored]] = {}
    for row in rows:
        groups.setdefault(str(row.example.meta.get("source", "")), []).append(row)
    sources = {name: _summary(task, group) for name, group in sorted(groups.items())}
    parts = list(sources.values())
    # One source alone is all rows: a bootstrap is not done twice.
    pooled = _summary(task, rows) if len(parts) > 1 else parts[0]
    results = {"headline": task.headline, **pooled, "sources": sources}
    if len(parts) > 1:
        values = {
            name: [part["metrics"][name]["value"] for part in parts]
            for name in sorted(set.intersection(*(set(part["metrics"]) for part in parts)))
        }
        results["mean_of_sources"] = {n: sum(found) / len(parts) for n, found in values.items()}
        if task.macro_average:
            counts = [part["count"] for part in parts]
            value, *interval = mean_of_shares(values[task.headline], counts)
            results["mean"] = {"value": value, "ci95": interval, "share": True}
    return results | {"left_out": len(task.skipped), "notes": task.notes}, rows


def _summary(task: Task, rows: list[Scored]) -> dict[str, Any]:
    found = {name: asdict(metric) for name, metric in task.metrics(rows).items()}
    return {
        "count": len(rows),
        "no_answer_found": sum(row.score.extracted is None for row in rows),
        "metrics": {n: {k: v for k, v in m.items() if v != ""} for n, m in found.items()},
    }


def first(scores: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The metric that tables show first, with its name: the sources' mean, or over all rows."""
    if "mean" in scores:
        return f"mean {scores['headline']} of {len(scores['sources'])}", scores["mean"]
    return scores["headline"], scores["metrics"][scores["headline"]]


def write(folder: Path, results: dict[str, Any], rows: list[Scored]) -> None:
    """Writes scores.json, and before it scored.jsonl: each row with what was found in it."""
    scored = (
        {
            "id": row.example.id,
            "source": row.example.meta.get("source", ""),
            "prompt": row.example.prompt.replace(SEAM, ""),
            "expected": row.example.completion,
            "prediction": row.prediction,
            **asdict(row.score),
        }
        for row in rows
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    write_atomically(folder / "scored.jsonl", text)
    write_atomically(folder / "scores.json", json.dumps(results, indent=1))


def shown(metric: dict[str, Any]) -> str:
    """A metric's value as text: 87.4%, or 31.26 points."""
    return f"{metric['value']:.1%}" if metric["share"] else f"{metric['value']:.2f}"


def between(metric: dict[str, Any]) -> str:
    """A metric's 95 % interval as text."""
    return " to ".join(shown({**metric, "value": end}) for end in metric["ci95"])


def lines(scores: dict[str, Any]) -> list[str]:
    """The scores as a table: a line for each source, then over all, then what to know of them."""
    names, sources = list(scores["metrics"]), scores["sources"]
    parts = [*(sources.items() if len(sources) > 1 else ()), ("all rows", scores)]
    rows = [["", "rows", "no answer", *(x for name in names for x in (name, "95 % interval"))]]
    for part, row in parts:
        cells = (text(row["metrics"][m]) for m in names for text in (shown, between))
        rows.append([part, row["count"], row["no_answer_found"], *cells])
    if means := scores.get("mean_of_sources"):
        last = [f"mean of {len(sources)}", "", ""]
        for m in names:
            mean = scores.get("mean") if m == scores["headline"] else None
            of_all = shown({**scores["metrics"][m], "value": means[m]})
            last += [of_all, between(mean) if mean else ""]
        rows.append(last)
    made = table(rows, indent="")
    if scores.get("left_out"):
        made.append(f"left out: {scores['left_out']} broken rows, in none of these numbers")
    for name, metric in scores["metrics"].items():
        if metric.get("signature"):
            made.append(f"{name}: {metric['signature']}")
    if scores.get("prompts_cut"):
        made.append(
            f"{scores['prompts_cut']} prompts were longer than the model's positions, or"
            " evaluate.max_tokens, allow beside the answer, and lost their beginning"
        )
    for key, (published, here) in scores.get("deviations", {}).items():
        where = f"departs from protocol {scores['protocol']}"
        made.append(f"{where}: {key} is {here!r}, not {published!r}")
    return made


def read(file: Path) -> dict[str, Any]:
    """Reads a scores.json. Raises UserError: broken, or of another version."""
    scores = read_mapping(file, json.loads, "evaluate again")
    if "metrics" not in scores or "headline" not in scores:
        raise UserError(f"{file}: written by another version of scalepeft; evaluate again")
    return scores
