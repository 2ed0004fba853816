"""Lines for the user, from rank 0, and standard streams that end nothing."""

import io
import os
import sys
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.text import visible

LINE_SECONDS = 10.0  # without a terminal: at most one line in so many seconds


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(f"scalepeft: {visible(text)}", file=sys.stderr, flush=True)


class _Stream(io.FileIO):
    """stdout or stderr. What cannot be written (ENOSPC, EPIPE, EIO) is dropped, and their number
    said once it can; of a ``result``, which others are to read, the first loss is raised.
    """

    def __init__(self, fd: int, result: bool) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._result, self._lost, self._reason = result, 0, ""

    def write(self, data: Any, /) -> int:
        try:
            if self._lost:
                notice = f"\nscalepeft: {self._lost} lines are missing here: {self._reason}\n"
                super().write(notice.encode())
                self._lost = 0
            if (written := super().write(data)) is None:
                raise BlockingIOError(0, "its reader does not keep up")
            return written
        except OSError as error:
            self._lost += max(1, bytes(data).count(b"\n"))
            self._reason = error.strerror or str(error)
            if not self._result:
                return len(data)
            self._result = False  # what is flushed at exit is dropped
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"standard output: {self._reason}; what it got is not all") from None


def keep_speaking(result: bool) -> None:
    """Lets no failed print end this process, but that of a ``result`` on stdout."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed: the next file that is opened would take what libraries print
            os.open(os.devnull, os.O_RDWR)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        old, raw = getattr(sys, name), io.BufferedWriter(_Stream(fd, result and fd == 1))
        encoding, errors = getattr(old, "encoding", None), getattr(old, "errors", None)
        setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=True))
