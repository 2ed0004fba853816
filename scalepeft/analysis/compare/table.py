"""What a comparison found: means over seeds with intervals, as a table, Markdown and JSON."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from scalepeft.analysis.compare.cells import Runner, chosen, lacking, reported
from scalepeft.analysis.compare.design import Design, Method
from scalepeft.core import text as texts
from scalepeft.core.stats import mean_interval

MIB = 2**20
PEAK = {
    "cuda": "peak MiB: of CUDA's allocator, rank 0",
    "resident": "peak MiB: resident, of the whole process (Python and torch are some hundred)",
}


def summarize(runner: Runner) -> dict[str, Any]:
    """Return all cells of a comparison and a row for each method, those without a result too."""
    design = runner.design
    missing = {"state": "missing"}
    cells = [
        {"method": c.method, "seed": c.seed, **(runner.result(c) or missing)}
        for c in reported(design)
    ]
    swept = {m.label: runner.swept(m) if design.swept else {} for m in design.methods}
    done = [c for c in cells if c["state"] == "done"]
    return {
        "budget": design.stated(),
        "date": time.strftime("%Y-%m-%d"),
        "devices": sorted({f"{c['ranks']} x {c['device']}" for c in done}),
        "versions": done[-1]["versions"] if done else {},
        "methods": [_row(design, m, cells, swept[m.label]) for m in design.methods],
        "cells": cells,
        "sweep": [
            {"method": label, "seed": design.sweep_seed, **(result or missing), "lr": lr}
            for label, results in swept.items()
            for lr, result in results.items()
        ],
    }


def _row(
    design: Design, method: Method, cells: list[dict[str, Any]], swept: dict[float, Any]
) -> dict[str, Any]:
    local = [c for c in cells if c["method"] == method.label]
    done = [c for c in local if c["state"] == "done"]
    row: dict[str, Any] = {
        "method": method.label,
        "adapter": method.adapter,
        "parameters": done[0]["parameters"] if done else method.parameters,
        "size": method.size,
        "rates": method.rates,
        "seeds": [c["seed"] for c in done],
        "wanted": len(local),
        "notes": _notes(design, method, local, swept),
    }
    if not done:
        return row
    row |= {key: done[0][key] for key in ("lr", "memory")}
    row |= {
        key: statistics.fmean(c[key] for c in done)
        for key in ("steps", "seconds", "tokens_per_second")
    }
    row["loss"], row["loss_ci"] = mean_interval([c["loss"] for c in done])
    row["peak_memory"] = max((c["peak_memory"] for c in done if c["peak_memory"]), default=None)
    row["difference"] = difference(design.reference, method.label, cells)
    if design.evaluate:
        row["score"], row["score_ci"] = mean_interval([c["score"] for c in done])
        row |= {key: done[0][key] for key in ("metric", "share")}
    return row


def difference(reference: str, label: str, cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return held-out loss less the reference's of the same seed: data order and held-out rows are
    the same, so that what they do to both cancels.
    """
    losses = {(c["method"], c["seed"]): c["loss"] for c in cells if c["state"] == "done"}
    pairs = [
        loss - losses[reference, seed]
        for (method, seed), loss in losses.items()
        if method == label and (reference, seed) in losses
    ]
    if label == reference or not pairs:
        return None
    mean, half = mean_interval(pairs)
    return {"mean": mean, "ci": half, "seeds": len(pairs)}


def _notes(
    design: Design, method: Method, local: list[dict[str, Any]], swept: dict[float, Any]
) -> list[str]:
    if method.refused:
        return [f"not run: {method.refused}"]
    bad = [c for c in local if c["state"] != "done"]
    best = chosen(method, swept)
    notes = [method.size] if design.budget == "parameters" and len(bad) < len(local) else []
    if best is not None and best[1]:
        notes.append(f"best rate is the {best[1]} of the sweep: widen it")
    notes += [
        f"sweep, lr {lr:g}: {result['reason']}"
        for lr, result in swept.items()
        if result and result["state"] == "failed"
    ]
    notes += [f"sweep, lr {lr:g}: {reason}" for lr, reason in lacking(swept).items()]
    if bad:
        notes.append(f"{len(local) - len(bad)} of {len(local)} seeds")
    if best is not None:
        notes += [f"seed {c['seed']}: {c.get('reason') or 'not run yet'}" for c in bad]
    return notes


def _plus_minus(mean: float, half: float | None, digits: int = 4, sign: str = "") -> str:
    spread = "" if half is None else f" ± {half:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread}"


def _score(row: dict[str, Any]) -> str:
    scale, unit = (100, " %") if row["share"] else (1, "")
    half = None if row["score_ci"] is None else scale * row["score_ci"]
    return _plus_minus(scale * row["score"], half, 2) + unit


def _difference(row: dict[str, Any]) -> str:
    gap = row["difference"]
    return _plus_minus(gap["mean"], gap["ci"], sign="+") if gap else ""


def body(result: dict[str, Any], reference: str) -> list[list[str]]:
    """Return the table with its header: the lowest loss first, then what lacks a seed (it may be
    its worst one), what has no loss at the end.
    """
    rows = sorted(
        result["methods"], key=lambda r: (len(r["seeds"]) < r["wanted"], r.get("loss", math.inf))
    )
    metric = next((r["metric"] for r in rows if "metric" in r), "")
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("lr", lambda r: f"{r['lr']:g}"),
        ("held-out loss", lambda r: _plus_minus(r["loss"], r["loss_ci"])),
    ]
    if any(r.get("difference") for r in rows):
        columns.append((f"less {reference}'s", _difference))
    if metric:
        columns.append((metric, _score))
    columns += [
        ("seconds", lambda r: f"{r['seconds']:.1f}"),
        ("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}"),
        ("peak MiB", lambda r: f"{r['peak_memory'] / MIB:,.0f}" if r["peak_memory"] else "-"),
    ]
    lines = [["method", "parameters", *(name for name, _ in columns)]]
    for row in rows:
        have, wanted = len(row["seeds"]), row["wanted"]
        name = row["method"] + (f" ({have} of {wanted} seeds)" if 0 < have < wanted else "")
        cells = [cell(row) if "loss" in row else "-" for _, cell in columns]
        lines.append([name, f"{row['parameters']:,}" if row["parameters"] else "-", *cells])
    return lines


def legend(result: dict[str, Any], design: Design) -> list[str]:
    """Return what a reader of the table must know, in lines."""
    rows, seeds = result["methods"], design.seeds
    several, listed = len(seeds) > 1, ", ".join(map(str, seeds))
    lines = [f"budget: {result['budget']}"]
    if several:
        lines.append(f"{len(seeds)} seeds ({listed}): mean ± half of the 95 % interval (t)")
    else:
        lines.append(f"1 seed ({listed}): no interval")
    if any(r.get("difference") for r in rows):
        lines.append(
            f"less {design.reference}'s: difference to {design.reference} under the same seed, so"
            " with the same rows in the same order; below zero is better"
        )
    elif design.reference not in [m.label for m in design.methods]:
        lines.append(f"no differences: the reference, {design.reference}, is not among the methods")
    if any(len(r["seeds"]) < r["wanted"] for r in rows):
        lines.append("a method that lacks seeds stands after those that have all")
    if steps := next((r["steps"] for r in rows if "steps" in r), None):
        lines.append(f"{steps:.0f} steps of {design.values['train']['global_batch']} rows")
    if (held_out := design.values["data"]["valid_size"]) and several:
        lines.append(
            f"the {held_out} held-out rows are drawn by the seed too: the interval of a loss holds"
            " their chance; that of a difference, taken on the same rows, holds less of it"
        )
    if design.evaluate and several:
        lines.append("the interval of a score is over the seeds alone, not over the test rows")
    if design.swept:
        lines.append(
            f"lr: chosen by held-out loss among {design.lrs} under seed {design.sweep_seed}, which"
            " is not among those reported"
        )
    else:
        lines.append(f"lr: {design.lrs}, not swept")
    lines.append("seconds: of the training steps alone, of a run")
    return lines + [PEAK[kind] for kind in sorted({r["memory"] for r in rows if "memory" in r})]


def text(result: dict[str, Any], design: Design) -> str:
    """Return the table for a terminal."""
    notes = [f"{r['method']}: {'; '.join(r['notes'])}" for r in result["methods"] if r["notes"]]
    lines = texts.table(body(result, design.reference), indent="")
    return "\n".join([*lines, "", *legend(result, design), *([""] if notes else []), *notes])


def markdown(result: dict[str, Any], design: Design) -> str:
    """Return ``compare.md``."""
    header, *rows = body(result, design.reference)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    held_out = next((c["rows"] for c in result["cells"] if c.get("rows")), "no")
    lines = [
        f"# {', '.join(m.label for m in design.methods)}",
        "",
        f"{result['date']}, {' and '.join(result['devices'])}; {versions}.",
        f"Base {design.values['model']['path']}, task {design.values['data']['name']},"
        f" {held_out} held-out rows.",
        "",
        f"| {' | '.join(header)} |",
        "|---|" + "---:|" * (len(header) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"* {line}" for line in legend(result, design)),
        "",
        *(f"* **{r['method']}**: {'; '.join(r['notes'])}" for r in result["methods"] if r["notes"]),
        "",
        "![held-out loss against trained parameters and against time](compare.png)",
    ]
    return "\n".join(lines) + "\n"
