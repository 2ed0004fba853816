"""Small disks of the tests' own, full or not."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of these mount options (``size=2m``); skips where this is not root."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs root to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill_up(file: Path) -> None:
    """Writes a file until its disk takes no byte more."""
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as f:
        while f.write(bytes(1 << 12)):
            continue
