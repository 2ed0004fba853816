"""Disk space that is kept for the next save, so that a disk that others fill does not refuse it."""

import os
from pathlib import Path

from scalepeft.core.log import say


class Room:
    """A file as large as a save, which is removed just before one is written."""

    def __init__(self, file: Path) -> None:
        self._file, self._bytes, self._told = file, 0, False

    def keep(self, size: int | None = None) -> None:
        """Allocates the file, of ``size`` bytes from the first call on. Where disk or file system
        refuse, which is said once, saves take what there is.
        """
        self._bytes = size or self._bytes
        try:
            with self._file.open("wb") as f:
                os.posix_fallocate(f.fileno(), 0, self._bytes)
        except OSError as error:
            self.give()
            if not self._told:
                say(f"no room can be kept for the next save: {error.strerror}")
                self._told = True

    def give(self) -> None:
        """Removes the file."""
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            say(f"{self._file}: {error.strerror}")
