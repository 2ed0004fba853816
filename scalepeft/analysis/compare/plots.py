"""The picture of a comparison: held-out loss against trained parameters, and against time."""

from pathlib import Path
from typing import Any

from scalepeft.analysis.compare.design import Design

MARKERS = "osD^vPX*<>"
APART = 10.0  # between the marks of methods of one size, in points


def plot(result: dict[str, Any], design: Design, target: Path) -> None:
    """Draw the methods that have a result; bars are 95 % intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker
    from matplotlib.transforms import ScaledTranslation

    rows = sorted((r for r in result["methods"] if "loss" in r), key=lambda r: r["loss"])
    sizes = [r["parameters"] for r in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), dpi=130, sharey=True, layout="constrained")
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(ticker.LogLocator(10, (1, 2, 5)))
    axes[0].xaxis.set_major_formatter(ticker.EngFormatter())
    axes[0].xaxis.set_minor_formatter(ticker.NullFormatter())
    asides = {"parameters": _apart(sizes), "seconds": [0.0] * len(rows)}
    for axis, (key, shifts) in zip(axes, asides.items(), strict=True):
        for i, (row, shift) in enumerate(zip(rows, shifts, strict=True)):
            moved = ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
            axis.errorbar(
                row[key],
                row["loss"],
                yerr=row["loss_ci"],
                fmt=MARKERS[i % len(MARKERS)],
                color=plt.colormaps["tab10"](i % 10),
                capsize=3,
                label=row["method"],
                transform=axis.transData + moved,
            )
            half = row["loss_ci"] or 0.0
            axis.update_datalim([(row[key], row["loss"] + sign * half) for sign in (-1, 1)])
        axis.margins(0.15)
        axis.autoscale_view()
        axis.grid(alpha=0.25)
    axes[0].set_xlim(min(sizes) / 2, max(sizes) * 2)
    beside = ", equal ones side by side" if any(asides["parameters"]) else ""
    axes[0].set_xlabel("trained parameters" + beside)
    axes[0].set_ylabel("held-out loss per label token (nats), lower is better")
    axes[1].set_xlabel("seconds of training")
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


def _apart(values: list[int]) -> list[float]:
    """Return points to move marks aside by, so that those of nearly one size stand in a row."""
    groups: list[list[int]] = []
    for i in sorted(range(len(values)), key=values.__getitem__):
        if groups and values[i] < 1.2 * values[groups[-1][-1]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    middles = {i: place - (len(g) - 1) / 2 for g in groups for place, i in enumerate(g)}
    return [APART * middles[i] for i in range(len(values))]
