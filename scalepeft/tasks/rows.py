"""Rows of files: json arrays, json lines, either gzipped, and data sets of the hub."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.lookup import UserError

PAIR = "::"  # between two parallel files, line i of one belonging to line i of the other


def paths_of(source: str) -> list[Path]:
    """The files of a source; none for a data set of the hub."""
    return [] if source.startswith("hf://") else [Path(p) for p in source.split(PAIR)]


def expand(sources: list[str], key: str) -> list[str]:
    """Resolves patterns; keeps ``hf://`` sources and pairs of files. Raises UserError where a name
    matches no file.
    """
    files: list[str] = []
    for source in sources:
        if source.startswith("hf://"):
            files.append(source)
            continue
        if PAIR in source:
            for path in paths_of(source):
                if not path.is_file():
                    raise UserError(f"{key}: {path}: no such file (from {Path.cwd()})")
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
    text = read_text(source)
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


def read_text(source: str) -> str:
    """A file's text, unzipped. Bytes that are no UTF-8 come out as lone surrogates, which
    ``check_utf8`` finds: a bad row is one bad row and not a bad file.
    """
    try:
        raw = Path(source).read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"broken JSON at {line}column {error.colno}: {error.msg}"
    return f"broken JSON: {type(error).__name__}: {str(error)[:80]}"  # huge numbers, deep nesting


@dataclass(frozen=True)
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
    check_utf8(value, f"'{key}'")
    return value


def check_utf8(value: str, what: str) -> None:
    """Refuses text that was no UTF-8 in its file."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} is not valid UTF-8") from None


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    name, _, rest = source.removeprefix("hf://").partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise UserError(f"{source}: names no data set; expected hf://DATASET[:CONFIG[:SPLIT]]")
    import datasets  # slow to import, and only hub sources need it

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
        media = (datasets.Audio, datasets.Image, datasets.Video)
        heavy = [key for key, kind in rows.features.items() if isinstance(kind, media)]
        yield from rows.remove_columns(heavy)  # CoVoST's sound would be decoded row by row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # "An error occurred while generating the dataset" says nothing: its cause does.
        cause = error.__cause__ or error
        raise UserError(
            f"{source}: {' '.join(str(cause).split())[:300] or type(cause).__name__}"
        ) from None


def fill(template: str, values: dict[str, str], key: str) -> str:
    """Replaces ``{name}`` for the given names only, so that braces in the data or template stay as
    they are.

    Raises:
        UserError: the template names a field that rows do not have.
    """
    for name in re.findall(r"\{([a-z_]+)\}", template):
        if name not in values:
            raise UserError(
                f"{key} uses {{{name}}}; rows have {', '.join('{' + v + '}' for v in values)}"
            )
    return re.sub(r"\{([a-z_]+)\}", lambda m: values[m[1]], template)
