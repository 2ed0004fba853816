"""The plots of a report: curves across restarts, scores with intervals, where the time went."""

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from scalepeft.analysis.report.draw import (
    PAPER,
    extremes,
    label,
    legend,
    line,
    medians,
    smooth,
    thinned,
)
from scalepeft.analysis.report.facts import Run, same_rows
from scalepeft.core.text import duration
from scalepeft.eval import scores
from scalepeft.run.goodput import Goodput


def curves(runs: list[Run]) -> Figure:
    """Loss above, tokens a second below, over steps, with restarts."""
    below = len(runs) > 4  # the legend
    height = 5.4 + (0.3 * (len(runs) // 3 + 1) if below else 0)
    figure, (loss, speed) = plt.subplots(
        2, sharex=True, figsize=(8.5, height), height_ratios=(2.3, 1)
    )
    tops: list[float] = []
    lows: list[float] = []
    for i, run in enumerate(runs):
        low, high = _loss(loss, run, i, len(runs) == 1)
        tops.append(high)
        lows.append(low)
        x, y = medians(run.columns["step"], run.columns["tokens_per_second"])
        colour, style = line(i)
        speed.plot(x, y, color=colour, ls=style, lw=1.6, marker="o" if len(x) < 3 else "")
    for run in runs if len(runs) == 1 else ():
        _restarts(loss, speed, run)
    if tops and np.isfinite(tops).any():
        _frame(loss, float(np.nanmin(lows)), float(np.nanmax(tops)))
    speed.set_ylim(bottom=0)
    speed.set_xlabel("step")
    loss.set_ylabel("loss (nats a token)")
    speed.set_ylabel("tokens/s")
    loss.set_title(_loss_title(runs))
    speed.set_title(_speed_title(runs), fontsize=11)
    for axes in (loss, speed):
        axes.grid(axis="y", lw=0.8)
    if len(runs) > 1 and any(len(run.starts) > 1 for run in runs):
        loss.plot([], [], "|", color=PAPER["ink"], ms=11, mew=1.6, label="restart")
    if len(runs) > 1 and any(run.held_out for run in runs):
        loss.plot([], [], "o", color=PAPER["c6"], mec=PAPER["ink"], mew=0.6, label="held out")
    if below:
        handles, labels = loss.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3)
    else:
        legend(loss, loc="upper right")
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


def _loss(axes: Axes, run: Run, i: int, alone: bool) -> tuple[float, float]:
    """Draws a run's losses; returns the range that must be seen."""
    steps, losses = run.columns["step"], run.columns["loss"]
    colour, style = line(i)
    means, width = smooth(losses)
    name = f"training, mean of {width} steps" if alone else label(run.name)
    if alone and width > 1:
        axes.plot(*extremes(steps, losses), color=colour, lw=0.8, alpha=0.3, label="training, each")
    thin = thinned(steps)
    lone = "o" if len(steps) == 1 else ""
    axes.plot(steps[thin], means[thin], color=colour, ls=style, lw=2, label=name, marker=lone)
    seen = [v for v in means if np.isfinite(v)]
    again = [e["step"] for e in run.starts[1:] if e["step"] > 0]
    if again and seen and not alone:
        at = np.interp(again, steps[np.isfinite(means)], seen)
        axes.plot(again, at, "|", color=PAPER["ink"], ms=11, mew=1.6, zorder=3)
    if run.held_out:
        x, y = np.array(run.held_out, dtype=float).T
        few = thinned(x, 60)
        held = PAPER["c1"] if alone else colour
        axes.plot(
            x[few], y[few], "o" if not alone else "o-", color=held, ms=5, lw=1.4,
            mec=PAPER["ink"], mew=0.6, label="held out" if alone else None,
        )  # fmt: skip
        seen += list(y)
    if alone and run.skipped:
        place = axes.get_xaxis_transform()
        marks = run.skipped[:: max(1, len(run.skipped) // 200)]
        axes.plot(
            marks, [0.02] * len(marks), "x", color=PAPER["c1"], transform=place, ms=6,
            label=f"skipped, not finite ({len(run.skipped):,})",
        )  # fmt: skip
    if not seen:
        return np.nan, np.nan
    finite = losses[np.isfinite(losses)]
    edges = np.quantile(finite, (0.005, 0.995)) if alone and len(finite) else seen
    return float(min(*seen, *edges)), float(max(*seen, *edges))


def _restarts(loss: Axes, speed: Axes, run: Run) -> None:
    """A line at each restart; a new number of ranks is written beside it where there is room."""
    again = [e for e in run.starts[1:] if e["step"] > 0]
    extent = max([1.0, *run.columns["step"]])
    written = -extent
    for i, event in enumerate(again[:200]):
        at = event["step"] + 0.5
        name = f"restart ({len(run.starts) - 1})" if i == 0 else None
        for axes, text in ((loss, name), (speed, None)):
            axes.axvline(at, color=PAPER["ink"], ls=(0, (4, 3)), lw=1, alpha=0.7, label=text)
        before = run.starts[run.starts.index(event) - 1]["world_size"]
        now = event["world_size"]
        if now != before and at - written > 0.12 * extent:
            written = at
            loss.annotate(
                f"{before} → {now} ranks", (at, 1), (4, -2), xycoords=loss.get_xaxis_transform(),
                textcoords="offset points", va="top", fontsize=10,
                bbox={"facecolor": PAPER["paper"], "edgecolor": "none", "pad": 1},
            )  # fmt: skip


def _loss_title(runs: list[Run]) -> str:
    if len(runs) > 1:
        ends = [(run.held_out[-1][1], run.name) for run in runs if run.held_out]
        if len(ends) == len(runs) and same_rows(runs):
            least, name = min(ends)
            return f"Lowest held-out loss at the end: {label(name)}, {least:.3f}"
        return "Loss of each run"
    run = runs[0]
    if len(run.held_out) > 1:
        (_, first), (_, last) = run.held_out[0], run.held_out[-1]
        return f"Held-out loss {first:.3f} → {last:.3f}"
    finite = run.columns["loss"][np.isfinite(run.columns["loss"])]
    return f"Training loss {finite[0]:.3f} → {finite[-1]:.3f}" if len(finite) else "No finite loss"


def _speed_title(runs: list[Run]) -> str:
    if len(runs) > 1:
        return "Speed of each run"
    found = runs[0].columns["tokens_per_second"]
    found = found[np.isfinite(found)]
    return f"Median speed {np.median(found):,.0f} tokens/s" if len(found) else "Speed unknown"


def rates(runs: list[Run]) -> Figure:
    """Learning rate and gradient norm, small."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.5))
    norms = []
    for i, run in enumerate(runs):
        colour, style = line(i)
        left.plot(*extremes(run.columns["step"], run.columns["lr"]), color=colour, ls=style, lw=1.6)
        x, y = extremes(run.columns["step"], run.columns["grad_norm"])
        right.plot(x, y, color=colour, ls=style, lw=1)
        norms += [v for v in y if v > 0]
    if norms and max(norms) > 20 * min(norms):
        right.set_yscale("log")
    left.set_title("Learning rate", fontsize=11)
    right.set_title("Gradient norm, before clipping", fontsize=11)
    for axis in (left.yaxis, right.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(axis="y", lw=0.8)
    return figure


SHARES = {
    "steps that count": ("steps", "c0"), "start-up": ("startup", "c5"), "load": ("load", "c4"),
    "held-out loss": ("held_out", "c2"), "save": ("save", "c3"),
    "recomputed steps": ("recomputed", "c6"), "waiting": ("waiting", "c1"),
    "other": ("other", "c7"),
}  # fmt: skip
"""What wall time goes to -> the field of Goodput, the colour."""


def wall_time(runs: list[Run]) -> Figure:
    """A stacked bar a run: shares of its wall time."""
    shown = [(run, run.goodput) for run in runs if run.goodput]
    figure, axes = plt.subplots(figsize=(8.5, 1.9 + 0.45 * len(shown)))
    for place, (_, spent) in enumerate(shown):
        left = 0.0
        for name, (key, colour) in SHARES.items():
            width = 100 * getattr(spent, key) / spent.wall
            text = _share_label(name, spent, key, len(shown) == 1) if place == 0 else None
            axes.barh(place, width, left=left, color=PAPER[colour], height=0.62, label=text)
            if width > 6:
                axes.text(
                    left + width / 2, place, f"{width:.0f}%", ha="center", va="center",
                    color=PAPER["ink" if colour == "c7" else "paper"], fontweight="bold",
                )  # fmt: skip
            left += width
    names = [f"{label(run.name)}\n{duration(spent.wall)}" for run, spent in shown]
    axes.set_yticks(range(len(shown)), names if len(shown) > 1 else [""])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of wall time")
    if len(shown) == 1:
        spent = shown[0][1]
        axes.set_title(f"{spent.share:.0%} of {duration(spent.wall)} went into steps that count")
    else:
        axes.set_title("Where the wall time went")
    figure.legend(loc="outside lower left", ncols=4 if len(shown) > 1 else 3)
    return figure


def _share_label(name: str, spent: Goodput, key: str, figures: bool) -> str:
    return f"{name} {duration(getattr(spent, key))}" if figures else name


def intervals(title: str, rows: list[tuple[str, list[tuple[str, dict[str, Any]]]]]) -> Figure:
    """Points with their 95 % intervals: a line for each of ``rows``, a colour for each subject."""
    subjects = list(dict.fromkeys(which for _, found in rows for which, _ in found))
    colours = {"base": "c6", "tuned": "c0", "merged": "c4"}
    figure, axes = plt.subplots(figsize=(8.5, 1.7 + 0.16 * len(rows) * (1 + len(subjects))))
    as_share = all(metric["share"] for _, found in rows for _, metric in found)
    scale = 100 if as_share else 1
    for place, (_, found) in enumerate(rows):
        for which, metric in found:
            spot = subjects.index(which)
            at = place + 0.5 * (spot - (len(subjects) - 1) / 2) / max(1, len(subjects) - 1)
            value, (low, high) = scale * metric["value"], (scale * v for v in metric["ci95"])
            colour = PAPER[colours.get(which, f"c{1 + spot % 5}")]
            first = all(which not in dict(f) for _, f in rows[:place])
            axes.plot([low, high], [at, at], color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot(value, at, "osD^"[spot % 4], color=colour, ms=7,
                      label=which if first else None)  # fmt: skip
            axes.annotate(
                scores.shown(metric), (high, at), (6, 0), textcoords="offset points", va="center",
                fontsize=10,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [label(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("%" if as_share else "points")
    axes.set_title(title)
    axes.grid(axis="x", lw=0.8)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: subjects.index(labels[i]))
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower left", ncols=4
    )
    return figure
