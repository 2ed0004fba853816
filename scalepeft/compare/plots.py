"""The picture of a comparison: held-out loss against trained parameters, and against time."""

import itertools
import math
from pathlib import Path
from typing import Any

from scalepeft.compare.design import Design

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666",
    "#A5AA00", "#882255",
)  # fmt: skip
MARKERS = "osD^vPX*<>"
# Where a name may stand, in points from its mark: near places first.
PLACES = [
    (round(r * math.cos(a)), round(r * math.sin(a)))
    for r in (11, 20, 32, 46)
    for a in (math.pi * k / 4 for k in (0, 4, 1, 7, 3, 5, 2, 6))
]


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
        axis.set_xlabel(labels[key])
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss per label token (nats), lower is better")
    axes[1].tick_params(labelleft=True)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    n = len(design.seeds)
    spread = f"mean of {n} seeds, bars: 95 % interval" if n > 1 else "1 seed"
    figure.suptitle(f"{_subject(design)}: {spread}", fontsize=11, y=0.985)
    figure.text(0.5, 0.925, f"budget: {result['budget']}", ha="center", fontsize=8.5)
    figure.text(
        0.5,
        0.012,
        f"{' and '.join(result['devices'])}, torch {result['versions']['torch']}, {result['date']}",
        ha="center",
        fontsize=7.5,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.925))
    for axis, key, aside in zip(axes, labels, asides, strict=True):
        _name_all(figure, axis, rows, key, aside)
    figure.savefig(target)
    plt.close(figure)


def _subject(design: Design) -> str:
    model, data = design.values["model"]["path"], design.values["data"]["name"]
    parts = [p for p in Path(model).parts if p not in ("hf", "/")]
    return f"{data} on {parts[-1] if parts else model}"


def _apart(values: list[float]) -> list[float]:
    """Points to move marks aside by, where several have the same value to 2 %."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    for _, group in itertools.groupby(order, key=lambda i: round(math.log(values[i]) / 0.02)):
        same = list(group)
        for k, i in enumerate(same):
            found[i] = 9.0 * (k - (len(same) - 1) / 2)
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
        transform=moved,
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
        x, y = axis.transData.transform((row[key], row["loss"]))
        x += aside * figure.dpi / 72
        for dx, dy in PLACES:
            text = axis.annotate(
                row["method"],
                (x, y),
                xycoords="figure pixels",
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 2 else "right" if dx < -2 else "center",
                va="bottom" if dy > 2 else "top" if dy < -2 else "center",
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
