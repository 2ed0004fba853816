"""The league: all comparisons in a folder as one page with pictures (docs/league.md)."""

import json
import math
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scalepeft.analysis.compare.table import body, page
from scalepeft.analysis.report.figures import INK, png
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping, write_atomically, writing


def write(folder: Path, out: Path) -> None:
    """Write league.md and its pictures into ``out``. Raises UserError: no comparison is there."""
    files, fix = sorted(folder.glob("*/compare.json")), "run its comparison again"
    league = {file.parent.name: read_mapping(file, json.loads, fix) for file in files}
    if not league:
        raise UserError(f"--league {folder}: no */compare.json in it; run comparisons there first")
    for name, result in league.items():
        if not {"design", "methods", "cells"} <= result.keys():
            raise UserError(f"{folder}/{name}/compare.json: no result of a comparison; {fix}")
    equal = {k: r for k, r in league.items() if r["design"]["budget"] == "parameters"}
    sized = {k: r for k, r in league.items() if k not in equal}
    gaps: dict[str, list[float]] = {}  # the mean ones decide the order; the reference's are 0
    for row in chain.from_iterable(result["methods"] for result in equal.values()):
        gap = row.get("difference") or {"mean": 0.0 if "loss" in row else math.inf}
        gaps.setdefault(row["method"], []).append(gap["mean"])
    order = sorted(gaps, key=lambda name: fmean(gaps[name]))
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        if equal:
            write_atomically(out / "league.png", png(partial(_draw, equal, _differences, order)))
        if sized:
            write_atomically(out / "league-sizes.png", png(partial(_draw, sized, _sizes, [])))
        text = page("league.j2", equal=equal, sized=sized, order=order, body=body)
        write_atomically(out / "league.md", text)


def _draw(league: dict[str, Any], panel: Any, order: list[str]) -> Figure:
    columns, height = min(3, len(league)), 0.9 + 0.2 * max(16, len(order))
    lines = math.ceil(len(league) / columns)
    figure = plt.figure(figsize=(4.6 * columns, lines * height))
    for i, (name, result) in enumerate(league.items(), 1):
        panel(figure.add_subplot(lines, columns, i, title=name), result, order)
    return figure


def _differences(axes: Axes, result: dict[str, Any], order: list[str]) -> None:
    """Paired, with intervals; in color where an interval holds no zero; logarithms beyond 0.03."""
    there = {row["method"] for row in result["methods"]}
    order = [name for name in order if name in there]
    for row in (row for row in result["methods"] if row.get("difference")):
        mean, half = row["difference"]["mean"], row["difference"]["ci"] or 0.0
        color = "#8a9199" if abs(mean) <= half else "C0" if mean < 0 else "C1"
        axes.errorbar(mean, order.index(row["method"]), xerr=half, fmt="o", color=color, ms=4)
    axes.axvline(0, color=INK, lw=1)
    axes.set_xscale("symlog", linthresh=0.03)
    wide = axes.get_xlim()
    near = max(map(abs, wide)) < 0.025
    ticks = [-0.01, 0, 0.01] if near else [-1, -0.1, -0.02, 0, 0.02, 0.1, 0.3, 1]
    axes.set(xticks=ticks, xticklabels=ticks, xlim=wide, ylim=(len(order) - 0.5, -0.5))
    axes.set_xlabel(f"loss less {result['design']['reference']}'s")
    axes.set_yticks(range(len(order)), order)


def _sizes(axes: Axes, result: dict[str, Any], _: list[str]) -> None:
    done = sorted((r for r in result["methods"] if "loss" in r), key=lambda r: r["parameters"])
    for i, name in enumerate(sorted({row["adapter"]["name"] for row in done})):
        rows = [row for row in done if row["adapter"]["name"] == name]
        x, y, half = ([r[k] or 0.0 for r in rows] for k in ("parameters", "loss", "loss_ci"))
        axes.errorbar(x, y, half, fmt="osD^"[i // 6 % 4] + "-", color=f"C{i % 6}", ms=4, label=name)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(ncols=2, fontsize=8)
