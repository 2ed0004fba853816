"""How plots are drawn: each as SVG that follows light and dark, and as PNG on white.

Both are drawn in the light colours; in the SVG these then become CSS variables of the page. Colours
are Okabe and Ito's, told apart by colour-blind readers.
"""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scalepeft.analysis.report.blocks import Picture, visible

matplotlib.use("Agg")

SERIES = {
    "c0": ("#0072b2", "#56b4f0"), "c1": ("#d55e00", "#f58b45"), "c2": ("#009e73", "#35c49b"),
    "c3": ("#b65a94", "#e39cc8"), "c4": ("#c98500", "#f0b840"), "c5": ("#3f9fd0", "#9bd3f5"),
    "c6": ("#6b6b6b", "#a8a8a8"), "c7": ("#b9b9b9", "#606468"),
}  # fmt: skip
COLOURS = {
    "ink": ("#1b1f24", "#e6e8ea"), "grid": ("#d8dce0", "#3a3f45"), "paper": ("#ffffff", "#14171a"),
    **SERIES,
}  # fmt: skip
"""CSS variable -> (light, dark)."""
PAPER = {name: light for name, (light, _) in COLOURS.items()}
VARIABLES = {light: name for name, light in PAPER.items()}
POINTS = 600  # of a curve, at most: what a screen shows
LINES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.fontsize": 10, "legend.edgecolor": "none",
    "legend.facecolor": PAPER["paper"], "axes.spines.top": False,
    "axes.spines.right": False, "svg.fonttype": "none", "text.parse_math": False,
    "figure.constrained_layout.use": True, "axes.axisbelow": True,
}  # fmt: skip
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


def line(i: int) -> tuple[str, str]:
    """Colour and line style of the i-th run."""
    return PAPER[f"c{i % 6}"], LINES[i // 6 % len(LINES)]


def picture(name: str, alt: str, draw: Callable[[], Figure], caption: str = "") -> Picture:
    """Draws a plot for the page and for paper."""
    colours: dict[Any, Any] = dict.fromkeys(INKED, PAPER["ink"])
    colours |= {"grid.color": PAPER["grid"], "svg.hashsalt": name}
    svg, png = io.StringIO(), io.BytesIO()
    with plt.rc_context({**STYLE, **colours}):
        figure = draw()
        figure.draw_without_rendering()  # the layout is found once
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        plt.close(figure)
    return Picture(name, alt, _inline(svg.getvalue(), name, alt), png.getvalue(), caption)


def _inline(svg: str, name: str, alt: str) -> str:
    """The svg element alone, with ids of its own and CSS variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(VARIABLES), lambda m: f"var(--{VARIABLES[m[0]]})", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(visible(alt))}" ', 1)


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Centred mean over a fortieth of the values; what is not finite counts for nothing.

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


def extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thins a curve to ``POINTS`` so that no peak is lost: the least and the greatest of each
    stretch.
    """
    kept = np.flatnonzero(np.isfinite(y))
    if len(kept) <= POINTS:
        return x[kept], y[kept]
    parts = np.array_split(kept, POINTS // 2)
    found = sorted({i for p in parts for i in (p[np.argmin(y[p])], p[np.argmax(y[p])])})
    return x[found], y[found]


def thinned(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Every so many values, and the last."""
    every = max(1, -(-len(values) // points))
    return np.unique([*range(0, len(values), every), len(values) - 1])


def medians(x: np.ndarray, y: np.ndarray, parts: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Medians of stretches of a curve."""
    kept = np.flatnonzero(np.isfinite(y))
    found = np.array_split(kept, min(parts, len(kept))) if len(kept) else []
    return np.array([x[p].mean() for p in found]), np.array([np.median(y[p]) for p in found])


def legend(axes: Axes, **more: Any) -> None:
    """A legend whose labels are shown whatever they begin with."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, **more)


def label(name: str) -> str:
    """A run's name as a legend takes it: short, and not hidden for its leading underscore."""
    name = visible(name)
    short = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
    return f" {short}" if short.startswith("_") else short
