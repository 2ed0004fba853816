"""The report of runs, as HTML and Markdown by one template; what is not marked is escaped."""

import base64
import re
import time
from functools import partial
from html import escape
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scalepeft.analysis.report import figures, provenance, scores
from scalepeft.analysis.report.load import Run, same_rows
from scalepeft.analysis.rows import cells
from scalepeft.core.text import duration, visible
from scalepeft.eval.scores import between, shown


def context(runs: list[Run]) -> dict[str, Any]:
    """Return what the template writes: the runs, and what is drawn and chosen of them."""
    trained = [run for run in runs if run.newest]
    data = runs[0].data if len(runs) == 1 else {}
    return {
        "runs": runs,
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "curves": figures.png(partial(figures.curves, trained)) if trained else b"",
        "moved": figures.png(partial(figures.moved, runs)) if any(r.moved for r in runs) else b"",
        "data": data,
        "lengths": figures.png(partial(figures.lengths, data)) if data else b"",
        "tasks": scores.tasks(runs),
        "same_rows": len(trained) < 2 or same_rows(trained),
        "settings": provenance.settings(runs),
        "examples": scores.examples(runs),
    }


def render(context: dict[str, Any], form: str) -> str:
    """The report as one ``html`` file without network, or ``markdown`` with its plots beside it."""
    text = {"html": visible, "markdown": line}[form]
    environment = Environment(
        loader=PackageLoader("scalepeft.analysis.report"),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else text(str(value)),
    )
    dump = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    environment.filters |= {
        "fenced": fenced, "duration": duration, "yaml": dump, "shown": shown, "between": between,
        "base64": lambda content: base64.b64encode(content).decode(),
    }  # fmt: skip
    environment.globals.update(scores=scores, provenance=provenance, cells=cells)
    return environment.get_template("report.j2").render(context, form=f"{form}.j2").strip() + "\n"


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
