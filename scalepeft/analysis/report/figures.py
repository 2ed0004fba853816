"""The plots of a report, loss and speed across restarts and lengths of rows: PNGs on white."""

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from scalepeft.analysis.report.load import Run, number
from scalepeft.core.text import visible

matplotlib.use("Agg")

STYLE = Path(__file__).with_name("templates") / "plots.mplstyle"
ORANGE, INK = "C1", "#1b1f24"
MOVED = {"angle": "Angle of rotation (degrees)", "distance": "Distance |W' − W| / |W|"}
MOVED |= {"spectrum": "Drift of singular values", "energy": "Change of hyperspherical energy"}


def png(figure: Callable[[], Figure]) -> bytes:
    """Draw a plot in the report's style; return its PNG."""
    content = io.BytesIO()
    with plt.style.context(STYLE):
        drawn = figure()
        drawn.savefig(content, format="png")
        plt.close(drawn)
    return content.getvalue()


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """(Averages over a fortieth of the values, of finite ones alone, else NaN; that window)."""
    width = len(values) // 40 | 1
    finite = np.isfinite(values)
    columns = (np.where(finite, values, 0.0), finite.astype(float))
    sums = (np.cumsum(np.pad(column, (width // 2 + 1, width // 2))) for column in columns)
    total, count = (passed[width:] - passed[:-width] for passed in sums)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), width


def label(name: str) -> str:
    """Return a name as a legend takes it: short, not hidden for its leading underscore."""
    name = visible(name)
    short = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
    return f" {short}" if short.startswith("_") else short


def _line(i: int) -> dict[str, Any]:
    return {"color": f"C{i % 6}", "ls": ("-", "--", ":", "-.")[i // 6 % 4]}


def curves(runs: list[Run]) -> Figure:
    """Draw loss above, tokens a second below, over steps, with restarts."""
    alone, size = len(runs) == 1, (8.5, 5.4 + 0.3 * (len(runs) // 3))
    figure, (loss, speed) = plt.subplots(2, sharex=True, figsize=size, height_ratios=(2.3, 1))
    seen = []
    for i, run in enumerate(runs):
        seen += _loss(loss, run, i, alone)
        x, y = run.columns["step"], smooth(run.columns["tokens_per_second"])[0]
        speed.plot(x, y, **_line(i), lw=1.6, marker="o" if len(x) < 3 else "")
    if alone:
        _restarts(loss, speed, runs[0])
    low, high = min(seen, default=0), max(seen, default=0)
    if high > 3 * low > 0:  # a steep beginning would flatten all that follows
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(10, (1, 1.5, 2, 3, 5, 7)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter(NullFormatter())
        loss.set_ylim(low / 1.1, high * 1.1)
    elif high > low:
        loss.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    loss.set(ylabel="loss (nats a token)", title="Loss" if alone else "Loss of each run")
    speed.set(ylabel="tokens/s", xlabel="step", title="Speed")
    speed.set_ylim(bottom=0)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def _loss(axes: Axes, run: Run, i: int, alone: bool) -> list[float]:
    """Draw a run's losses; return values that must be seen."""
    steps, losses = run.columns["step"], run.columns["loss"]
    means, width = smooth(losses)
    line, name, ticks = _line(i), label(run.name), [e["step"] for e in run.starts[1:]]
    finite = np.isfinite(losses)
    each = losses[finite]
    if alone:
        name, ticks = f"training, mean of {width} steps" if width > 1 else "training", []
        text = "training, each" if width > 1 else None
        axes.plot(steps[finite], each, color=line["color"], lw=0.8, alpha=0.3, label=text)
    axes.plot(steps, means, **line, lw=2, label=name, marker="o" if len(steps) == 1 else "")
    axes.plot(ticks, np.interp(ticks, steps, means), "|", color=INK, ms=11, mew=1.6)
    if run.held_out:
        own = dict[str, Any](color=ORANGE, label="held out") if alone else {**line, "ls": ""}
        own |= {"marker": "o", "ms": 5, "mec": INK, "markevery": 1 + len(run.held_out) // 60}
        axes.plot(*zip(*run.held_out, strict=True), **own, lw=1.4, mew=0.6)
    if alone and run.skipped:
        at, text = axes.get_xaxis_transform(), f"skipped, not finite ({len(run.skipped):,})"
        low = np.full(len(run.skipped), 0.02)
        axes.plot(run.skipped, low, "x", color=ORANGE, ms=6, transform=at, label=text)
    edges = np.quantile(each, (0.005, 0.995)) if alone and len(each) else ()
    seen = (*means, *edges, *(loss for _, loss in run.held_out))
    return [float(value) for value in seen if np.isfinite(value)]


def _restarts(loss: Axes, speed: Axes, run: Run) -> None:
    """A line at each restart; of a few, with the number of ranks where it changed."""
    for before, event in pairwise(run.starts[:200]):
        at, ranks = event["step"] + 0.5, (before["world_size"], event["world_size"])
        text = f"restart ({len(run.starts) - 1})" if before is run.starts[0] else None
        for axes in (loss, speed):
            axes.axvline(at, color=INK, ls=(0, (4, 3)), lw=1, alpha=0.7, label=text)
        if len(run.starts) < 7 and len(set(ranks)) == 2:
            where = loss.get_xaxis_transform()
            loss.text(at, 1, " {} → {} ranks".format(*ranks), transform=where, va="top", size=10)


def moved(runs: list[Run]) -> Figure:
    """Draw how far layers moved: medians, shaded from least to most, of each kind or each run."""
    figure, panels = plt.subplots(2, 2, sharex=True, figsize=(8.5, 6))
    rows = [(run, row) for run in runs for row in run.moved if isinstance(row["layers"], dict)]
    moves = [(run, row["step"], *move) for run, row in rows for move in row["layers"].items()]
    for axes, (key, title) in zip(panels.flat, MOVED.items(), strict=True):
        lines: dict[str, dict[int, list[float]]] = {}
        for run, step, name, held in moves:
            if isinstance(held, dict) and np.isfinite(value := number(held.get(key))):
                kind = name.rpartition(".")[2] if len(runs) == 1 else run.name
                lines.setdefault(kind, {}).setdefault(step, []).append(value)
        for i, (kind, steps) in enumerate(lines.items()):
            low, middle, high = np.transpose([np.quantile(v, (0, 0.5, 1)) for v in steps.values()])
            axes.plot(list(steps), middle, "o", **_line(i), lw=1.6, label=label(kind), ms=2.5)
            axes.fill_between(list(steps), low, high, color=f"C{i % 6}", alpha=0.15, lw=0)
        axes.set(title=title, ylim=(min(0, axes.get_ylim()[0]), max(1e-4, axes.get_ylim()[1])))
    plt.setp(panels[1], xlabel="step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    return figure


def lengths(data: dict[str, dict[str, Any]]) -> Figure:
    """Draw how many rows have how many tokens, a panel for each split, with the cutoff."""
    splits = {name: counts["histogram"] for name, counts in data.items() if "histogram" in counts}
    size, cutoff = (8.5, 1 + 2.2 * len(splits)), data["train"]["cutoff"]
    figure, panels = plt.subplots(len(splits), sharex=True, squeeze=False, figsize=size)
    near = cutoff <= 1.5 * max(held["edges"][-1] for held in splits.values())
    for axes, (name, held) in zip(panels.flat, splits.items(), strict=True):
        axes.stairs(held["counts"], held["edges"], fill=True, color="C0")
        if near:
            axes.axvline(cutoff, color=ORANGE, ls=(0, (4, 3)), lw=1.6)
        axes.set(title=name, ylabel="rows", xlim=(0, None))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel(f"tokens a row ({'dashed: ' if near else ''}data.cutoff = {cutoff:,})")
    figure.align_ylabels()
    return figure
