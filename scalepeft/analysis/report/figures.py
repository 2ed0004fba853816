"""The plots: curves across restarts, scores with intervals, where the time went; PNG on white.

Colors are Okabe and Ito's, told apart by color-blind readers.
"""

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from scalepeft.analysis.report.load import Run
from scalepeft.core.text import duration, visible
from scalepeft.eval import scores
from scalepeft.run.goodput import Goodput

matplotlib.use("Agg")

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = SERIES = (
    "#0072b2", "#d55e00", "#009e73", "#b65a94", "#c98500", "#3f9fd0",
)  # fmt: skip
INK, GRID, GRAY, PALE = "#1b1f24", "#d8dce0", "#6b6b6b", "#b9b9b9"
LINES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.fontsize": 10, "legend.edgecolor": "none", "axes.spines.top": False,
    "axes.spines.right": False, "text.parse_math": False, "figure.constrained_layout.use": True,
    "axes.axisbelow": True, "grid.color": GRID, "agg.path.chunksize": 10_000,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}  # fmt: skip
SHARES = {
    "steps that count": ("steps", BLUE), "start-up": ("startup", SKY), "load": ("load", YELLOW),
    "held-out loss": ("held_out", GREEN), "save": ("save", PINK),
    "recomputed steps": ("recomputed", GRAY), "waiting": ("waiting", ORANGE),
    "other": ("other", PALE),
}  # fmt: skip
"""What wall time goes to -> the field of Goodput, the color."""

Rows = dict[str, dict[str, dict[str, Any]]]
"""A line of a plot of scores -> the subjects in it -> metric."""


def picture(name: str, alt: str, draw: Callable[[], Figure], caption: str = "") -> dict[str, Any]:
    """Draw a plot: its name, texts and the bytes of its PNG."""
    png = io.BytesIO()
    with plt.rc_context(STYLE):
        figure = draw()
        figure.savefig(png, format="png", dpi=150)
        plt.close(figure)
    return {"name": name, "alt": alt, "caption": caption, "png": png.getvalue()}


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Average over a fortieth of the values, centered; what is not finite counts for nothing.

    Returns:
        The means, NaN where a window holds none; and the window, in values.
    """
    width = len(values) // 40 | 1
    finite = np.isfinite(values)
    columns = (np.where(finite, values, 0.0), finite.astype(float))
    total, count = (np.convolve(column, np.ones(width), "same") for column in columns)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), width


def label(name: str) -> str:
    """Return a name as a legend takes it: short, not hidden for its leading underscore."""
    name = visible(name)
    short = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
    return f" {short}" if short.startswith("_") else short


def _line(i: int) -> dict[str, Any]:
    """Color and line style of the i-th run."""
    return {"color": SERIES[i % len(SERIES)], "ls": LINES[i // len(SERIES) % len(LINES)]}


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x[np.isfinite(y)], y[np.isfinite(y)]


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
    for axes in (loss, speed):
        axes.grid(axis="y", lw=0.8)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def _loss(axes: Axes, run: Run, i: int, alone: bool) -> list[float]:
    """Draw a run's losses; return values that must be seen."""
    steps, losses = run.columns["step"], run.columns["loss"]
    means, width = smooth(losses)
    name, color = (
        f"training, mean of {width} steps" if alone else label(run.name),
        _line(i)["color"],
    )
    if alone and width > 1:
        axes.plot(*_finite(steps, losses), color=color, lw=0.8, alpha=0.3, label="training, each")
    again = np.searchsorted(steps, [] if alone else [e["step"] for e in run.starts[1:]])
    ticks = {"marker": "|", "ms": 11, "mec": INK, "markevery": list(again[again < len(steps)])}
    axes.plot(
        steps, means, **_line(i), lw=2, label=name, **(ticks if len(steps) > 1 else {"marker": "o"})
    )
    held_out = np.array(run.held_out, dtype=float).reshape(-1, 2).T
    if run.held_out:
        axes.plot(
            *held_out, "o-" if alone else "o", color=ORANGE if alone else color, ms=5, lw=1.4,
            mec=INK, mew=0.6, label="held out" if alone else None,
            markevery=-(-len(run.held_out) // 60),
        )  # fmt: skip
    if alone and run.skipped:
        axes.plot(
            run.skipped, [0.02] * len(run.skipped), "x", color=ORANGE, ms=6,
            transform=axes.get_xaxis_transform(),
            label=f"skipped, not finite ({len(run.skipped):,})",
        )  # fmt: skip
    finite = losses[np.isfinite(losses)]
    edges = np.quantile(finite, (0.005, 0.995)) if alone and len(finite) else []
    return [float(v) for v in (*means[np.isfinite(means)], *held_out[1], *edges)]


def _restarts(loss: Axes, speed: Axes, run: Run) -> None:
    """A line at each restart; of a few, with the number of ranks where it changed."""
    at = [event["step"] + 0.5 for event in run.starts[1:]]
    for axes in (loss, speed) if at else ():
        axes.vlines(
            at, 0, 1, transform=axes.get_xaxis_transform(), color=INK, ls=(0, (4, 3)), lw=1,
            alpha=0.7, label=f"restart ({len(at)})",
        )  # fmt: skip
    for before, event in pairwise(run.starts[:6]):
        if event["world_size"] != before["world_size"]:
            text = f" {before['world_size']} → {event['world_size']} ranks"
            loss.text(event["step"] + 0.5, 1, text, transform=loss.get_xaxis_transform(), va="top")


def rates(runs: list[Run]) -> Figure:
    """Draw learning rate and gradient norm, small."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.5))
    norms: list[float] = []
    for i, run in enumerate(runs):
        left.plot(*_finite(run.columns["step"], run.columns["lr"]), **_line(i), lw=1.6)
        x, y = _finite(run.columns["step"], run.columns["grad_norm"])
        right.plot(x, y, **_line(i), lw=1)
        norms += [v for v in y if v > 0]
    if norms and max(norms) > 20 * min(norms):
        right.set_yscale("log")
    for axes, title in ((left, "Learning rate"), (right, "Gradient norm, before clipping")):
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.set(xlabel="step", title=title)
        axes.grid(axis="y", lw=0.8)
    return figure


def wall_time(runs: dict[str, Goodput]) -> Figure:
    """Draw a stacked bar a run: shares of its wall time."""
    spent, alone = list(runs.values()), len(runs) == 1
    walls, left = np.array([one.wall for one in spent]), np.zeros(len(spent))
    figure, axes = plt.subplots(figsize=(8.5, 1.9 + 0.45 * len(spent)))
    for name, (key, color) in SHARES.items():
        took = np.array([getattr(one, key) for one in spent])
        shares = 100 * took / walls
        text = f"{name} {duration(took[0])}" if alone else name
        bars = axes.barh(range(len(spent)), shares, 0.62, left, color=color, label=text)
        written = [f"{share:.0f}%" if share > 6 else "" for share in shares]
        ink = INK if color == PALE else "white"
        axes.bar_label(bars, written, label_type="center", color=ink, fontweight="bold")
        left += shares
    names = [f"{label(name)}\n{duration(one.wall)}" for name, one in runs.items()]
    axes.set_yticks(range(len(spent)), [""] if alone else names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of wall time", title="Where the wall time went")
    figure.legend(loc="outside lower left", ncols=3 if alone else 4)
    return figure


def intervals(title: str, rows: Rows) -> Figure:
    """Draw points with their 95 % intervals: a line for each of ``rows``, a color a subject."""
    subjects = list(dict.fromkeys(which for row in rows.values() for which in row))
    colors = {"base": GRAY, "tuned": BLUE, "merged": YELLOW}
    figure, axes = plt.subplots(figsize=(8.5, 1.7 + 0.16 * len(rows) * (1 + len(subjects))))
    as_share = all(metric["share"] for row in rows.values() for metric in row.values())
    scale = 100 if as_share else 1
    for spot, which in enumerate(subjects):
        shift = 0.5 * (spot - (len(subjects) - 1) / 2) / max(1, len(subjects) - 1)
        metrics = {i + shift: row[which] for i, row in enumerate(rows.values()) if which in row}
        values = scale * np.array([metric["value"] for metric in metrics.values()])
        ends = scale * np.array([metric["ci95"] for metric in metrics.values()]).T
        axes.errorbar(
            values, list(metrics), xerr=np.abs(ends - values), fmt="osD"[spot], ms=7, lw=2.2,
            color=colors[which], label=which,
        )  # fmt: skip
        for (at, metric), high in zip(metrics.items(), ends[1], strict=True):
            axes.annotate(
                scores.shown(metric), (high, at), (6, 0), textcoords="offset points", va="center",
                fontsize=10,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), list(map(label, rows)))
    axes.margins(x=0.12)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="%" if as_share else "points", title=title)
    axes.grid(axis="x", lw=0.8)
    figure.legend(loc="outside lower left", ncols=4)
    return figure
