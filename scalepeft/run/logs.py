"""Append-only JSON-lines logs of a run that lose and double no row."""

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from scalepeft.core.files import fsync, write_atomically
from scalepeft.core.log import say


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class RowLog:
    """A JSON-lines file of steps, cut back to the resumed one: never a double or torn row.

    A row that the disk refuses waits in memory and is written before the next one.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self._waiting: list[str] = []
        self.last_step = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = []
        for line in lines:
            step = _step(line)
            if step is not None and self.last_step < step <= last_step:
                kept.append(line)
                self.last_step = step
        self._end = sum(map(len, kept))
        if kept == lines[: len(kept)]:
            if lines:
                os.truncate(path, self._end)
            return
        damaged = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        say(f"{path} holds broken rows: kept as {damaged.name}")
        shutil.copy(path, damaged)
        write_atomically(path, b"".join(kept).decode())

    def keep(self, row: dict[str, Any]) -> None:
        """Takes a row, to be written by the next ``flush``."""
        self._waiting.append(json.dumps(row) + "\n")
        self.last_step = row["step"]

    def flush(self) -> str | None:
        """Writes the rows that wait; returns the disk's complaint if they go on waiting."""
        data = "".join(self._waiting).encode()
        try:
            with self.path.open("r+b" if self.path.exists() else "wb", buffering=0) as f:
                f.seek(self._end)
                f.truncate()
                if f.write(data) != len(data):
                    return "short write"
        except OSError as error:
            return error.strerror or str(error)
        self._end += len(data)
        self._waiting.clear()
        return None

    def sync(self) -> None:
        """Puts the rows on the disk, before a commit: no checkpoint knows more than the log."""
        if self._waiting and (complaint := self.flush()):
            raise OSError(errno.EIO, f"{self.path.name} cannot be written: {complaint}")
        if self.path.exists():
            fsync(self.path)
