"""The picture of a comparison: held-out loss against trained parameters, and against time."""

import math
from pathlib import Path
from typing import Any

from scalepeft.analysis.compare.design import Design

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666",
    "#A5AA00", "#882255",
)  # fmt: skip
MARKERS = "osD^vPX*<>"
WIDTH, APART = 340, 10  # of an axis, and between the marks of methods of one size, in points
# Where a name may stand: beside its mark, over or under its bar, there lying or standing.
PLACES = [
    ("mark", 11, 0, 0), ("mark", -11, 0, 0), ("top", 0, 4, 0), ("low", 0, -4, 0),
    ("top", 0, 4, 90), ("low", 0, -4, 90), ("top", 0, 20, 0), ("low", 0, -20, 0),
    ("top", 0, 20, 90), ("low", 0, -20, 90),
]  # fmt: skip


def plot(result: dict[str, Any], design: Design, target: Path) -> None:
    """Draws the methods that have a result; bars are 95 % intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    rows = [row for row in result["methods"] if "loss" in row]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), dpi=130, sharey=True)
    labels = {"parameters": "trained parameters", "seconds": "seconds of training"}
    asides = [_apart([row["parameters"] for row in rows]), [0.0] * len(rows)]
    for axis, key, aside in zip(axes, labels, asides, strict=True):
        values = [row[key] for row in rows]
        if key == "parameters" or max(values) > 5 * min(values):
            axis.set_xscale("log")
            axis.set_xlim(*_log_room(values))
            axis.xaxis.set_major_locator(ticker.LogLocator(10, (1, 2, 5)))
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(_short))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            room = max(0.18 * (max(values) - min(values)), 0.05 * max(values))
            axis.set_xlim(min(values) - room, max(values) + room)
        for i, row in enumerate(rows):
            _mark(axis, row, key, i, aside[i])
        beside = ", marks of one size side by side" if any(aside) else ""
        axis.set_xlabel(labels[key] + beside)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss per label token (nats), lower is better")
    axes[1].tick_params(labelleft=True)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    n = len(design.seeds)
    spread = f"mean of {n} seeds, bars: 95 % interval" if n > 1 else "1 seed"
    figure.suptitle(f"{_subject(design)}: {spread}", fontsize=11, y=0.98)
    figure.text(0.5, 0.905, f"budget: {result['budget']}", ha="center", fontsize=8.5)
    figure.text(
        0.5,
        0.012,
        f"{' and '.join(result['devices'])}, torch {result['versions']['torch']}, {result['date']}",
        ha="center",
        fontsize=7.5,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.955))
    for axis, key, aside in zip(axes, labels, asides, strict=True):
        _name_all(figure, axis, rows, key, aside)
    figure.savefig(target)
    plt.close(figure)


def _subject(design: Design) -> str:
    model, data = design.values["model"]["path"], design.values["data"]["name"]
    parts = [p for p in Path(model).parts if p not in ("hf", "/")]
    return f"{data} on {parts[-1] if parts else model}"


def _apart(values: list[float]) -> list[float]:
    """Points to move marks aside by on the logarithmic axis, so that none stands on another."""
    low, high = _log_room(values)
    place = [WIDTH * math.log(v / low) / math.log(high / low) for v in values]
    order = sorted(range(len(values)), key=place.__getitem__)
    groups: list[list[int]] = []
    for i in order:
        if groups and place[i] - place[groups[-1][-1]] < APART:
            groups[-1].append(i)
        else:
            groups.append([i])
    found = [0.0] * len(values)
    for group in groups:
        middle = sum(place[i] for i in group) / len(group)
        for k, i in enumerate(group):
            found[i] = middle + APART * (k - (len(group) - 1) / 2) - place[i]
    return found


def _log_room(values: list[float]) -> tuple[float, float]:
    room = max(1.3, (max(values) / min(values)) ** 0.14)
    return min(values) / room, max(values) * room


def _short(value: float, _: int) -> str:
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g} {sign}"
    return f"{value:g}"


def _mark(axis: Any, row: dict[str, Any], key: str, number: int, aside: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    moved = axis.transData + ScaledTranslation(aside / 72, 0, axis.figure.dpi_scale_trans)
    bars = axis.errorbar(
        row[key],
        row["loss"],
        yerr=row["loss_ci"],
        fmt=MARKERS[number % len(MARKERS)],
        ms=7,
        color=COLOURS[number % len(COLOURS)],
        capsize=3,
        elinewidth=1.1,
        mec="white",
        mew=0.7,
        label=row["method"],
    )
    for part in [bars[0], *bars[1], *bars[2]]:
        part.set_transform(moved)
    axis.update_datalim([(row[key], row["loss"] + s * (row["loss_ci"] or 0)) for s in (-1, 1)])


def _name_all(
    figure: Any, axis: Any, rows: list[dict[str, Any]], key: str, asides: list[float]
) -> None:
    """Writes each method's name beside its mark, where it covers no mark, bar or other name."""
    renderer = figure.canvas.get_renderer()
    taken = [
        box for row, aside in zip(rows, asides, strict=True) for box in _ink(axis, row, key, aside)
    ]
    area = axis.get_window_extent(renderer)
    left_over = False
    for number, (row, aside) in enumerate(zip(rows, asides, strict=True)):
        half = row["loss_ci"] or 0.0
        heights = {"mark": 0.0, "top": half, "low": -half}
        for of, dx, dy, turned in PLACES:
            x, y = axis.transData.transform((row[key], row["loss"] + heights[of]))
            text = axis.annotate(
                row["method"],
                (x + aside * figure.dpi / 72, y),
                xycoords="figure pixels",
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                rotation=turned,
                fontsize=9,
                color=COLOURS[number % len(COLOURS)],
            )
            box = text.get_window_extent(renderer)
            inside = area.x0 <= box.x0 and area.y0 <= box.y0 and box.y1 <= area.y1
            if inside and box.x1 <= area.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            left_over = True
    if left_over:  # too crowded to name them all where they stand
        axis.legend(fontsize=8, loc="best")


def _ink(axis: Any, row: dict[str, Any], key: str, aside: float) -> list[Any]:
    """Boxes around a mark and its bars, in pixels."""
    from matplotlib.transforms import Bbox

    point = axis.figure.dpi / 72
    mean, half = row["loss"], row["loss_ci"] or 0.0
    x, y = axis.transData.transform((row[key], mean))
    _, low = axis.transData.transform((row[key], mean - half))
    _, top = axis.transData.transform((row[key], mean + half))
    x += aside * point
    return [
        Bbox.from_extents(x - 5 * point, y - 5 * point, x + 5 * point, y + 5 * point),
        Bbox.from_extents(x - 4 * point, low, x + 4 * point, top),
    ]
