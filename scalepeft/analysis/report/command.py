"""Runs as a person wants to see them: a table on the terminal, a report as HTML and as Markdown.

Facts are read (facts.py), arranged (document.py, origins.py, examples.py), drawn (plots.py) and
written down (html.py, markdown.py).
"""

import os
import socket
from pathlib import Path

from scalepeft.analysis.report.facts import Run, read_all
from scalepeft.analysis.report.terminal import plot, table
from scalepeft.core.errors import UserError

__all__ = ["plot", "run", "table", "write"]


def run(run_dirs: list[str], out: str | None = None) -> None:
    """Prints a table for each run and writes the report; of one run ``RUN_DIR/loss.png`` too.

    Args:
        run_dirs: the runs.
        out: folder of the report; by default that of the run, or ``report`` for several.

    Raises:
        UserError: one is no run, or something cannot be written.
    """
    runs = read_all([Path(name) for name in run_dirs])
    print("\n\n".join(table(r.folder, r.metrics, r.starts) for r in runs))
    print()
    if len(runs) == 1 and runs[0].metrics:
        try:
            print(f"loss curve: {plot(runs[0].folder, runs[0].metrics, runs[0].starts)}")
        except OSError as error:
            raise _unwritable(runs[0].folder / "loss.png", error) from None
    written = _write(runs, Path(out) if out else None)
    print(f"report: {written[-1]} and {written[-2].name} beside it")


def write(run_dirs: list[Path], out: Path | None = None) -> list[Path]:
    """Writes report.html, report.md and the plots of the latter in ``report/``.

    Args:
        run_dirs: one run, or several to compare.
        out: the folder they go into; by default that of the run, or ``report`` for several.

    Returns:
        The files, report.html last.

    Raises:
        UserError: one is no run, or a file cannot be written; nothing is written by halves.
    """
    return _write(read_all(run_dirs), out)


def _write(runs: list[Run], out: Path | None) -> list[Path]:
    from scalepeft.analysis.report import document, html, markdown

    folder = out or (runs[0].folder if len(runs) == 1 else Path("report"))
    built = document.build(runs)
    files = {
        folder / markdown.PICTURES / f"{picture.name}.png": picture.png
        for picture in built.pictures()
    }
    files[folder / "report.md"] = markdown.page(built).encode()
    files[folder / "report.html"] = html.page(built).encode()
    for file, content in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _replace(file, content)
        except OSError as error:
            raise _unwritable(file, error) from None
    return list(files)


def _replace(file: Path, content: bytes) -> None:
    """Writes a file as a whole: a reader sees the old or the new one."""
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be written: {error.strerror}; --out takes another folder")
