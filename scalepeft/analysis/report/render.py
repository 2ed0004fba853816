"""The report of runs as one plain context, written as HTML and as Markdown by one template.

All texts in the context are plain. What a template writes of them is escaped unless it is marked,
and control characters are made visible.
"""

import base64
import re
import time
from functools import partial
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scalepeft.analysis.report import figures, provenance, scores
from scalepeft.analysis.report.examples import examples
from scalepeft.analysis.report.load import Run, same_rows
from scalepeft.core.text import duration, visible
from scalepeft.eval.scores import between
from scalepeft.eval.scores import shown as score


def render(context: dict[str, Any], form: str) -> str:
    """Return the report as one ``html`` file without script and network, or as ``markdown`` with
    its plots as PNGs beside it.
    """
    text = {"html": visible, "markdown": line}[form]
    environment = Environment(
        loader=PackageLoader("scalepeft.analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else text(str(value)),
    )
    environment.filters |= {"fenced": fenced, "base64": _base64}
    return environment.get_template("report.j2").render(context, form=f"{form}.j2").strip() + "\n"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def line(value: str) -> Markup:
    """Return any text as one line of Markdown: neither markup nor HTML."""
    text = escape(" ".join(visible(value).split()), quote=False)
    text = re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", text)
    return Markup(re.sub(r"^(\d*)([-+.)])(?= )", r"\1\\\2", text))


def fenced(value: str) -> Markup:
    """Return text between fences that are longer than any within it."""
    text = visible(value)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{text}\n{fence}")


def context(runs: list[Run]) -> dict[str, Any]:
    """Return what the templates write: texts, lists, tables (their head first) and plots."""
    one, names = len(runs) == 1, ", ".join(run.name for run in runs)
    places = ", ".join(str(run.folder) for run in runs)
    summary: dict[str, Any] = _one(runs[0]) if one else {"cards": [], "table": _several(runs)}
    problems = [p if one else f"{run.name}: {p}" for run in runs for p in run.problems]
    summary["warnings"] = [*summary.get("warnings", ()), *problems]
    return {
        "title": runs[0].name if one else f"{len(runs)} runs: {names}",
        "subtitle": f"scalepeft report of {places}, as of {time.strftime('%Y-%m-%d %H:%M %Z')}",
        "summary": summary,
        "tasks": scores.tasks(runs),
        "training": _training(runs),
        "time": _time(runs),
        "settings": provenance.settings(runs),
        "examples": examples(runs),
        "origins": [provenance.origin(run) for run in runs],
    }


def pictures(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all plots of a context, in their order."""
    plots = [task["picture"] for task in made["tasks"]]
    return plots + made["training"]["pictures"] + made["time"]["pictures"]


def _several(runs: list[Run]) -> list[list[str]]:
    """The runs beside each other."""
    head = ["run", "method", "base", "status", "step", "score", "held-out loss", "wall time"]
    rows = [head]
    for run in runs:
        tuned = scores.subject(run, "tuned", "merged")
        rows.append(
            [
                run.name,
                provenance.method_of(run),
                provenance.base_of(run, short=True),
                run.status["state"],
                provenance.step_of(run),
                scores.with_interval(tuned.first[1]) if tuned else "not evaluated",
                f"{run.held_out[-1][1]:.3f}" if run.held_out else "–",
                duration(run.goodput.wall) if run.goodput else "–",
            ]
        )
    return rows


def _one(run: Run) -> dict[str, Any]:
    """The figures that a reader looks for first, as (label, value, note), and what they say."""
    cards: list[tuple[str, str, str]] = []
    tuned, base = scores.subject(run, "tuned", "merged"), scores.subject(run, "base")
    for e in [e for e in (tuned, base) if e]:
        name, metric = e.first
        note = f"95 % interval {between(metric)}, {e.scores['count']:,} rows"
        if "mean" in e.scores:
            note += f"; over all rows {score(e.scores['metrics'][e.scores['headline']])}"
        elif mean := e.means.get(name):
            note += f"; mean of {len(e.scores['sources'])} sources {mean}"
        cards.append((f"{name}, {e.which}", score(metric), note))
    if run.held_out:
        (first, begin), (last, end) = run.held_out[0], run.held_out[-1]
        cards.append(
            ("Held-out loss", f"{end:.3f}", f"at step {last}; {begin:.3f} at step {first}")
        )
    if run.goodput:
        spent = f"of {duration(run.goodput.wall)} went into steps that count"
        cards.append(("Goodput", f"{run.goodput.share:.0%}", spent))
    state = run.status["state"].partition(",")[0]
    cards.append(("Status", state, f"step {provenance.step_of(run)}"))
    said, warnings = "", list[str]()
    if tuned and base and tuned.task == base.task:
        said, warnings = scores.verdict(tuned, base)
    table = [["", ""], *provenance.about(run)]
    return {"cards": cards, "remarks": [said] if said else [], "warnings": warnings, "table": table}


def _training(runs: list[Run]) -> dict[str, Any]:
    trained = [run for run in runs if run.metrics]
    remarks = [f"{run.name}: no step was made yet." for run in runs if not run.metrics]
    warnings, plots = [], []
    if trained:
        note = "Dashed lines: the run was stopped or killed and resumed."
        note = note if len(runs) == 1 else "Dots: held-out loss. Ticks: restarts."
        alt = "loss and tokens a second over steps"
        plots.append(figures.picture("curves", alt, partial(figures.curves, trained), note))
        alt = "learning rate and gradient norm"
        plots.append(figures.picture("rates", alt, partial(figures.rates, trained)))
    if len(trained) > 1 and not same_rows(trained):
        text = "The runs have other training or held-out rows, prompts or lengths than each other:"
        warnings.append(f"{text} their losses must not be compared.")
    for run, steps in [(run, run.skipped) for run in trained if run.skipped]:
        listed = ", ".join(map(str, steps[:10])) + (", …" if len(steps) > 10 else "")
        text = f"{run.name}: {len(steps):,} steps were skipped because loss or gradient was not"
        warnings.append(f"{text} finite (step {listed}).")
    return {"remarks": remarks, "warnings": warnings, "pictures": plots}


def _time(runs: list[Run]) -> dict[str, Any]:
    """What took how long: a line each, a column a run."""
    text = "no figures: no step was made yet, or its records are older than them."
    remarks = [f"{run.name}: {text}" for run in runs if not run.goodput]
    known = {run.name: run.goodput for run in runs if run.goodput}
    if not known:
        return {"remarks": remarks, "pictures": [], "table": []}
    table = [["", *known]]
    for name, (key, _) in figures.SHARES.items():
        took = [(getattr(spent, key), spent.wall) for spent in known.values()]
        table.append([name, *(f"{duration(t)} ({t / wall:.1%})" for t, wall in took)])
    table.append(["wall time", *(duration(spent.wall) for spent in known.values())])
    plot = figures.picture("goodput", "shares of wall time", partial(figures.wall_time, known))
    return {"remarks": remarks, "pictures": [plot], "table": table}
