"""What a cell's run is to the comparison: a child process, a lock, the figures it leaves."""

import ctypes
import fcntl
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalepeft.core.files import read_lines
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, STOPPED, USER_ERROR, StopFlag, Stopping
from scalepeft.core.text import duration
from scalepeft.eval import scores

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


@contextmanager
def lock(file: Path, shared: bool = False) -> Iterator[bool]:
    """Holds a lock file; yields False where another process holds it. It ends with its process.

    On a file system without locks it is always yielded: the trainer's own hold on its run folder
    then keeps two from one cell.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        try:
            fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            say(f"{file}: {error.strerror}: start one comparison at a time here")
        yield True


def _die_with_parent() -> None:
    # A killed comparison's child saves and ends, so that the next one can go on with its cell.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def child(arguments: list[str], log: Path, stop: StopFlag) -> int:
    """Runs ``python -m scalepeft ARGUMENTS``, passes a stop on to it; returns its exit code.

    Raises:
        Stopping: it was told to stop, by us or by somebody else.
    """
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "scalepeft", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C comes to it once, through us
            preexec_fn=_die_with_parent,
        )
        told = None
        while True:
            if stop.signal is not None and told is None:
                told = stop.signal
                process.send_signal(told)
            try:
                code = process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                continue
    if code == STOPPED or (told is not None and code != FINISHED):
        raise Stopping
    return code


def why(code: int, log: Path, start: int) -> tuple[str, str]:
    """(state, reason) of a child that failed, from its exit code and its last words.

    Args:
        code: negative for a signal.
        log: what it printed.
        start: where its own part of the log begins.
    """
    said = log.read_bytes()[start:].decode(errors="replace").splitlines()
    if code < 0:
        name = signal.Signals(-code).name
        more = " (out of memory?)" if -code == signal.SIGKILL else ""
        return "broke", f"killed by {name}{more}"
    for line in reversed(said):
        _, found, reason = line.partition("scalepeft: error: ")
        if found and code == USER_ERROR:
            return "failed", reason
        _, found, reason = line.partition("FloatingPointError: ")
        if found:
            return "failed", f"diverged: {reason}"
    last = next((line.strip() for line in reversed(said) if line.strip()), "said nothing")
    return "broke", f"exit code {code}: {last}"[:300]


def measured(folder: Path, task: str | None) -> dict[str, Any]:
    """The figures of a finished run.

    Args:
        folder: the run.
        task: whose scores to read; None where it was not evaluated.

    Returns:
        ``loss``: held-out, after the last step (None: not finite). ``seconds``: of the training
        steps. ``peak_memory``: bytes, and ``memory``: ``cuda`` (the allocator's peak of rank 0) or
        ``resident`` (of the process, with Python and torch). ``metric``, ``score``: the task's
        headline, where it was evaluated.
    """
    rows = read_lines(folder / "metrics.jsonl", "step", "seconds", "tokens_per_second")
    held_out = read_lines(folder / "validation.jsonl", "step", "loss")
    events = read_lines(folder / "events.jsonl", "event", "time")
    start = next(e for e in reversed(events) if e["event"] == "start")
    cuda = [e["peak_memory"] for e in events if e.get("peak_memory")]
    resident = [e["peak_resident"] for e in events if e.get("peak_resident")]
    seconds = sum(row["seconds"] for row in rows)
    tokens = sum(row["tokens_per_second"] * row["seconds"] for row in rows)
    last = held_out[-1] if held_out and held_out[-1]["step"] == rows[-1]["step"] else {}
    found = {
        "loss": last.get("loss"),
        "parameters": start["parameters"],
        "device": start["per_rank"][0]["device"],
        "ranks": start["world_size"],
        "versions": start["versions"],
        "rows": last.get("rows"),
        "steps": rows[-1]["step"],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory": max(cuda or resident, default=None),
        "memory": "cuda" if cuda else "resident",
    }
    if task is not None:
        held = scores.read(folder / "eval" / task / "scores.json")
        name, metric = scores.first(held)
        found |= {"metric": name, "score": metric["value"], "share": metric["share"]}
    return found


def left(walls: list[float], count: int) -> str:
    """About how long ``count`` more cells take; empty before the first."""
    return f", about {duration(statistics.mean(walls) * count)} left" if walls and count else ""
