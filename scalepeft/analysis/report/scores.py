"""Every score of the runs: a plot and a table for each task, tuned against base, what departs."""

from functools import partial
from typing import Any

from scalepeft.analysis.report import figures
from scalepeft.analysis.report.examples import rows_of, source_of
from scalepeft.analysis.report.load import Evaluation, Run, not_comparable
from scalepeft.analysis.report.provenance import shown
from scalepeft.core.stats import paired_difference
from scalepeft.eval import scores

COMET = "COMET"

Found = list[tuple[Run, Evaluation]]


def with_interval(metric: dict[str, Any]) -> str:
    """Return a metric's value and interval as text."""
    return f"{scores.shown(metric)} ({scores.between(metric)})"


def subject(run: Run, *kinds: str) -> Evaluation | None:
    """Return the first evaluation of the first of these kinds that there is."""
    return next((e for kind in kinds for e in run.evaluations if e.which == kind), None)


def tasks(runs: list[Run]) -> list[dict[str, Any]]:
    """Return name, plot, tables, warnings and remarks of each task."""
    one, listed = len(runs) == 1, []
    for task in dict.fromkeys(e.task for run in runs for e in run.evaluations):
        found = [(run, e) for run in runs for e in run.evaluations if e.task == task]
        title = f"{task}: {found[0][1].scores['headline']} with 95 % intervals"
        plot = partial(figures.intervals, title, _plotted(found, one))
        plots = {"picture": figures.picture(f"scores-{task}", title, plot)}
        tables = {"table": _by_source(found, one), "every_source": None}
        if not one:
            tables = {"table": _by_run(found), "every_source": tables["table"]}
        listed.append({"name": task, **plots, **tables, **_notes(found, one)})
    return listed


def _notes(found: Found, one: bool) -> dict[str, list[str]]:
    remarks, warnings = [], []
    for run, e in () if one else found[1:]:
        if wrong := not_comparable(found[0][1], e):
            first = f"{found[0][0].name}, {found[0][1].which}"
            text = f"{run.name}, {e.which}: differs from {first}, in {', '.join(wrong)}"
            warnings.append(f"{text}: not to be compared.")
    for run, e in found:
        mark = e.which if one else f"{run.name}, {e.which}"
        if cut := e.scores.get("prompts_cut"):
            remarks.append(f"{mark}: {cut:,} prompts were too long and lost their beginning.")
        for key, (was, now) in e.scores["deviations"].items():
            text = f"{mark}: departs from protocol {e.scores.get('protocol')}: {key} is"
            warnings.append(f"{text} {shown(now)}, not {shown(was)}.")
    for _, e in found:
        metrics = e.scores["metrics"].items()
        remarks += [f"{name}: {m['signature']}" for name, m in metrics if m.get("signature")]
    for held in [e.comet for _, e in found if e.comet]:
        version = held.get("version")  # of results that an older scalepeft wrote
        told = f", unbabel-comet {version}" if version else ""
        remarks.append(f"{COMET}: {held['model']}{told}")
    return {"remarks": list(dict.fromkeys(remarks)), "warnings": warnings}


def _plotted(found: Found, one: bool) -> figures.Rows:
    name = found[0][1].scores["headline"]

    def line(parts: list[tuple[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        return [(w, p["metrics"][name]) for w, p in parts if p and name in p["metrics"]]

    if not one:
        names = dict.fromkeys(run.name for run, _ in found)
        return [(n, line([(e.which, e.scores) for r, e in found if r.name == n])) for n in names]
    sources = _sources(found)
    rows = [(s, line([(e.which, e.scores["sources"].get(s)) for _, e in found])) for s in sources]
    rows.append(("all rows", line([(e.which, e.scores) for _, e in found])))
    if means := [(e.which, e.scores["mean"]) for _, e in found if "mean" in e.scores]:
        rows.append((f"mean of {len(sources)}", means))
    return rows


def _sources(found: Found) -> list[str]:
    """All sources, where there are several."""
    names = list(dict.fromkeys(s for _, e in found for s in e.scores["sources"]))
    return names if len(names) > 1 else []


def _metrics(found: Found) -> list[str]:
    names = list(dict.fromkeys(m for _, e in found for m in e.scores["metrics"]))
    return [*names, COMET] if any("bleu" in name.lower() for name in names) else names


def _cells(e: Evaluation, names: list[str], source: str | None = None) -> list[str]:
    """Rows, metrics and missing answers over a source, or over all rows."""
    part = e.scores if source is None else e.scores["sources"][source]
    held = {name: with_interval(metric) for name, metric in part["metrics"].items()}
    held[COMET] = e.comet["texts_of"].get(source, "–") if e.comet else "not computed"
    values = [held.get(name, "–") for name in names]
    return [f"{part['count']:,}", *values, f"{part['no_answer_found']:,}"]


def _by_source(found: Found, one: bool) -> dict[str, Any]:
    """A row for each source and subject, then over all rows, then the unweighted mean."""
    names = _metrics(found)
    every = [(e, e.which if one else f"{run.name}, {e.which}") for run, e in found]
    rows = [
        [source, who, *_cells(e, names, source)]
        for source in _sources(found)
        for e, who in every
        if source in e.scores["sources"]
    ]
    rows += [["all rows", who, *_cells(e, names)] for e, who in every]
    for e, who in every:
        if means := e.means:
            text = f"unweighted mean of {len(e.scores['sources'])} sources"
            rows.append([text, who, "", *(means.get(name, "") for name in names), ""])
    return _table(["source", "model"], names, [], rows)


def _by_run(found: Found) -> dict[str, Any]:
    """A row for each run and subject: over all rows, and the mean of the sources."""
    names, more = _metrics(found), ["mean of sources"] if any(e.means for _, e in found) else []
    rows = []
    for run, e in found:
        *cells, missing = _cells(e, names)
        means = [e.means.get(e.scores["headline"], "–") for _ in more]
        rows.append([run.name, e.which, *cells, *means, missing])
    return _table(["run", "model"], names, more, rows)


def _table(
    head: list[str], names: list[str], more: list[str], rows: list[list[str]]
) -> dict[str, Any]:
    head = [*head, "rows", *(f"{name} (95 % interval)" for name in names), *more, "no answer"]
    return {"head": head, "rows": rows, "align": "ll" + "r" * (len(head) - 2)}


def verdict(tuned: Evaluation, base: Evaluation) -> tuple[str, list[str]]:
    """Say what tuned against base says ("" where nothing may be said), and what spoils it."""
    if wrong := not_comparable(tuned, base):
        text = f"{tuned.which} and base must not be compared: they differ in {', '.join(wrong)}."
        return "", [f"{text} Evaluate both again with the same settings."]
    name, one = tuned.first
    _, other = base.first
    if pairs := paired(tuned, base):
        gain, low, high = (100 * v for v in pairs)
        text = f"{name}: {gain:+.1f} percentage points against the base, 95 % interval"
        text += f" {low:+.1f} to {high:+.1f} (paired, over the same rows)"
        text += "." if low > 0 or high < 0 else "; that may be chance."
    else:
        gain = one["value"] - other["value"]
        unit = f"{100 * gain:+.1f} percentage points" if one["share"] else f"{gain:+.2f} points"
        apart = one["ci95"][0] > other["ci95"][1] or other["ci95"][0] > one["ci95"][1]
        meaning = "do not overlap" if apart else "overlap"
        text = f"{name}: {unit} against the base; the 95 % intervals {meaning}."
    warnings = []
    for e in (tuned, base):
        missing, count = e.scores["no_answer_found"], e.scores["count"]
        if missing > 0.2 * count:
            wrong_ones = f"no answer was found in {missing:,} of {count:,} predictions"
            warnings.append(f"{e.which}: {wrong_ones}; they count as wrong.")
    return text, warnings


def paired(one: Evaluation, other: Evaluation) -> tuple[float, float, float] | None:
    """Compare the first metric of two evaluations on the same rows, with a 95 % interval.

    Sources are averaged where the metric is their mean (``stats.paired_difference``).

    Returns:
        (difference, low, high); None for metrics that are no shares, or without scored rows.
    """
    if not one.first[1]["share"]:
        return None
    held, beside = _right(one), _right(other)
    whole = one.scores.get("count") == len(held)  # neither file is of another evaluation
    if not held or not whole or held.keys() != beside.keys():
        return None
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for key, (source, right) in held.items():
        name = source if "mean" in one.scores else ""
        groups.setdefault(name, []).append((right, beside[key][1]))
    return paired_difference(groups.values())


def _right(e: Evaluation) -> dict[str, tuple[str, bool]]:
    """Example id -> (source, right) of scored.jsonl."""
    rows = rows_of(e.folder / "scored.jsonl")
    return {
        r["id"]: (source_of(r), r["correct"]) for r in rows if isinstance(r.get("correct"), bool)
    }
