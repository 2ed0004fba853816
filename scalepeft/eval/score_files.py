"""``scalepeft score``: any system's output files against references, with the code of evaluate."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft import __version__
from scalepeft.build import task_of
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides, marks_of
from scalepeft.core.log import say
from scalepeft.data.rows import PAIR, BrokenRow, absent, check_utf8, one_line, read_rows, read_text
from scalepeft.data.tasks.base import Example
from scalepeft.eval import scores

KEYS = (
    "prediction", "output_pred", "hypothesis", "mt", "generated_text", "response", "text", "output",
)  # fmt: skip
"""Where rows of JSON may hold the text; the first one that they have."""


@dataclass(frozen=True)
class Options:
    """What ``scalepeft score`` was asked for.

    Attributes:
        task: a file of ``scalepeft/tasks``.
        predictions: a text file, line i for row i of the references, or json (lines), each a text
            or an object; objects that all have an ``id`` of the references go by it.
        references: rows of the task, or text lines where the task takes them.
        sources: source text lines of a translation, line i for line i of the references.
        settings: ``data.KEY=VALUE``.
        key: which key of the predictions' objects holds the text.
        out: folder for scores.json and scored.jsonl.
        json: print scores.json instead of a table.
    """

    task: str
    predictions: str
    references: str
    sources: str | None
    settings: list[str]
    key: str | None
    out: str | None
    json: bool


def run(options: Options) -> None:
    """Prints the scores; writes them where ``out`` is given.

    Raises:
        UserError: an unknown task, unreadable or broken files, predictions that do not belong to
            the references.
    """
    config = _config(options)
    task = task_of(config)
    examples = task.examples("test")
    texts = match(read(options.predictions, options.key), examples, options, len(task.skipped))
    found, rows = scores.summarise(task, examples, texts)
    found = {
        "task": options.task,
        "protocol": config.data.protocol,
        "predictions": options.predictions,
        "references": options.references,
        **found,
        "task_version": task.version,
        "versions": {"scalepeft": __version__},
    }
    if options.out is not None:
        folder = Path(options.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scores.write(folder, found, rows)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for line in [*task.notes, *(f"left out: {where}" for where in task.skipped[:3])]:
        print(line)
    print("\n".join(scores.lines(found)))


def _config(options: Options) -> cfg.RunConfig:
    decided = marks_of(cfg.config_class("data", options.task))
    for setting in options.settings:
        key = setting.partition("=")[0]
        if not key.startswith("data."):
            raise UserError(f"{setting}: for score, settings are data.KEY=VALUE")
        marks = decided.get(cfg.renamed_key(key).removeprefix("data."))
        if marks is not None and Decides.SCORES not in marks:
            raise UserError(f"{setting}: decides nothing in score, which makes no predictions")
    files = [options.sources, options.references] if options.sources else [options.references]
    values: dict[str, Any] = {
        "run_dir": "-",  # nothing is trained: what a run needs besides is of no effect
        "data": {"name": options.task, "test": [PAIR.join(files)]},
        "train": {"max_steps": 1},
    }
    return config_files.overlay(values, options.settings)


@dataclass(frozen=True)
class Prediction:
    """A text, the id it came with, and where it stands."""

    text: str
    id: str | None
    row: int


def read(file: str, key: str | None) -> list[Prediction]:
    """Reads predictions.

    Raises:
        UserError: unreadable, empty, or a row without a text in it.
    """
    if not Path(file).is_file():
        raise UserError(f"--predictions {file}: {absent(Path(file))}")
    text = read_text(file)
    if not _is_json(file, text):
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        found = [Prediction(line.rstrip("\r"), None, i) for i, line in enumerate(lines, 1)]
    else:
        found = [_prediction(row, key, number, file) for number, row in read_rows(file)]
    if not found:
        raise UserError(f"--predictions {file}: is empty")
    for prediction in found:
        try:
            check_utf8(prediction.text, "the text")
        except UserError as error:
            raise UserError(f"{file}, row {prediction.row}: {error}") from None
    return found


def _is_json(file: str, text: str) -> bool:
    """A text may begin with a quote or a bracket too: the file name or the lines decide."""
    if Path(file).name.removesuffix(".gz").endswith((".json", ".jsonl")):
        return True
    if re.match(r'\s*(\[\s*["\[{\]]|\{\s*["}])', text):
        return True
    lines = (line.lstrip() for line in text.split("\n"))
    return bool(text.strip()) and all(line[:1] in ("", '"', "{") for line in lines)


def _prediction(row: Any, key: str | None, number: int, file: str) -> Prediction:
    if isinstance(row, str):
        return Prediction(row, None, number)
    where = f"{file}, row {number}"
    if isinstance(row, BrokenRow):
        raise UserError(f"{where}: {row.reason}")
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a text or an object, not {type(row).__name__}")
    used = key or next((k for k in KEYS if k in row), None)
    if used is None or used not in row:
        raise UserError(
            f"{where}: no key {used or ', '.join(KEYS)}; it has"
            f" {one_line(', '.join(map(str, row)))}; name the one that holds the text with --key"
        )
    if not isinstance(row[used], str):
        raise UserError(f"{where}: '{used}' must be text, not {type(row[used]).__name__}")
    id_ = row.get("id")
    return Prediction(row[used], None if id_ is None else str(id_), number)


def match(
    found: list[Prediction], examples: list[Example], options: Options, skipped: int
) -> dict[str, str]:
    """Example id -> its prediction: by id where ids of the references are given, else by order.

    Raises:
        UserError: an id twice, no id beside others, rows without a prediction, another number of
            rows.
    """
    known = {e.id for e in examples}
    seen: dict[str, Prediction] = {}
    twice, bare = "", 0
    for p in found:
        if p.id is None:
            bare = bare or p.row
        elif (first := seen.setdefault(p.id, p)) is not p and not twice:
            twice = f"row {p.row}: id {p.id} stood in row {first.row} already"
    if known & seen.keys():
        if twice or bare:
            said = twice or f"row {bare}: has no id, others have"
            raise UserError(f"{options.predictions}, {said}; a row can be scored once")
        missing = [e.id for e in examples if e.id not in seen]
        if missing:
            raise UserError(
                f"{options.predictions}: {len(missing)} of {len(examples)} rows of"
                f" {options.references} have no prediction, the first is {missing[0]}"
            )
        if others := [i for i in seen if i not in known]:
            say(
                f"{options.predictions}: {len(others)} predictions are of no row of"
                f" {options.references} and left out, the first is {others[0]}"
            )
        return {e.id: seen[e.id].text for e in examples}
    ids = [i for i in seen if re.search(r"#\d+$", i)]
    if ids:  # our own predictions.jsonl, which is not in the order of the rows
        return _by_number(seen, examples, options, twice or (bare and f"row {bare}: has no id"))
    if skipped:
        raise UserError(
            f"{options.references}: {skipped} broken rows were left out, so that the order says no"
            " longer which prediction belongs to which row; repair them, or give the predictions"
            " ids"
        )
    if len(found) != len(examples):
        raise UserError(
            f"{options.predictions} has {len(found)} predictions, {options.references}"
            f" {len(examples)} rows; they must go together one by one, or by id"
            f"{f' ({twice})' if twice else ''}"
        )
    return {e.id: p.text for e, p in zip(examples, found, strict=True)}


def _by_number(
    seen: dict[str, Prediction], examples: list[Example], options: Options, wrong: str | int
) -> dict[str, str]:
    """Predictions with ids LABEL#NUMBER of another copy of the references: by their number.

    Raises:
        UserError: several files, or other rows.
    """
    labels = {i.rpartition("#")[0] for i in seen}
    numbers = {i.rpartition("#")[2]: p for i, p in seen.items()}
    wanted = [e.id.rpartition("#")[2] for e in examples]
    if wrong or len(labels) > 1 or set(wanted) != set(numbers) or len(set(wanted)) < len(wanted):
        raise UserError(
            f"{options.predictions}: its ids ({next(iter(seen))}, ...) are not those of"
            f" {options.references} ({examples[0].id}, ...)"
            + (f", and {wrong}" if wrong else "")
            + "; give the file that was predicted for, or predictions without ids in its order"
        )
    say(
        f"{options.predictions}: made for {labels.pop()}; taken row by row for {options.references}"
    )
    return {e.id: numbers[n].text for e, n in zip(examples, wanted, strict=True)}
