"""Small files: atomic writes, fsync, digests, JSON lines, mappings."""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError


def cache_folder() -> Path:
    """``$SCALEPEFT_CACHE``, else ``~/.cache/scalepeft``."""
    return Path(os.environ.get("SCALEPEFT_CACHE") or Path.home() / ".cache" / "scalepeft")


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a small file as a whole: readers and crashes see the old or the new one."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(temporary)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


@contextmanager
def writing(what: object, remedy: str = "") -> Iterator[None]:
    """Raise UserError "WHAT: cannot be written: REASON; REMEDY" for an ``OSError`` inside."""
    try:
        yield
    except OSError as error:
        more = f"; {remedy}" if remedy else ""
        raise UserError(f"{what}: cannot be written: {error.strerror or error}{more}") from None


def try_to_write(folder: Path) -> None:
    """Put a few bytes on the folder's disk and remove them; raise OSError if it refuses."""
    with tempfile.TemporaryFile(dir=folder) as f:
        f.write(bytes(4096))  # a full disk still makes empty files
        f.flush()
        os.fsync(f.fileno())


def digest(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_mapping(file: Path, parse: Callable[[str], object], remedy: str) -> dict[str, Any]:
    """Reads a JSON or YAML file that must hold a mapping.

    Raises:
        UserError: it is missing, unreadable, broken or holds something else; ends with ``remedy``.
    """
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {remedy}") from None
    except Exception as error:  # every parser has its own
        raise UserError(
            f"{file}: cannot be read: {' '.join(str(error).split())}; {remedy}"
        ) from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(f"{file}: must hold keys with values, not {kind}; {remedy}")
    return values


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where it is missing, broken or holds something else."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


NUMBERS = {
    "time", "launched", "startup", "load", "waited", "idle", "recomputed", "recomputed_steps",
    "step", "steps", "seconds", "tokens_per_second", "sample_index", "world_size",
}  # fmt: skip


def read_lines(file: Path, *keys: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file that have these keys, and a number wherever one belongs; torn and
    broken lines are left out.
    """
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and row.keys() >= set(keys)
        and all(type(row[key]) in (int, float) for key in NUMBERS & row.keys())
    ]
