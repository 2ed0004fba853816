"""Rows of files: json arrays, json lines, either gzipped, and data sets of the hub."""

import glob
import gzip
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError

PAIR = "::"  # between two parallel files, line i of one belonging to line i of the other


def paths_of(source: str) -> list[Path]:
    """The files of a source; none for a data set of the hub."""
    return [] if source.startswith("hf://") else [Path(p) for p in source.split(PAIR)]


def content(source: str) -> str:
    """TEMPORARY."""
    import hashlib

    return hashlib.sha256(b"".join(p.read_bytes() for p in paths_of(source))).hexdigest()


def expand(sources: list[str], key: str) -> list[str]:
    """Resolves patterns; keeps ``hf://`` sources and pairs of files. Raises UserError where a name
    matches no file.
    """
    files: list[str] = []
    for source in sources:
        gone = [path for path in paths_of(source) if not path.is_file()]
        globbed = sorted(glob.glob(source, recursive=True)) if gone and PAIR not in source else []
        matches = [m for m in globbed if Path(m).is_file()] if gone else [source]
        if not matches:
            raise UserError(f"{key}: {gone[0]}: {absent(gone[0])}")
        files += matches
    return files


def absent(path: Path) -> str:
    """Says of a path that is no file what it is."""
    what = "a folder, not a file" if path.is_dir() else "no such file"
    return f"{what} (from {Path.cwd()})"


def source_labels(files: list[str]) -> list[str]:
    """Names sources in example ids: the last two parts of the path, more where two files would
    share them.
    """
    for parts in range(2, 64):
        labels = [f if f.startswith("hf://") else "/".join(Path(f).parts[-parts:]) for f in files]
        if len(set(labels)) == len(set(files)):
            break
    seen = Counter[str]()
    for i, label in enumerate(labels):
        seen[label] += 1
        if seen[label] > 1:  # a file listed twice is trained on twice, under its own ids
            labels[i] = f"{label}({seen[label]})"
    return labels


def read_rows(source: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row) of a json array, json lines, gzip of both, or a hub data set.

    The content decides between an array and lines, not the file name. A line that is not JSON comes
    out as a ``BrokenRow``, an object with a key twice too; a broken array is an error of the whole
    file. A file of one object over several lines is one row.

    Raises:
        UserError: it cannot be read, is not text, or is neither JSON nor JSON lines.
    """
    if source.startswith("hf://"):
        yield from enumerate(_hub_rows(source), 1)
        return
    text = read_text(source)
    whole = _parsed(text)
    if isinstance(whole, list):
        yield from enumerate(whole, 1)
        return
    if isinstance(whole, dict):
        yield text[: text.index("{")].count("\n") + 1, whole
        return
    if isinstance(whole, BrokenRow) and text.lstrip()[:1] == "[":
        raise UserError(
            f"{source}: {whole.reason}; an array must parse as a whole (json lines can be skipped"
            " row by row)"
        )
    lines = text.split("\n")
    starts = {line.lstrip(" \t\r\ufeff")[:1] for line in lines}
    if starts != {""} and not starts & {"{", '"'}:
        raise UserError(
            f"{source}: is neither JSON nor JSON lines (it begins with {text.strip()[:40]!r});"
            " allowed: one array of objects, or one object per line"
        )
    for number, line in enumerate(lines, 1):
        line = line.removeprefix("\ufeff")  # of files with a BOM that were put together
        if line.strip():
            yield number, _parsed(line)


def _parsed(text: str) -> Any:
    """A value of JSON, or why it is none."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return BrokenRow(f"broken JSON at {line}column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:  # ValueError: numbers of thousands of digits
        return BrokenRow(f"broken JSON: {str(error)[:80]}")


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A dict; json would take the last of two equal keys without a word."""
    held = dict(pairs)
    if len(held) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return BrokenRow(f"key '{twice}' appears twice in one object")
    return next((value for value in held.values() if isinstance(value, BrokenRow)), held)


def read_text(source: str) -> str:
    """Return a file's text, unzipped. Bytes that are not UTF-8 come out as lone surrogates, which
    ``check_utf8`` finds: a bad row is one bad row and not a bad file.

    Raises:
        UserError: it cannot be read, or is not text.
    """
    try:
        raw = Path(source).read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None
    if re.search(rb"[\0-\x08\x0e-\x1f]", raw[:16]):  # UTF-16, zip, parquet, zeros after a crash
        raise UserError(
            f"{source}: is not text (it begins with {raw[:16]!r}); files must be text in UTF-8, or"
            " gzip of it; data sets of the hub in other formats are named hf://DATASET"
        )
    return raw.decode("utf-8-sig", errors="surrogateescape")


@dataclass(frozen=True)
class BrokenRow:
    """A line that did not parse, in place of its row."""

    reason: str


def text_field(row: Any, key: str, required: bool = True) -> str:
    """``row[key]`` as text; null is missing where it may be. Raises UserError for what is missing,
    empty, not text or not UTF-8.
    """
    if isinstance(row, BrokenRow):
        raise UserError(row.reason)
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object with keys, not {type(row).__name__}")
    if key not in row and required:
        raise UserError(
            f"key '{key}' is missing; the row has {', '.join(map(str, row)) or 'no keys'}"
        )
    value = row.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        shown = reprlib.repr(value)[:40]
        raise UserError(f"'{key}' must be text, not {type(value).__name__} ({shown})")
    if required and not value.strip():
        raise UserError(f"'{key}' is empty")
    check_utf8(value, f"'{key}'")
    if "\0" in value:
        raise UserError(f"'{key}' holds a NUL character")
    return value


def one_line(reason: str) -> str:
    """A reason fit for one line of a terminal or a file, whatever the row put into it."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in reason[:2000])
    return shown if len(shown) <= 500 else f"{shown[:400]} ... {shown[-80:]}"


def check_utf8(value: str, what: str) -> None:
    """Refuses text that was no UTF-8 in its file."""
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
    they are. Raises UserError: the template names a field that rows do not have.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            allowed = ", ".join(f"{{{name}}}" for name in values)
            raise UserError(f"{key} uses {match[0]}; rows have {allowed}")
        return values[match[1]]

    return re.sub(r"\{([a-z_]+)\}", value, template)
