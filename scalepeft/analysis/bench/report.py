"""What a benchmark found: medians and ratios, as a table, JSON and a picture."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalepeft.run.provenance import device_name, versions

MIB = 2**20
REFERENCE = "peft-lora"
COLOURS = {"scalepeft": "tab:blue", "peft": "tab:orange", "base": "tab:gray"}


def ratio(times: list[float], reference: list[float]) -> float:
    """Median over rounds of time / reference in the same round."""
    return statistics.median(t / r for t, r in zip(times, reference, strict=False))


def spread(times: list[float]) -> float:
    """Interquartile range; 0 for a single time."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def header(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "options": options,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": "forward, backward, AdamW; peak: above what is held between steps",
    }


def headline(result: dict[str, Any]) -> str:
    """Two lines above the tables."""
    o = result["options"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"bench {o['what']} {o['shape']}: {o['tokens']} tokens, rank {o['rank']}, {o['precision']},"
        f" quant {o['quant']}; {result['device']}, {result['threads']} threads, {result['date']}\n"
        f"{versions}"
    )


def summary(
    title: str, entries: list[Any], neighbours: Callable[[str], list[str]]
) -> dict[str, Any]:
    """Figures of one case; times in milliseconds, ratios over the rounds that both ran."""
    times = {e.label: e.times for e in entries if e.times}

    def against(label: str, other: str) -> float | None:
        there = label in times and other in times
        return ratio(times[label], times[other]) if there else None

    rounds = max(len(t) for t in times.values())
    rows = [
        {
            "label": e.label,
            "family": e.family,
            "settings": e.settings,
            "reason": e.reason,
            "parameters": e.parameters,
            "times_ms": [1e3 * t for t in e.times],
            "median_ms": 1e3 * statistics.median(e.times) if e.times else None,
            "iqr_ms": 1e3 * spread(e.times) if e.times else None,
            "limited": 0 < len(e.times) < rounds,
            "x_peft_lora": against(e.label, REFERENCE),
            "x_base": against(e.label, "base"),
            "x_neighbours": {n: against(e.label, n) for n in neighbours(e.label)},
            "saved_bytes": e.saved,
            "peak_bytes": e.peak,
        }
        for e in entries
    ]
    base = times["base"]
    return {"title": title, "noise": spread(base) / statistics.median(base), "entries": rows}


def table(case: dict[str, Any]) -> str:
    """One line an entry."""
    lines = [
        "",
        f"{case['title']}; noise (interquartile range of base's times) {case['noise']:.1%}",
        f"{'':<16}{'parameters':>12}{'ms':>10}{'x peft-lora':>13}{'x base':>8}"
        f"{'saved MiB':>11}{'peak MiB':>10}  x PEFT's neighbour",
    ]
    for row in case["entries"]:
        if row["reason"]:
            lines.append(f"{row['label']:<16}{'n/a':>12}  {row['reason']}")
            continue
        near = ", ".join(
            f"{n.removeprefix('peft-')} {'n/a' if x is None else format(x, '.2f')}"
            for n, x in row["x_neighbours"].items()
        )
        limited = f" ({len(row['times_ms'])} rounds)" if row["limited"] else ""
        x = "n/a" if row["x_peft_lora"] is None else f"{row['x_peft_lora']:.2f}"
        lines.append(
            f"{row['label']:<16}{row['parameters']:>12,}{row['median_ms']:>10.1f}{x:>13}"
            f"{row['x_base']:>8.2f}{row['saved_bytes'] / MIB:>11.1f}"
            f"{row['peak_bytes'] / MIB:>10.1f}  {near}{limited}".rstrip()
        )
    return "\n".join(lines)


def write(result: dict[str, Any], folder: Path) -> str:
    """Writes ``bench.json`` and ``bench.png``; returns the line that says where."""
    text = json.dumps(result, indent=1) + "\n"
    (folder / "bench.json").write_text(text, encoding="utf-8")
    plot(result, folder / "bench.png")
    return f"\nwrote {folder / 'bench.json'} and {folder / 'bench.png'}"


def plot(result: dict[str, Any], target: Path) -> None:
    """Horizontal bars of the time over that of PEFT's LoRA, or of the base where that is n/a."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = result["cases"]
    measured = [[r for r in case["entries"] if r["median_ms"] is not None] for case in cases]
    heights = [0.8 + 0.24 * len(rows) for rows in measured]
    figure, axes = plt.subplots(
        len(cases), figsize=(8, 1 + sum(heights)), dpi=120, squeeze=False, height_ratios=heights
    )
    o = result["options"]
    for axis, case, rows in zip(axes[:, 0], cases, measured, strict=True):
        has_lora = all(r["x_peft_lora"] is not None for r in rows)
        key, name = ("x_peft_lora", "PEFT's LoRA") if has_lora else ("x_base", "the frozen base")
        rows = sorted(rows, key=lambda r: r[key])
        limit = 3.0 * max(1.0, min(r[key] for r in rows))
        for place, row in enumerate(rows):
            width = min(row[key], limit)
            axis.barh(place, width, color=COLOURS[row["family"]])
            axis.text(width, place, f" {row[key]:.2f}", va="center", fontsize=8)
        base = next(r[key] for r in rows if r["label"] == "base")
        axis.axvline(base, color="black", ls="--", lw=0.8)
        axis.axvline(1, color="black", lw=0.8)
        axis.set_yticks(range(len(rows)), [r["label"] for r in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, limit * 1.1)
        axis.set_xlabel(f"time of a step / that of {name} (dashed: the base; cut at {limit:.0f})")
        axis.set_title(case["title"], fontsize=9)
    colours = {"scalepeft": "ours", "peft": "HF PEFT", "base": "frozen base"}
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[k]) for k in colours]
    axes[0, 0].legend(patches, colours.values(), fontsize=8, loc="upper right")
    figure.suptitle(
        f"{o['what']} {o['shape']}, {o['tokens']} tokens, rank {o['rank']}, {o['precision']},"
        f" quant {o['quant']}\n{result['device']}, {result['date'][:10]}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)
