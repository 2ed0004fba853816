"""Scores of the runs, a table a task, tuned against base, what departs; and a few predictions."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from scalepeft.analysis.report.load import Evaluation, Run, not_comparable
from scalepeft.analysis.report.provenance import shown
from scalepeft.core.files import read_lines
from scalepeft.core.stats import paired_difference
from scalepeft.eval import scores

COMET = "COMET"
EACH = 10  # right ones, and wrong ones
VERDICTS = {True: "Right", False: "Wrong", None: "Chosen by digest"}
Rows = list[dict[str, Any]]


def with_interval(metric: dict[str, Any]) -> str:
    """Return a metric's value and interval as text."""
    return f"{scores.shown(metric)} ({scores.between(metric)})"


def subjects(run: Run) -> tuple[Evaluation | None, Evaluation | None]:
    """Return tuned (else merged) and base of the first task that has them."""
    by = {e.which: e for e in reversed(run.evaluations)}
    return by.get("tuned") or by.get("merged"), by.get("base")


def tasks(runs: list[Run]) -> list[dict[str, Any]]:
    """Return name, tables, warnings and remarks of each task."""
    pairs = [(run.name, e) for run in runs for e in run.evaluations]
    every = [(f"{n}, {e.which}" if len(runs) > 1 else e.which, e) for n, e in pairs]
    listed = []
    for task in dict.fromkeys(e.task for _, e in every):
        found = {who: e for who, e in every if e.task == task}
        listed.append({"name": task, **_tables(found), **_notes(found)})
    return listed


def _notes(found: dict[str, Evaluation]) -> dict[str, list[str]]:
    remarks, warnings = [], []
    first = next(iter(found))
    for who, e in found.items():
        if wrong := not_comparable(found[first], e):
            text = f"differs from {first}, in {', '.join(wrong)}: not to be compared."
            warnings.append(f"{who}: {text}")
        for key, (was, now) in e.scores.get("deviations", {}).items():
            text = f"departs from protocol {e.scores.get('protocol')}: {key} is"
            warnings.append(f"{who}: {text} {shown(now)}, not {shown(was)}.")
        if cut := e.scores.get("prompts_cut"):
            remarks.append(f"{who}: {cut:,} prompts were too long and lost their beginning.")
    for e in found.values():
        metrics = e.scores["metrics"].items()
        remarks += [f"{name}: {m['signature']}" for name, m in metrics if m.get("signature")]
        if e.comet:
            version = e.comet.get("version")  # of results that an older scalepeft wrote
            told = f", unbabel-comet {version}" if version else ""
            remarks.append(f"{COMET}: {e.comet['model']}{told}")
    return {"remarks": list(dict.fromkeys(remarks)), "warnings": warnings}


def _tables(found: dict[str, Evaluation]) -> dict[str, list[Any]]:
    """The scores over each source (``parts``); over all rows, and their unweighted means."""
    names = list(dict.fromkeys(name for e in found.values() for name in e.scores["metrics"]))
    names += [COMET] if any("bleu" in name.lower() for name in names) else []
    head = ["source", "model", "rows", *(f"{n} (95 % interval)" for n in names), "no answer"]
    sources = list(dict.fromkeys(s for e in found.values() for s in e.scores["sources"]))
    parts = [
        [source, who, *_cells(e, names, source)]
        for source in (sources if len(sources) > 1 else ())
        for who, e in found.items()
        if source in e.scores["sources"]
    ]
    whole = [["all rows", who, *_cells(e, names)] for who, e in found.items()]
    for who, e in found.items():
        if means := e.means:
            text = f"unweighted mean of {len(e.scores['sources'])} sources"
            whole.append([text, who, "", *(means.get(name, "") for name in names), ""])
    return {"head": head, "parts": parts, "whole": whole}


def _cells(e: Evaluation, names: list[str], source: str | None = None) -> list[str]:
    """Rows, metrics and missing answers over a source, or over all rows."""
    part = e.scores if source is None else e.scores["sources"][source]
    held = {name: with_interval(metric) for name, metric in part["metrics"].items()}
    held[COMET] = "not computed"
    if e.comet:
        low, high = e.comet["ci95"]
        texts = {name: f"{value:.2f}" for name, value in e.comet.get("sources", {}).items()}
        texts[None] = f"{e.comet['score']:.2f} ({low:.2f} to {high:.2f})"
        held[COMET] = texts.get(source, "–")
    values = [held.get(name, "–") for name in names]
    return [f"{part['count']:,}", *values, f"{part['no_answer_found']:,}"]


def verdict(run: Run) -> dict[str, list[str]]:
    """Return what tuned against base says, where it may be said, and warnings of what spoils it."""
    tuned, base = subjects(run)
    if not tuned or not base or tuned.task != base.task:
        return {}
    if wrong := not_comparable(tuned, base):
        text = f"{tuned.which} and base must not be compared: they differ in {', '.join(wrong)}."
        return {"warnings": [f"{text} Evaluate both again with the same settings."]}
    (name, one), (_, other) = tuned.first, base.first
    if pairs := paired(tuned, base):
        gain, low, high = (100 * v for v in pairs)
        text = f"{gain:+.1f} percentage points against the base, 95 % interval {low:+.1f} to"
        text += f" {high:+.1f} (paired, over the same rows)"
        text += "." if low > 0 or high < 0 else "; that may be chance."
    else:
        gain = one["value"] - other["value"]
        unit = f"{100 * gain:+.1f} percentage points" if one["share"] else f"{gain:+.2f} points"
        apart = one["ci95"][0] > other["ci95"][1] or other["ci95"][0] > one["ci95"][1]
        text = f"{unit} against the base; the 95 % intervals {'do not ' * apart}overlap."
    warnings = [
        f"{e.which}: no answer was found in {none:,} of {count:,} predictions; they count as wrong."
        for e in (tuned, base)
        if (none := e.scores["no_answer_found"]) > 0.2 * (count := e.scores["count"])
    ]
    return {"remarks": [f"{name}: {text}"], "warnings": warnings}


def paired(one: Evaluation, other: Evaluation) -> tuple[float, float, float] | None:
    """Difference of the first metric on the same rows, with interval; None if it is no share."""
    if not one.first[1]["share"]:
        return None
    right, beside = _right(one), _right(other)
    whole = one.scores["count"] == len(right)  # neither file is of another evaluation
    if not right or not whole or right.keys() != beside.keys():
        return None
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for (source, key), verdict in right.items():
        name = source if "mean" in one.scores else ""
        groups.setdefault(name, []).append((verdict, beside[source, key]))
    return paired_difference(groups.values())


def _right(e: Evaluation) -> dict[tuple[str, str], bool]:
    """(source, example id) -> right, of scored.jsonl."""
    rows = read_lines(e.folder / "scored.jsonl", "source", "id", "correct")
    return {
        (row["source"], row["id"]): row["correct"] for row in rows if row["correct"] is not None
    }


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
