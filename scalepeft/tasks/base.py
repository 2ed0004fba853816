"""The task protocol: rows of a file -> prompt and completion to train on -> an answer found and
scored.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.lookup import STRICT, NameList, UserError

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """What every task's config has (section ``data``).

    Attributes:
        name: the task, a file of ``scalepeft/tasks``.
        train: files (json, json lines, either with .gz), patterns, or
            ``hf://DATASET[:CONFIG[:SPLIT]]``.
        valid: the same for the held-out loss; or take ``valid_size``.
        test: the same for ``scalepeft evaluate``.
        valid_size: rows taken out of ``train`` for the held-out loss, chosen by ``train.seed``.
        prompt: what the model is given; ``{instruction}`` and ``{input}`` are filled in.
        completion: what it is to write; ``{output}`` is filled in. An end-of-text token follows.
        train_on: ``response`` puts the loss on the completion alone, ``all`` on the prompt as well.
        cutoff: length in tokens; the end is cut. A row with no token left to learn is dropped and
            counted.
        on_error: a broken row stops the run (``stop``) or is left out and counted (``skip``).
        workers: loader processes; 0 pads the batches in the training process.
        cache: folder of tokenised data; default ``$SCALEPEFT_CACHE`` or ``~/.cache/scalepeft``.
    """

    name: str
    train: NameList = Field(default_factory=list)
    valid: NameList = Field(default_factory=list)
    test: NameList = Field(default_factory=list)
    valid_size: Annotated[int, Field(ge=0)] = 0
    prompt: str = "{instruction}\n"
    completion: str = "{output}"
    train_on: Literal["response", "all"] = "response"
    cutoff: Annotated[int, Field(ge=8)] = 512
    on_error: Literal["stop", "skip"] = "stop"
    workers: Annotated[int, Field(ge=0)] = 0
    cache: str | None = None


@plain_dataclass(frozen=True)
class Example:
    """One row, ready to train on or to generate from. ``id`` is stable: source and row number."""

    id: str
    prompt: str
    completion: str
    meta: dict[str, Any] = field(default_factory=dict)


@plain_dataclass(frozen=True)
class Score:
    """What was found in a prediction (None: nothing that looks like an answer) and whether it is
    right.
    """

    extracted: str | None
    correct: bool


class Task:
    """A family of data sets with one row format, one prompt and one way to score."""

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    version: ClassVar[int]
    """Part of every reported number: raised when prompts or scoring change."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.skipped: list[str] = []
        """Where broken rows were left out (``on_error: skip``)."""

    def examples(self, split: Split) -> list[Example]:
        """Reads a split.

        Raises:
            UserError: no files, an unreadable file, or a broken row under ``on_error: stop``.
        """
        sources: list[str] = getattr(self.config, split)
        if not sources:
            raise UserError(
                f"data.{split} is empty: name files, e.g. data.{split}=DIR/{split}.json"
            )
        files = expand(sources, f"data.{split}")
        self.skipped = []
        found = []
        for label, source in zip(source_labels(files), files, strict=True):
            for number, row in read_rows(source):
                try:
                    found.append(self.example(row, f"{label}#{number}"))
                except UserError as error:
                    where = f"{source}, row {number}: {error}"
                    if self.config.on_error == "stop":
                        raise UserError(
                            f"{where}; repair it, or data.on_error=skip leaves it out"
                        ) from None
                    self.skipped.append(where)
        if not found:
            raise UserError(f"data.{split}: no usable row in {', '.join(files)}")
        return found

    def example(self, row: Any, row_id: str) -> Example:
        """Builds one example from a row; raises UserError for a broken one (without file and
        number).
        """
        raise NotImplementedError

    def score(self, prediction: str, example: Example) -> Score:
        """Finds the answer in generated text and compares it."""
        raise NotImplementedError


def expand(sources: list[str], key: str) -> list[str]:
    """Resolves patterns; keeps ``hf://`` sources. Raises UserError where a name matches no file."""
    files: list[str] = []
    for source in sources:
        if source.startswith("hf://"):
            files.append(source)
            continue
        matches = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
        found = [m for m in matches if Path(m).is_file()]
        if not found:
            what = "a folder, not a file" if Path(source).is_dir() else "no such file"
            raise UserError(f"{key}: {source}: {what} (from {Path.cwd()})")
        files += found
    return files


def source_labels(files: list[str]) -> list[str]:
    """Names sources in example ids: the last two parts of the path, more where two files would
    share them.
    """
    for parts in range(2, 64):
        labels = [f if f.startswith("hf://") else "/".join(Path(f).parts[-parts:]) for f in files]
        if len(set(labels)) == len(set(files)):
            break
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:  # a file listed twice is trained on twice, under its own ids
            labels[i] = f"{label}({seen[label]})"
    return labels


def read_rows(source: str) -> Iterator[tuple[int, Any]]:
    """Yields (row number from 1, row) of a json array, json lines, gzip of both, or a hub data set.

    The content decides between an array and lines, not the file name. A line that is no JSON comes
    out as a ``BrokenRow``; a broken array is an error of the whole file.
    """
    if source.startswith("hf://"):
        yield from enumerate(_hub_rows(source), 1)
        return
    try:
        raw = Path(source).read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    if text.lstrip()[:1] == "[":
        try:
            yield from enumerate(json.loads(text), 1)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{source}: {_json_fault(error)}; an array must parse as a whole (json lines can be"
                " skipped row by row)"
            ) from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, BrokenRow(_json_fault(error))


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"broken JSON at {line}column {error.colno}: {error.msg}"
    return f"broken JSON: {type(error).__name__}: {str(error)[:80]}"  # huge numbers, deep nesting


@plain_dataclass(frozen=True)
class BrokenRow:
    """A line that did not parse, in place of its row."""

    reason: str


def text_field(row: Any, key: str, required: bool = True) -> str:
    """Returns ``row[key]`` as text; raises UserError for what is missing, empty, not text or not
    UTF-8.
    """
    if isinstance(row, BrokenRow):
        raise UserError(row.reason)
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object with keys, not {type(row).__name__}")
    if key not in row and required:
        raise UserError(
            f"key '{key}' is missing; the row has {', '.join(map(str, row)) or 'no keys'}"
        )
    value = row.get(key, "")
    if not isinstance(value, str):
        raise UserError(f"'{key}' must be text, not {type(value).__name__} ({str(value)[:40]})")
    if required and not value.strip():
        raise UserError(f"'{key}' is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"'{key}' is not valid UTF-8") from None
    return value


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    name, _, rest = source.removeprefix("hf://").partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise UserError(f"{source}: names no data set; expected hf://DATASET[:CONFIG[:SPLIT]]")
    import datasets  # slow to import, and only hub sources need it

    try:
        yield from datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # "An error occurred while generating the dataset" says nothing: its cause does.
        cause = error.__cause__ or error
        raise UserError(
            f"{source}: {' '.join(str(cause).split())[:300] or type(cause).__name__}"
        ) from None
