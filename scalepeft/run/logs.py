"""Append-only JSON-lines logs of a run that lose and double no row."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scalepeft.core.files import lines_of, read_line, write_atomically
from scalepeft.core.log import say


def _step(line: bytes) -> int:
    row = read_line(line, "step") if line.endswith(b"\n") else None
    return row["step"] if row else 0


class RowLog:
    """A JSON-lines file of steps, cut back to the resumed one: never a double or torn row.

    It is read from its end, the last MiB of what stays; all of it, for the good rows, only if that
    is broken. A row that the disk refuses waits in memory. Each start writes a file of its own: one
    that froze between ``check`` and its write has the older file open, and harms no row of this.
    """

    def __init__(
        self, path: Path, last_step: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self._check = path, check
        self._waiting: list[str] = []
        self.last_step = self._end = 0
        end, following = path.stat().st_size if path.exists() else 0, last_step + 1
        for line in lines_of(path, newest_first=True):
            step = _step(line)
            if 0 < step < following:
                following = step
                if not self.last_step:
                    self.last_step, self._end = step, end
            elif self.last_step:
                self._mend(last_step)
                return
            end -= len(line)
            if end < self._end - (1 << 20):
                break
        if self._end:
            self._file = path.open("rb", buffering=0)
        self._replace(self._copied())

    def _replace(self, content: Iterator[bytes]) -> None:
        def checked() -> Iterator[bytes]:
            yield from content
            self._check()  # beside the new file: whoever claims from here on removes it

        for older in self.path.parent.glob(f"{self.path.name}.*.tmp"):
            older.unlink(missing_ok=True)
        write_atomically(self.path, checked())
        self._file = self.path.open("r+b", buffering=0)

    def _copied(self) -> Iterator[bytes]:
        for at in range(0, self._end, 1 << 20):
            yield os.pread(self._file.fileno(), min(1 << 20, self._end - at), at)

    def _mend(self, last_step: int) -> None:
        damaged = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        say(f"{self.path} holds broken rows: kept as {damaged.name}")
        shutil.copy(self.path, damaged)
        self._replace(self._good(damaged, last_step))

    def _good(self, file: Path, last_step: int) -> Iterator[bytes]:
        self.last_step = self._end = 0
        for line in lines_of(file):
            step = _step(line)
            if self.last_step < step <= last_step:
                self.last_step, self._end = step, self._end + len(line)
                yield line

    def keep(self, row: dict[str, Any]) -> None:
        """Takes a row, to be written by the next ``flush``."""
        self._waiting.append(json.dumps(row) + "\n")
        self.last_step = row["step"]

    def flush(self) -> str | None:
        """Writes the rows that wait; returns the disk's complaint if they go on waiting."""
        data = "".join(self._waiting).encode()
        try:
            if not os.fstat(self._file.fileno()).st_nlink:  # somebody removed it
                self._replace(self._copied())
            self._file.truncate(self._end)
            self._file.seek(self._end)
            if self._file.write(data) != len(data):
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
        os.fsync(self._file.fileno())
