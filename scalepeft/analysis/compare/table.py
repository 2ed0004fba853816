"""What a comparison found: means over seeds with intervals, as a table, Markdown and JSON."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from scalepeft.analysis.compare.cells import Runner, choose, reported
from scalepeft.analysis.compare.design import Design, Method
from scalepeft.core.stats import mean_interval
from scalepeft.core.text import table

Row = dict[str, Any]
OF_METHOD = ("adapter", "parameters", "size", "usual_lr", "rates")  # in its row


def summarize(runner: Runner) -> dict[str, Any]:
    """Return all cells of a comparison and a row for each method, those without a result too."""
    design = runner.design
    budget = "the same steps; sizes as configured"
    if design.budget == "parameters":
        sizes = f"{design.target or 0:,}, where a method's size can be set"
        budget = f"the same trained parameters, {sizes}, and the same steps"
    cells = [{"method": c.method, "seed": c.seed, **runner.result(c)} for c in reported(design)]
    swept = {m.label: runner.swept(m) for m in design.methods}
    done = [c for c in cells if c["state"] == "done"]
    return {
        "budget": budget,
        "date": time.strftime("%Y-%m-%d"),
        "devices": sorted({f"{c['ranks']} x {c['device']}" for c in done}),
        "versions": done[-1]["versions"] if done else {},
        "methods": [_row(design, m, cells, swept[m.label]) for m in design.methods],
        "cells": cells,
        "sweep": [
            {"method": label, "seed": design.sweep_seed, **result, "lr": lr}
            for label, results in swept.items()
            for lr, result in results.items()
        ],
    }


def _row(design: Design, method: Method, cells: list[Row], swept: dict[float, Any]) -> Row:
    local = [c for c in cells if c["method"] == method.label]
    done = [c for c in local if c["state"] == "done"]
    row: Row = {
        "method": method.label,
        **{key: getattr(method, key) for key in OF_METHOD},
        "seeds": [c["seed"] for c in done],
        "wanted": len(local),
        "notes": _notes(design, method, local, swept),
    }
    if not done:
        return row
    same = ("parameters", "lr", "memory", *(("metric", "share") if design.evaluate else ()))
    row |= {key: done[0][key] for key in same}
    for key in ("steps", "seconds", "tokens_per_second"):
        row[key] = statistics.fmean(c[key] for c in done)
    for key in ("loss", "score") if design.evaluate else ("loss",):
        row[key], row[f"{key}_ci"] = mean_interval([c[key] for c in done])
    row["peak_memory"] = max((c["peak_memory"] for c in done if c["peak_memory"]), default=None)
    row["difference"] = difference(design.reference, method.label, cells)
    return row


def difference(reference: str, label: str, cells: list[Row]) -> dict[str, Any] | None:
    """Held-out loss less the reference's of the same seed, whose data order and rows cancel."""
    losses = {(c["method"], c["seed"]): c["loss"] for c in cells if c["state"] == "done"}
    seeds = [s for m, s in losses if m == label and (reference, s) in losses]
    if label == reference or not seeds:
        return None
    mean, half = mean_interval([losses[label, s] - losses[reference, s] for s in seeds])
    return {"mean": mean, "ci": half, "seeds": len(seeds)}


def _notes(design: Design, method: Method, local: list[Row], swept: dict[float, Any]) -> list[str]:
    if method.refused:
        return [f"not run: {method.refused}"]
    bad, choice = [c for c in local if c["state"] != "done"], choose(method, swept)
    notes = [method.size] if design.budget == "parameters" and len(bad) < len(local) else []
    notes += [choice["remark"]] if choice.get("remark") else []
    failed = {lr: r["reason"] for lr, r in swept.items() if r["state"] == "failed"}
    notes += [f"sweep, lr {lr:g}: {reason}" for lr, reason in failed.items()]
    if bad:
        notes.append(f"{len(local) - len(bad)} of {len(local)} seeds")
    seeds = [f"seed {c['seed']}: {c['reason']}" for c in bad]
    return notes + (seeds if "lr" in choice else [choice["reason"]])


def _interval(mean: float, half: float | None, form: str = ".4f") -> str:
    return f"{mean:{form}}" + ("" if half is None else f" ± {half:{form.removeprefix('+')}}")


def _score(row: Row) -> str:
    scale, unit = (100, " %") if row["share"] else (1, "")
    half = row["score_ci"] and scale * row["score_ci"]
    return _interval(scale * row["score"], half, ".2f") + unit


def body(result: dict[str, Any], reference: str) -> list[list[str]]:
    """The table with its header: the lowest loss first, then what lacks a seed, or has no loss."""
    rows = sorted(
        result["methods"], key=lambda r: (len(r["seeds"]) < r["wanted"], r.get("loss", math.inf))
    )
    metric = next((r["metric"] for r in rows if "metric" in r), "")
    columns: dict[str, Callable[[Row], str]] = {
        "lr": lambda r: f"{r['lr']:g}",
        "held-out loss": lambda r: _interval(r["loss"], r["loss_ci"]),
    }
    if any(r.get("difference") for r in rows):
        columns[f"less {reference}'s"] = lambda r: (
            _interval(gap["mean"], gap["ci"], "+.4f") if (gap := r["difference"]) else ""
        )
    if metric:
        columns[metric] = _score
    columns |= {
        "seconds": lambda r: f"{r['seconds']:.1f}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
        "peak MiB": lambda r: f"{r['peak_memory'] / 2**20:,.0f}" if r["peak_memory"] else "-",
    }
    lines = [["method", "parameters", *columns]]
    for row in rows:
        have, wanted = len(row["seeds"]), row["wanted"]
        name = row["method"] + (f" ({have} of {wanted} seeds)" if 0 < have < wanted else "")
        cells = [cell(row) if "loss" in row else "-" for cell in columns.values()]
        lines.append([name, f"{row['parameters']:,}" if row["parameters"] else "-", *cells])
    return lines


def page(template: str, **words: Any) -> str:
    """The text of a template of this folder."""
    loader = PackageLoader("scalepeft.analysis.compare")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(words).strip() + "\n"


def render(result: dict[str, Any], design: Design, form: str) -> str:
    """Return table and legend for a ``terminal``, or as ``markdown`` (``compare.md``)."""
    rows = body(result, design.reference)
    lines = "\n".join(table(rows, indent=""))
    words = {"result": result, "design": design, "header": rows[0], "body": rows[1:]}
    return page("compare.j2", table=lines, form=form, **words)
