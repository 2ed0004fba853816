"""A run as a person wants to see it: a table on stdout and the loss across restarts as a PNG."""

from pathlib import Path
from typing import Any

from scalepeft import scores
from scalepeft.goodput import duration, goodput
from scalepeft.lookup import UserError
from scalepeft.records import read_lines


def run(run_dir: str) -> None:
    """Prints the run's table and writes ``RUN_DIR/loss.png``.

    Raises:
        UserError: no run there, nothing trained yet, or the plot cannot be written.
    """
    folder = Path(run_dir)
    metrics = read_lines(folder / "metrics.jsonl", "step", "loss", "sample_index")
    if not metrics:
        raise UserError(
            f"{run_dir}: no metrics.jsonl with a step in it; name the run_dir of a training"
        )
    events = read_lines(folder / "events.jsonl", "event", "step", "world_size")
    starts = [e for e in events if e["event"] == "start"]
    print(table(folder, metrics, starts))
    try:
        print(f"\nloss curve: {plot(folder, metrics, starts)}")
    except OSError as error:
        raise UserError(f"{folder}/loss.png: cannot be written: {error.strerror}") from None


def table(folder: Path, metrics: list[dict[str, Any]], starts: list[dict[str, Any]]) -> str:
    """The run in figures: training, then base and tuned scores of every evaluated task."""
    losses = [r["loss"] for r in metrics if r["loss"] is not None]
    held_out = _held_out(folder)
    lines = [
        f"run {folder}",
        (
            f"  steps {metrics[-1]['step']}, samples {metrics[-1]['sample_index']}, starts"
            f" {len(starts)} (at step {', '.join(str(e['step']) for e in starts)}), ranks"
            f" {', '.join(str(e['world_size']) for e in starts)}"
        ),
    ]
    if losses:
        lines.append(f"  training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if held_out:
        lines.append(
            f"  held-out loss {held_out[0]['loss']:.3f} (step {held_out[0]['step']}) ->"
            f" {held_out[-1]['loss']:.3f}"
        )
    skipped = len(metrics) - len(losses)
    if skipped:
        lines.append(f"  steps skipped as not finite: {skipped}")
    spent = goodput(folder)
    if spent:
        lines += [
            (
                f"  goodput {spent.share:.1%}: {duration(spent.steps)} of"
                f" {duration(spent.wall)} in steps that count"
            ),
            f"    lost: {spent.losses()}",
        ]
    rows = [
        (which, path.parent.name, scores.read(path))
        for which, sub in (("base", "eval-base"), ("tuned", "eval"), ("merged", "eval-merged"))
        for path in sorted((folder / sub).glob("*/scores.json"))
    ]
    if rows:
        lines += [
            "",
            (
                f"  {'model':<8}{'step':>6}  {'task':<14}{'rows':>6}{'right':>8}"
                f"{'95 % interval':>18}{'no answer':>11}"
            ),
        ]
    for which, task, s in rows:
        metric = s["metrics"][s["headline"]]
        lines.append(
            f"  {which:<8}{s.get('step') or '-':>6}  {task:<14}{s['count']:>6}"
            f"{scores.shown(metric):>8}{scores.between(metric):>18}{s['no_answer_found']:>11}"
        )
    return "\n".join(lines)


def _held_out(folder: Path) -> list[dict[str, Any]]:
    rows = read_lines(folder / "validation.jsonl", "step", "loss")
    return [row for row in rows if row["loss"] is not None]


def plot(folder: Path, metrics: list[dict[str, Any]], starts: list[dict[str, Any]]) -> Path:
    """Draws loss and held-out loss over steps, with a line at every restart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    steps = [r["step"] for r in metrics if r["loss"] is not None]
    axes.plot(
        steps, [r["loss"] for r in metrics if r["loss"] is not None], lw=1.2, label="training"
    )
    held_out = _held_out(folder)
    if held_out:
        axes.plot(
            [r["step"] for r in held_out],
            [r["loss"] for r in held_out],
            "o-",
            ms=4,
            label="held out",
        )
    for i, event in enumerate(starts[1:]):
        label = "stopped and resumed" if i == 0 else None
        axes.axvline(event["step"] + 0.5, color="tab:red", ls="--", lw=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per label token (nats)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{folder.name}: {metrics[-1]['step']} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    target = folder / "loss.png"
    figure.savefig(target)
    plt.close(figure)
    return target
