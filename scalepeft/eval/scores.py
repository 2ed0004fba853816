"""Scored predictions summed up: scores.json, and the same as lines to read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping, write_atomically
from scalepeft.core.stats import mean_of_shares
from scalepeft.data.tasks.base import Example, Metric, Scored, Task


def summarise(
    task: Task, examples: list[Example], predictions: dict[str, str]
) -> tuple[dict[str, Any], list[Scored]]:
    """Scores predictions over all rows and for each source.

    Args:
        task: how to score.
        examples: the rows, each with a prediction.
        predictions: example id -> generated text.

    Returns:
        ``headline``, ``count``, ``no_answer_found`` and ``metrics`` (name -> value, ci95, share,
        signature), the same by source in ``sources``, with several sources ``mean_of_sources``,
        the unweighted mean of each metric, and for a task whose papers report that mean ``mean``,
        the headline's with an interval; ``left_out``, broken rows of the test that are in none of
        these, and ``notes``; and the scored rows.
    """
    rows = [Scored(e, predictions[e.id], task.score(predictions[e.id], e)) for e in examples]
    groups: dict[str, list[Scored]] = {}
    for row in rows:
        groups.setdefault(str(row.example.meta.get("source", "")), []).append(row)
    sources = {name: _of(task, group) for name, group in sorted(groups.items())}
    # One source alone is all rows: a bootstrap is not done twice.
    whole = _of(task, rows) if len(sources) > 1 else next(iter(sources.values()))
    found = {"headline": task.headline, **whole, "sources": sources}
    if len(sources) > 1:
        names = set.intersection(*(set(s["metrics"]) for s in sources.values()))
        found["mean_of_sources"] = {
            name: sum(s["metrics"][name]["value"] for s in sources.values()) / len(sources)
            for name in sorted(names)
        }
        if task.sources_weigh_the_same:
            found["mean"] = _mean(
                [s["metrics"][task.headline] for s in sources.values()],
                [s["count"] for s in sources.values()],
            )
    return found | {"left_out": len(task.skipped), "notes": task.notes}, rows


def _mean(shares: list[dict[str, Any]], counts: list[int]) -> dict[str, Any]:
    value, *interval = mean_of_shares([s["value"] for s in shares], counts)
    return {"value": value, "ci95": interval, "share": True}


def first(scores: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The metric that tables show first, with its name: the mean of the sources where the task's
    papers report that, else the headline over all rows.
    """
    if "mean" in scores:
        return f"mean {scores['headline']} of {len(scores['sources'])}", scores["mean"]
    return scores["headline"], scores["metrics"][scores["headline"]]


def _of(task: Task, rows: list[Scored]) -> dict[str, Any]:
    return {
        "count": len(rows),
        "no_answer_found": sum(row.score.extracted is None for row in rows),
        "metrics": {name: _plain(metric) for name, metric in task.metrics(rows).items()},
    }


def _plain(metric: Metric) -> dict[str, Any]:
    values = asdict(metric)
    return {
        "value": values["value"],
        "ci95": [values["low"], values["high"]],
        "share": values["share"],
        **({"signature": metric.signature} if metric.signature else {}),
    }


def write(folder: Path, found: dict[str, Any], rows: list[Scored]) -> None:
    """Writes scores.json, and before it scored.jsonl: each row with what was found in it."""
    scored = (
        {
            "id": row.example.id,
            "source": row.example.meta.get("source", ""),
            "prompt": row.example.prompt,
            "expected": row.example.completion,
            "prediction": row.prediction,
            **asdict(row.score),
        }
        for row in rows
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    write_atomically(folder / "scored.jsonl", text)
    write_atomically(folder / "scores.json", json.dumps(found, indent=1))


def shown(metric: dict[str, Any]) -> str:
    """A metric's value as text: 87.4%, or 31.26 points."""
    return _text(metric["value"], metric["share"])


def between(metric: dict[str, Any]) -> str:
    """A metric's 95 % interval as text."""
    low, high = metric["ci95"]
    return f"{_text(low, metric['share'])} to {_text(high, metric['share'])}"


def _text(value: float, as_share: bool) -> str:
    return f"{value:.1%}" if as_share else f"{value:.2f}"


def lines(scores: dict[str, Any]) -> list[str]:
    """The scores as a table: a line for each source, then over all, then signatures."""
    rows = list(scores["sources"].items()) if len(scores["sources"]) > 1 else []
    rows.append(("all rows", scores))
    names = list(scores["metrics"])
    width = max(len(name) for name, _ in rows)
    heads = "".join(f"{name:>18}{'95 % interval':>20}" for name in names)
    found = [f"{'':<{width}}{'rows':>8}{'no answer':>11}{heads}"]
    for name, row in rows:
        cells = "".join(
            f"{shown(row['metrics'][m]):>18}{between(row['metrics'][m]):>20}" for m in names
        )
        found.append(f"{name:<{width}}{row['count']:>8}{row['no_answer_found']:>11}{cells}")
    if mean := scores.get("mean_of_sources"):
        cells = "".join(
            f"{_text(mean[m], scores['metrics'][m]['share']):>18}"
            + (
                f"{between(scores['mean'] if m == scores['headline'] else {}):>20}"
                if m == scores["headline"] and "mean" in scores
                else f"{'':>20}"
            )
            for m in names
        )
        label = f"mean of {len(scores['sources'])}"
        found.append(f"{label:<{width}}{'':>19}{cells}".rstrip())
    if scores.get("left_out"):
        found.append(f"left out: {scores['left_out']} broken rows, in none of these numbers")
    found += [
        f"{name}: {metric['signature']}"
        for name, metric in scores["metrics"].items()
        if metric.get("signature")
    ]
    return found


def read(file: Path) -> dict[str, Any]:
    """Reads a scores.json. Raises UserError: broken, or of another version."""
    scores = read_mapping(file, json.loads, "evaluate again")
    if "metrics" not in scores or "headline" not in scores:
        raise UserError(f"{file}: written by another version of scalepeft; evaluate again")
    return scores
