"""Runs as a table on the terminal, and as a report in HTML and Markdown."""

from pathlib import Path

from scalepeft.analysis import rows
from scalepeft.analysis.report.load import Run, read_all
from scalepeft.core import text
from scalepeft.core.files import write_atomically, writing
from scalepeft.eval import scores

PLOTS = {name: f"report/{name}.png" for name in ("curves", "moved", "lengths")}
"""The Markdown's plots, beside it."""


def run(run_dirs: list[str], out: str | None = None, peft: str | None = None) -> None:
    """Print a table for each run; write the report to ``out`` (the run's folder, or ``report``), of
    one run loss.png too, and ``peft``. Raises UserError: one is no run, or cannot be written.
    """
    runs = read_all([Path(name) for name in run_dirs])
    if peft is not None:
        from scalepeft.analysis.report.peft_result import result

        _write(Path(peft).absolute(), result(runs))
    print("\n\n".join(map(table, runs)) + "\n")
    written = write(runs, Path(out) if out else None)
    if len(runs) == 1 and runs[0].newest:
        loss = runs[0].folder / "loss.png"
        _write(loss, (written[-1].parent / PLOTS["curves"]).read_bytes())
        print(f"loss curve: {loss}")
    print(f"report: {written[-1]} and {written[-2].name} beside it")


def write(runs: list[Run], out: Path | None = None) -> list[Path]:
    """Write report and plots; return the files, report.html last. Raises UserError: refused."""
    from scalepeft.analysis.report import render

    folder = out or (runs[0].folder if len(runs) == 1 else Path("report"))
    context = render.context(runs)
    files = {folder / file: context[name] for name, file in PLOTS.items() if context[name]}
    files[folder / "report.md"] = render.render(context, "markdown").encode()
    files[folder / "report.html"] = render.render(context, "html").encode()
    for file, content in files.items():
        _write(file, content)
    return list(files)


def _write(file: Path, content: bytes) -> None:
    with writing(file, "--out takes another folder, --peft-result another file"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)


def table(run: Run) -> str:
    """Return the run in figures: training, rows, then the scores of every evaluated task."""
    losses = [loss for loss in run.columns["loss"] if loss == loss]
    done = "no step yet"
    if run.newest:
        done = f"steps {run.newest['step']}, samples {run.newest['sample_index']}"
    steps, ranks = (", ".join(str(e[key]) for e in run.starts) for key in ("step", "world_size"))
    lines = [
        f"run {run.folder}",
        f"  {done}, starts {len(run.starts)} (at step {steps}), ranks {ranks}",
    ]
    if losses:
        lines.append(f"  training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if run.held_out:
        (step, first), (_, last) = run.held_out[0], run.held_out[-1]
        lines.append(f"  held-out loss {first:.3f} (step {step}) -> {last:.3f}")
    if run.skipped:
        lines.append(f"  steps skipped as not finite: {len(run.skipped)}")
    if spent := run.goodput:
        took = f"{text.duration(spent.steps)} of {text.duration(spent.wall)}"
        lines += [f"  goodput {spent.share:.1%}: {took} in steps that count"]
        lines += [f"    lost: {spent.losses()}"]
    lines += ["", *text.table(rows.cells(run.data))] if run.data else []
    table = [["model", "task", "step", "rows", "right", "95 % interval", "no answer"]]
    for one in run.evaluations:
        s, metric = one.scores, one.first[1]
        told = (s["count"], scores.shown(metric), scores.between(metric), s["no_answer_found"])
        table.append([one.which, one.task, s.get("step") or "-", *told])
    lines += ["", *text.table(table, left=2)] if run.evaluations else []
    return "\n".join([*lines, *(f"  not shown: {problem}" for problem in run.unscored)])
