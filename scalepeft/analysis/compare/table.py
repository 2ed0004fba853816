"""What a comparison found: means over seeds with intervals, as a table, Markdown and JSON."""

import math
import statistics
import time
from typing import Any

from scalepeft.analysis.compare.cells import FINAL, Runner, chosen, lacking, reported
from scalepeft.analysis.compare.design import Design, Method
from scalepeft.core.stats import mean_interval
from scalepeft.core.text import duration

MIB = 2**20


def summarise(runner: Runner) -> dict[str, Any]:
    """All cells of a comparison and a row for each method, those without a result too."""
    design = runner.design
    cells = [
        {"method": cell.method, "seed": cell.seed, **(runner.result(cell) or {"state": "missing"})}
        for cell in reported(design)
    ]
    sweeps = {m.label: runner.swept(m) for m in design.methods if design.swept}
    rows = [_row(runner, m, cells, sweeps.get(m.label, {})) for m in design.methods]
    run = [c for c in cells if c["state"] == "done"]
    return {
        "budget": design.stated(),
        "date": time.strftime("%Y-%m-%d"),
        "devices": sorted({f"{c['ranks']} x {c['device']}" for c in run}),
        "versions": run[-1]["versions"] if run else {},
        "methods": rows,
        "cells": cells,
        "sweep": [
            {
                "method": label,
                "lr": lr,
                "seed": design.sweep_seed,
                **(result or {"state": "missing"}),
            }
            for label, swept in sweeps.items()
            for lr, result in swept.items()
        ],
    }


def _row(
    runner: Runner, method: Method, cells: list[dict[str, Any]], swept: dict[float, Any]
) -> dict[str, Any]:
    design = runner.design
    own = [c for c in cells if c["method"] == method.label]
    good = [c for c in own if c["state"] == "done"]
    row: dict[str, Any] = {
        "method": method.label,
        "adapter": method.adapter,
        "parameters": good[0]["parameters"] if good else method.parameters,
        "size": method.size,
        "rates": method.rates,
        "seeds": [c["seed"] for c in good],
        "wanted": len(own),
        "notes": _notes(design, method, own, swept),
    }
    if not good:
        return row
    mean, half = mean_interval([c["loss"] for c in good])
    row |= {"lr": good[0]["lr"], "loss": mean, "loss_ci": half, "memory": good[0]["memory"]}
    for key in ("steps", "seconds", "tokens_per_second"):
        row[key] = statistics.fmean(c[key] for c in good)
    peaks = [c["peak_memory"] for c in good if c["peak_memory"]]
    row["peak_memory"] = max(peaks, default=None)
    row["difference"] = _difference(design.reference, method.label, good, cells)
    if design.evaluate:
        mean, half = mean_interval([c["score"] for c in good])
        row |= {"metric": good[0]["metric"], "score": mean, "score_ci": half}
        row["share"] = good[0]["share"]
    return row


def _difference(
    reference: str, label: str, good: list[dict[str, Any]], cells: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Held-out loss less the reference's of the same seed: data order and held-out rows are the
    same, so that what they do to both falls out.
    """
    theirs = {
        c["seed"]: c["loss"] for c in cells if c["method"] == reference and c["state"] == "done"
    }
    pairs = [c["loss"] - theirs[c["seed"]] for c in good if c["seed"] in theirs]
    if label == reference or not pairs:
        return None
    mean, half = mean_interval(pairs)
    return {"mean": mean, "ci": half, "seeds": len(pairs)}


def _notes(
    design: Design, method: Method, own: list[dict[str, Any]], swept: dict[float, Any]
) -> list[str]:
    if method.refused:
        return [f"not run: {method.refused}"]
    found = []
    bad = [c for c in own if c["state"] != "done"]
    if design.budget == "parameters" and len(bad) < len(own):
        found.append(method.size)
    best = chosen(method, swept)
    if best is not None and best[1] and design.swept:
        found.append(f"best rate is the {best[1]} of the sweep: widen it")
    for lr, result in swept.items():
        if result and result["state"] == "failed":
            found.append(f"sweep, lr {lr:g}: {result['reason']}")
    found += [f"sweep, lr {lr:g}: {reason}" for lr, reason in lacking(swept).items()]
    if bad:
        found.append(f"{len(own) - len(bad)} of {len(own)} seeds")
    if best is not None:
        found += [f"seed {c['seed']}: {c.get('reason') or 'not run yet'}" for c in bad]
    return found


def _plus_minus(mean: float, half: float | None, digits: int = 4, sign: str = "") -> str:
    spread = "" if half is None else f" ± {half:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread}"


def _cells_of(row: dict[str, Any], metric: str, timed: bool, compared: bool) -> list[str]:
    have, wanted = len(row["seeds"]), row["wanted"]
    name = row["method"] + (f" ({have} of {wanted} seeds)" if 0 < have < wanted else "")
    first = [name, f"{row['parameters']:,}" if row["parameters"] else "-"]
    if "loss" not in row:
        return [*first, *["-"] * (5 + bool(metric) + timed + compared)]
    gap = row["difference"]
    peak = row["peak_memory"]
    found = [
        *first,
        f"{row['lr']:g}",
        _plus_minus(row["loss"], row["loss_ci"]),
    ]
    if compared:
        found.append(_plus_minus(gap["mean"], gap["ci"], sign="+") if gap else "")
    if metric:
        scale = 100 if row["share"] else 1
        half = row["score_ci"]
        found.append(
            _plus_minus(scale * row["score"], None if half is None else scale * half, 2)
            + (" %" if row["share"] else "")
        )
    if timed:
        found.append(f"{row['steps']:.0f}")
    return [
        *found,
        f"{row['seconds']:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{peak / MIB:,.0f}" if peak else "-",
    ]


def heads(result: dict[str, Any], reference: str) -> list[str]:
    """Names of the table's columns."""
    metric = next((r["metric"] for r in result["methods"] if r.get("metric")), "")
    timed = _steps_differ(result)
    return [
        "method", "parameters", "lr", "held-out loss",
        *([f"less {reference}'s"] if _compared(result) else []),
        *([metric] if metric else []), *(["steps"] if timed else []),
        "seconds", "tokens/s", "peak MiB",
    ]  # fmt: skip


def _compared(result: dict[str, Any]) -> bool:
    return any(r.get("difference") for r in result["methods"])


def _steps_differ(result: dict[str, Any]) -> bool:
    return len({r["steps"] for r in result["methods"] if "steps" in r}) > 1


def body(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows: the lowest loss first, then what lacks a seed (it may be its worst one),
    what has no loss at the end.
    """
    metric = next((r["metric"] for r in result["methods"] if r.get("metric")), "")
    rows = sorted(
        result["methods"], key=lambda r: (len(r["seeds"]) < r["wanted"], r.get("loss", math.inf))
    )
    shown = metric, _steps_differ(result), _compared(result)
    return [_cells_of(row, *shown) for row in rows]


def legend(result: dict[str, Any], design: Design) -> list[str]:
    """What a reader of the table must know, in lines."""
    kinds = {r["memory"] for r in result["methods"] if "memory" in r}
    n = len(design.seeds)
    lines = [
        f"budget: {result['budget']}",
        (
            f"{n} seeds ({', '.join(map(str, design.seeds))}): mean ± half of the 95 % interval"
            " (Student's t)"
            if n > 1
            else f"1 seed ({design.seeds[0]}): no interval"
        ),
    ]
    if _compared(result):
        lines.append(
            f"less {design.reference}'s: difference to {design.reference} under the same seed, so"
            " with the same rows in the same order; below zero is better"
        )
    elif design.reference not in [m.label for m in design.methods]:
        lines.append(f"no differences: the reference, {design.reference}, is not among the methods")
    if any(len(r["seeds"]) < r["wanted"] for r in result["methods"]):
        lines.append("a method that lacks seeds stands after those that have all")
    train, held_out = design.values["train"], design.values["data"]["valid_size"]
    steps = sorted({round(r["steps"]) for r in result["methods"] if "steps" in r})
    if len(steps) == 1:
        lines.append(f"{steps[0]} steps of {train['global_batch']} rows")
    if held_out and n > 1:
        lines.append(
            f"the {held_out} held-out rows are drawn by the seed too: the interval of a loss holds"
            " their chance; that of a difference, taken on the same rows, holds less of it: which"
            " rows suit one method better than the other is chance still"
        )
    if design.evaluate and n > 1:
        lines.append(
            "the interval of a score is over the seeds alone; that the test rows are a sample too"
            " is not in it"
        )
    if design.swept:
        lines.append(
            f"lr: chosen by held-out loss among {_tried(result, design)} ({design.lrs}) under seed"
            f" {design.sweep_seed}, which is not among those reported"
        )
    else:
        lines.append(f"lr: {design.lrs}, not swept")
    lines.append("seconds: of the training steps alone, of a run")
    for kind in sorted(kinds):
        lines.append(
            "peak MiB: of CUDA's allocator, rank 0"
            if kind == "cuda"
            else "peak MiB: resident, of the whole process (Python and torch are some hundred)"
        )
    return lines


def _tried(result: dict[str, Any], design: Design) -> str:
    """How many rates were tried; of each method where that differs."""
    count = {m.label: 0 for m in design.methods if not m.refused}
    for cell in result["sweep"]:
        if cell["method"] in count and cell["state"] in FINAL:
            count[cell["method"]] += 1
    if len(set(count.values())) == 1:
        return str(next(iter(count.values())))
    return ", ".join(f"{number} of {label}" for label, number in count.items())


def notes(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(method, what there is to say of it)."""
    return [(r["method"], "; ".join(r["notes"])) for r in result["methods"] if r["notes"]]


def text(result: dict[str, Any], design: Design) -> str:
    """The table for a terminal."""
    table = [heads(result, design.reference), *body(result)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    said = [f"{method}: {note}" for method, note in notes(result)]
    return "\n".join([*lines, "", *legend(result, design), *([""] if said else []), *said])


def markdown(result: dict[str, Any], design: Design) -> str:
    """``compare.md``."""
    names = heads(result, design.reference)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    data = design.values["data"]
    rows = next((c["rows"] for c in result["cells"] if c.get("rows")), "no")
    lines = [
        f"# {', '.join(m.label for m in design.methods)}",
        "",
        f"{result['date']}, {' and '.join(result['devices'])}; {versions}.",
        f"Base {design.values['model']['path']}, task {data['name']}, {rows} held-out rows.",
        "",
        "| " + " | ".join(names) + " |",
        "|---|" + "---:|" * (len(names) - 1),
        *("| " + " | ".join(row) + " |" for row in body(result)),
        "",
        *(f"* {line}" for line in legend(result, design)),
        "",
        *(f"* **{method}**: {note}" for method, note in notes(result)),
        "",
        "![held-out loss against trained parameters and against time](compare.png)",
    ]
    return "\n".join(lines) + "\n"


def spent(result: dict[str, Any]) -> str:
    """Wall time of all runs together."""
    walls = [c.get("wall", 0.0) for c in (*result["sweep"], *result["cells"])]
    return duration(sum(walls))
