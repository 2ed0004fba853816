"""Small files: atomic writes, fsync, digests, JSON lines, mappings."""

import hashlib
import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.text import one_line

RECORD_BYTES = 64 << 20
"""The largest file of records (manifest, settings, config) that is read as a whole."""
LINE_BYTES = 16 << 20  # the longest line that is read as a whole
STRAY_SECONDS = 3600.0


def shipped(name: str) -> Path:
    """A folder of the package's data: inside it where it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def cache_folder() -> Path:
    """``$SCALEPEFT_CACHE``, else ``~/.cache/scalepeft``."""
    return Path(os.environ.get("SCALEPEFT_CACHE") or Path.home() / ".cache" / "scalepeft")


def share(path: Path) -> None:
    """Give the group what was made in a cache, where the folder it lies in is the group's."""
    above, made = path.parent.stat(), path.stat()
    if above.st_mode & stat.S_IWGRP and above.st_gid == made.st_gid:
        folder = path.is_dir()
        path.chmod(made.st_mode & 0o7777 | (0o070 | above.st_mode & 0o3000 if folder else 0o060))
        for file in path.iterdir() if folder else ():
            share(file)


def shared_folder(path: Path) -> Path:
    """Make a folder of a cache, as ``share`` says, unless it is there, and return it."""
    if not path.exists():
        shared_folder(path.parent)
        with suppress(FileExistsError):
            path.mkdir()
            share(path)
    return path


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Replaces a file as a whole: readers and crashes see the old or the new one."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        content = content.encode() if isinstance(content, str) else content
        with temporary.open("wb") as f:
            f.writelines([content] if isinstance(content, bytes) else content)
        fsync(temporary)
        temporary.replace(path)
    except BaseException:  # what makes the content may stop it
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


@contextmanager
def writing(what: object, remedy: str = "", on: str = "") -> Iterator[None]:
    """Raise UserError "WHAT: cannot be written ON: REASON; REMEDY" for an ``OSError`` inside."""
    try:
        yield
    except OSError as error:
        more = f"; {remedy}" if remedy else ""
        raise UserError(f"{what}: cannot be written{on}: {error.strerror or error}{more}") from None


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


def kept_digest(file: Path) -> str:
    """``digest``, kept until the file is written to; damage by the disk itself is not seen."""
    real = file.resolve()
    now = real.stat()  # ctime too, as mtime can be set back
    identity = [real.name, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    kept = cache_folder() / "digests" / key
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", found := read_text(kept)):
            return found
    found = digest(file)
    with suppress(OSError):  # no room for it: computed again next time
        shared_folder(kept.parent)
        write_atomically(kept, found)
        share(kept)
    return found


def seal(values: dict[str, Any], of: str = "") -> str:
    """sha256 of a mapping under ``of``: what its own key ``digest`` is to hold."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256((of + json.dumps(rest, sort_keys=True)).encode()).hexdigest()


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """``values``, as JSON has them, and their ``digest``, by which ``unsealed`` sees any change."""
    return values | {"digest": seal(values)}


def unsealed(text: str) -> dict[str, Any]:
    """The mapping of a JSON text. Raises ValueError, in one line: not one, or not as ``sealed``."""
    values = parse_json(text)
    try:
        if not isinstance(values, dict):
            raise ValueError("holds no keys with values")
        if values.get("digest", "") not in ("", seal(values)):
            raise ValueError("its digest differs: it has changed since it was written")
    except RecursionError:
        raise ValueError("nested too deep") from None
    return values


def read_sealed(file: Path) -> dict[str, Any]:
    """``unsealed`` of a file. Raises OSError, and ValueError with its name."""
    try:
        return unsealed(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None


def damage(
    folder: Path, files: dict[str, Any], hashed: Callable[[Path], str] = digest
) -> str | None:
    """Why files are not those of a manifest (name -> ``bytes``, ``sha256``); None if they are."""
    reason, name = None, ""
    try:
        for name, known in files.items():
            file = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                reason = "lies outside its folder"
            elif not file.is_file():
                reason = "is missing"
            elif (size := file.stat().st_size) != (wanted := known.get("bytes", size)):
                reason = f"has {size} bytes, not {wanted}"
            elif (sha256 := known.get("sha256")) and hashed(file) != sha256:
                reason = "has changed: sha256 differs from the manifest"
            if reason:
                break
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"unreadable: {type(error).__name__}: {error}"
    return one_line(f"{name} {reason}") if reason else None


def remove_strays(folder: Path, *patterns: str) -> None:
    """Removes temporaries whose process is gone: here by its pid, of other hosts after an hour."""
    for file in (file for pattern in patterns for file in folder.glob(pattern)):
        name, _, pid = file.name.removesuffix(".tmp").rpartition(".")
        ours = name.endswith(f".{socket.gethostname()}") and pid.isdecimal()
        with suppress(OSError):  # another start was faster
            old = time.time() - file.stat().st_mtime > STRAY_SECONDS
            if not Path("/proc", pid).exists() if ours else old:
                file.unlink()


def read_text(file: Path, limit: int = RECORD_BYTES) -> str:
    """The text of a regular file. Raises OSError: missing, or a FIFO or device, at which a read
    could wait for ever; ValueError: larger than ``limit`` bytes, or no UTF-8.
    """
    # Without O_NONBLOCK the open itself waits for a FIFO's writer.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
        found = os.fstat(f.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{file.name} is not a regular file")
        if found.st_size > limit:
            raise ValueError(f"{file.name} has more than {limit} bytes")
        return f.read().decode()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, of one printable line, and nothing else."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:  # no JSON, no UTF-8, a number of more than 4,300 digits
        raise ValueError(one_line(error)) from None


def read_mapping(file: Path, parse: Callable[[str], object], remedy: str) -> dict[str, Any]:
    """The mapping in a JSON or YAML file. Raises UserError, with the ``remedy``: there is none."""
    try:
        values = parse(read_text(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {remedy}") from None
    except Exception as error:  # every parser has its own
        reason = one_line(str(error).replace('in "<unicode string>", ', "at "), 120)  # YAML's
        raise UserError(f"{file}: cannot be read: {reason}; {remedy}") from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(f"{file}: must hold keys with values, not {kind}; {remedy}")
    return values


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where it is missing, broken or holds something else."""
    try:
        found = parse_json(read_text(file))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


NUMBERS = {
    "time", "launched", "startup", "load", "waited", "idle", "recomputed", "recomputed_steps",
    "step", "steps", "seconds", "tokens_per_second", "sample_index", "world_size",
}  # fmt: skip


def lines_of(file: Path, newest_first: bool = False) -> Iterator[bytes]:
    """Lines of a file, if there is one, with their ends; one over ``LINE_BYTES`` comes in parts."""
    if not file.is_file():
        return
    with file.open("rb") as f:
        if not newest_first:
            yield from iter(lambda: f.readline(LINE_BYTES), b"")
            return
        begin, rest, block = f.seek(0, os.SEEK_END), b"", 1 << 16
        while begin:
            begin = max(0, (end := begin) - block)
            f.seek(begin)
            lines = (f.read(end - begin) + rest).splitlines(keepends=True)
            rest = lines.pop(0) if begin and lines else b""
            if len(rest) > LINE_BYTES:
                lines, rest = [rest, *lines], b""
            yield from reversed(lines)
            block *= 1 if lines else 2  # a long line is read in linear time


def read_line(line: bytes, *keys: str) -> dict[str, Any] | None:
    """The row in a JSON line; None if it is broken, lacks a key, or a number where one belongs."""
    with suppress(ValueError):
        row = parse_json(line)
        if isinstance(row, dict) and row.keys() >= {*keys}:
            values = (row[key] for key in NUMBERS & row.keys())
            numbers = all(type(n) in (int, float) and abs(n) < 1e15 for n in values)
            return row if numbers else None
    return None


def read_lines(file: Path, *keys: str, newest_first: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, one at a time; those that ``read_line`` refuses are left out."""
    rows = (read_line(line, *keys) for line in lines_of(file, newest_first))
    return (row for row in rows if row is not None)
