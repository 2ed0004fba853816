"""The plots: curves across restarts, scores with intervals, where the time went; PNG on white.

Colors are Okabe and Ito's, told apart by color-blind readers.
"""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from scalepeft.analysis.report.load import Run
from scalepeft.core.text import duration, visible
from scalepeft.eval import scores

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

Rows = list[tuple[str, list[tuple[str, dict[str, Any]]]]]


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
    width = max(1, len(values) // 40)
    width += 1 - width % 2
    finite = np.isfinite(values)
    padded = [np.pad(np.cumsum(v), (1, 0)) for v in (np.where(finite, values, 0.0), finite * 1.0)]
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    total, count = (p[high] - p[low] for p in padded)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0), width


def medians(x: np.ndarray, y: np.ndarray, parts: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return the medians of stretches of a curve."""
    kept = np.flatnonzero(np.isfinite(y))
    found = np.array_split(kept, min(parts, len(kept))) if len(kept) else []
    return np.array([x[p].mean() for p in found]), np.array([np.median(y[p]) for p in found])


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
    alone, below = len(runs) == 1, len(runs) > 4  # the legend
    height = 5.4 + (0.3 * (len(runs) // 3 + 1) if below else 0)
    figure, (loss, speed) = plt.subplots(
        2, sharex=True, figsize=(8.5, height), height_ratios=(2.3, 1)
    )
    seen = []
    for i, run in enumerate(runs):
        seen += _loss(loss, run, i, alone)
        x, y = medians(run.columns["step"], run.columns["tokens_per_second"])
        speed.plot(x, y, **_line(i), lw=1.6, marker="o" if len(x) < 3 else "")
    if alone:
        _restarts(loss, speed, runs[0])
    if seen:
        _frame(loss, min(seen), max(seen))
    loss.set(ylabel="loss (nats a token)", title="Loss" if alone else "Loss of each run")
    speed.set(ylabel="tokens/s", xlabel="step", title="Speed")
    speed.set_ylim(bottom=0)
    for axes in (loss, speed):
        axes.grid(axis="y", lw=0.8)
    if not alone and any(len(run.starts) > 1 for run in runs):
        loss.plot([], [], "|", color=INK, ms=11, mew=1.6, label="restart")
    if not alone and any(run.held_out for run in runs):
        loss.plot([], [], "o", color=GRAY, mec=INK, mew=0.6, label="held out")
    if below:
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    else:
        loss.legend(loc="upper right")
    return figure


def _frame(axes: Axes, low: float, high: float) -> None:
    """The range of losses; logarithmic where a steep beginning would flatten all that follows."""
    if low > 0 and high > 3 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.08, high * 1.15)
        axes.yaxis.set_major_locator(LogLocator(10, (1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + 1.5 * room)


def _loss(axes: Axes, run: Run, i: int, alone: bool) -> list[float]:
    """Draw a run's losses; return values that must be seen."""
    steps, losses = run.columns["step"], run.columns["loss"]
    means, width = smooth(losses)
    name = f"training, mean of {width} steps" if alone else label(run.name)
    color = _line(i)["color"]
    if alone and width > 1:
        axes.plot(*_finite(steps, losses), color=color, lw=0.8, alpha=0.3, label="training, each")
    axes.plot(steps, means, **_line(i), lw=2, label=name, marker="o" if len(steps) == 1 else "")
    at, seen = _finite(steps, means)
    again = [e["step"] for e in run.starts[1:] if e["step"] > 0]
    if again and len(seen) and not alone:
        axes.plot(again, np.interp(again, at, seen), "|", color=INK, ms=11, mew=1.6, zorder=3)
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
    return [float(v) for v in (*seen, *held_out[1], *edges)]


def _restarts(loss: Axes, speed: Axes, run: Run) -> None:
    """A line at each restart; a new number of ranks is written beside it where there is room."""
    extent = max([1.0, *run.columns["step"]])
    written = -extent
    name: str | None = f"restart ({len(run.starts) - 1})"
    for before, event in list(zip(run.starts, run.starts[1:], strict=False))[:200]:
        if event["step"] <= 0:
            continue
        at, now = event["step"] + 0.5, event["world_size"]
        for axes, text in ((loss, name), (speed, None)):
            axes.axvline(at, color=INK, ls=(0, (4, 3)), lw=1, alpha=0.7, label=text)
        name = None
        if now != before["world_size"] and at - written > 0.12 * extent:
            written = at
            loss.annotate(
                f"{before['world_size']} → {now} ranks", (at, 1), (4, -2), va="top", fontsize=10,
                xycoords=loss.get_xaxis_transform(), textcoords="offset points",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip


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
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set(xlabel="step", title=title)
        axes.grid(axis="y", lw=0.8)
    return figure


def wall_time(runs: list[Run]) -> Figure:
    """Draw a stacked bar a run: shares of its wall time."""
    shown = [(run, run.goodput) for run in runs if run.goodput]
    alone = len(shown) == 1
    figure, axes = plt.subplots(figsize=(8.5, 1.9 + 0.45 * len(shown)))
    for place, (_, spent) in enumerate(shown):
        left = 0.0
        for name, (key, color) in SHARES.items():
            took = getattr(spent, key)
            width = 100 * took / spent.wall
            text = (f"{name} {duration(took)}" if alone else name) if place == 0 else None
            axes.barh(place, width, left=left, color=color, height=0.62, label=text)
            if width > 6:
                axes.text(
                    left + width / 2, place, f"{width:.0f}%", ha="center", va="center",
                    color=INK if color == PALE else "white", fontweight="bold",
                )  # fmt: skip
            left += width
    names = [f"{label(run.name)}\n{duration(spent.wall)}" for run, spent in shown]
    axes.set_yticks(range(len(shown)), [""] if alone else names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of wall time", title="Where the wall time went")
    figure.legend(loc="outside lower left", ncols=3 if alone else 4)
    return figure


def intervals(title: str, rows: Rows) -> Figure:
    """Draw points with their 95 % intervals: a line for each of ``rows``, a color a subject."""
    subjects = list(dict.fromkeys(which for _, found in rows for which, _ in found))
    colors = {"base": GRAY, "tuned": BLUE, "merged": YELLOW}
    figure, axes = plt.subplots(figsize=(8.5, 1.7 + 0.16 * len(rows) * (1 + len(subjects))))
    as_share = all(metric["share"] for _, found in rows for _, metric in found)
    scale = 100 if as_share else 1
    for spot, which in enumerate(subjects):
        shift = 0.5 * (spot - (len(subjects) - 1) / 2) / max(1, len(subjects) - 1)
        color = colors.get(which, SERIES[(1 + spot) % len(SERIES)])
        points = [
            (i, dict(found)[which]) for i, (_, found) in enumerate(rows) if which in dict(found)
        ]
        for i, (place, metric) in enumerate(points):
            at, value = place + shift, scale * metric["value"]
            low, high = (scale * v for v in metric["ci95"])
            axes.plot([low, high], [at, at], color=color, lw=2.2, solid_capstyle="butt")
            axes.plot(value, at, "osD^"[spot % 4], color=color, ms=7, label=None if i else which)
            axes.annotate(
                scores.shown(metric), (high, at), (6, 0), textcoords="offset points", va="center",
                fontsize=10,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [label(name) for name, _ in rows])
    axes.margins(x=0.12)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="%" if as_share else "points", title=title)
    axes.grid(axis="x", lw=0.8)
    figure.legend(loc="outside lower left", ncols=4)
    return figure
