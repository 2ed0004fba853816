"""A run on the terminal: a table, and the loss across restarts as a PNG."""

from pathlib import Path
from typing import Any

from scalepeft.analysis.report.facts import evaluations_of, number
from scalepeft.core.files import read_lines
from scalepeft.core.text import duration
from scalepeft.eval import scores
from scalepeft.run.goodput import goodput


def table(folder: Path, metrics: list[dict[str, Any]], starts: list[dict[str, Any]]) -> str:
    """The run in figures: training, then base and tuned scores of every evaluated task."""
    losses = [v for v in (number(r["loss"]) for r in metrics) if v == v]
    held_out = _held_out(folder)
    done = "no step yet"
    if metrics:
        done = f"steps {metrics[-1]['step']}, samples {metrics[-1]['sample_index']}"
    lines = [
        f"run {folder}",
        (
            f"  {done}, starts {len(starts)} (at step"
            f" {', '.join(str(e['step']) for e in starts)}), ranks"
            f" {', '.join(str(e['world_size']) for e in starts)}"
        ),
    ]
    if losses:
        lines.append(f"  training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if held_out:
        lines.append(
            f"  held-out loss {held_out[0][1]:.3f} (step {held_out[0][0]}) -> {held_out[-1][1]:.3f}"
        )
    skipped = len(metrics) - len(losses)
    if skipped:
        lines.append(f"  steps skipped as not finite: {skipped}")
    spent = goodput(folder)
    if spent and spent.wall > 0:
        lines += [
            (
                f"  goodput {spent.share:.1%}: {duration(spent.steps)} of"
                f" {duration(spent.wall)} in steps that count"
            ),
            f"    lost: {spent.losses()}",
        ]
    return "\n".join([*lines, *_scores(folder)])


def _scores(folder: Path) -> list[str]:
    found, problems = evaluations_of(folder)
    lines = []
    if found:
        lines += [
            "",
            (
                f"  {'model':<8}{'step':>6}  {'task':<14}{'rows':>6}{'right':>8}"
                f"{'95 % interval':>18}{'no answer':>11}"
            ),
        ]
    for one in found:
        s, metric = one.scores, one.metric
        lines.append(
            f"  {one.which:<8}{s.get('step') or '-':>6}  {one.task:<14}{s['count']:>6}"
            f"{scores.shown(metric):>8}{scores.between(metric):>18}{s['no_answer_found']:>11}"
        )
    return [*lines, *(f"  not shown: {problem}" for problem in problems)]


def _held_out(folder: Path) -> list[tuple[int, float]]:
    rows = read_lines(folder / "validation.jsonl", "step", "loss")
    pairs = [(row["step"], number(row["loss"])) for row in rows]
    return [(step, loss) for step, loss in pairs if loss == loss]


def plot(folder: Path, metrics: list[dict[str, Any]], starts: list[dict[str, Any]]) -> Path:
    """Draws loss and held-out loss over steps, with a line at every restart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    pairs = [(r["step"], number(r["loss"])) for r in metrics]
    pairs = [pair for pair in pairs if pair[1] == pair[1]]
    axes.plot([s for s, _ in pairs], [v for _, v in pairs], lw=1.2, label="training")
    held_out = _held_out(folder)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", ms=4, label="held out")
    for i, event in enumerate(starts[1:]):
        label = "stopped and resumed" if i == 0 else None
        axes.axvline(event["step"] + 0.5, color="tab:red", ls="--", lw=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per label token (nats)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{folder.name}: {metrics[-1]['step']} steps", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    target = folder / "loss.png"
    figure.savefig(target)
    plt.close(figure)
    return target
