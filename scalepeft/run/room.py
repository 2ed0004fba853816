"""Disk space that is kept for the next save, so that a disk that others fill does not refuse it."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from scalepeft.core.log import say

ROWS = 64 << 10  # bytes of the log between saves, where there is room for them too


class Room:
    """A file as large as a save, which is removed just before one is written."""

    def __init__(self, file: Path) -> None:
        self._file, self._bytes, self._told = file, 0, False

    def keep(self, size: int = 0) -> None:
        """Allocates it, of ``size`` from the first call on; that a disk refuses is said once."""
        self._bytes = size or self._bytes
        for more in (ROWS, 0):
            try:
                with self._file.open("wb") as f:
                    _allocate(f.fileno(), self._bytes + more)
                return
            except OSError as error:
                reason = error.strerror
        self.give()
        if not self._told:
            say(f"no room can be kept for the next save: {reason}")
        self._told = True

    def give(self) -> None:
        """Removes it."""
        with suppress(OSError):  # a disk that refuses even this says so at the save
            self._file.unlink(missing_ok=True)


def _allocate(fd: int, size: int) -> None:
    # Not os.posix_fallocate, which writes zeros where a file system (NFS 3) cannot: at every save.
    libc, size_of = ctypes.CDLL(None, use_errno=True), ctypes.c_int64
    if libc.fallocate(fd, 0, size_of(0), size_of(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
