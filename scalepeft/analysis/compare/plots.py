"""The picture of a comparison: held-out loss against trained parameters, and against time."""

from pathlib import Path
from typing import Any

from scalepeft.analysis.compare.design import Design

MARKERS = "osD^vPX*<>"


def plot(result: dict[str, Any], design: Design, target: Path) -> None:
    """Draw the methods that have a result; bars are 95 % intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    rows = sorted((r for r in result["methods"] if "loss" in r), key=lambda r: r["loss"])
    labels = {
        "parameters": "trained parameters, equal ones side by side",
        "seconds": "seconds of training",
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), dpi=130, sharey=True, layout="constrained")
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(ticker.LogLocator(10, (1, 2, 5)))
    axes[0].xaxis.set_major_formatter(ticker.EngFormatter())
    axes[0].xaxis.set_minor_formatter(ticker.NullFormatter())
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        xs = [r[key] for r in rows]
        if key == "parameters":
            xs = side_by_side(xs)
            axis.set_xlim(min(xs) / 2, max(xs) * 2)
        for i, (row, x) in enumerate(zip(rows, xs, strict=True)):
            look = {"fmt": MARKERS[i % len(MARKERS)], "color": plt.colormaps["tab10"](i % 10)}
            axis.errorbar(x, row["loss"], row["loss_ci"], capsize=3, label=row["method"], **look)
        axis.margins(0.15)
        axis.grid(alpha=0.25)
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out loss per label token (nats), lower is better")
    axes[1].legend()
    n, values = len(design.seeds), design.values
    spread = f"mean of {n} seeds, bars: 95 % interval" if n > 1 else "1 seed"
    figure.suptitle(
        f"{values['data']['name']} on {values['model']['path']}: {spread}\nbudget:"
        f" {result['budget']}\n{' and '.join(result['devices'])}, torch"
        f" {result['versions']['torch']}, {result['date']}",
        fontsize=9,
    )
    figure.savefig(target)
    plt.close(figure)


def side_by_side(sizes: list[int]) -> list[float]:
    """Return places on a logarithmic axis, equal sizes in a row: each 3 % of the axis apart."""
    apart = (4 * max(sizes) / min(sizes)) ** 0.03
    places: dict[int, float] = {}
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        places[i] = max(sizes[i], apart * max(places.values(), default=0))
    return [places[i] for i in range(len(sizes))]
