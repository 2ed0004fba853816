"""Who holds a run folder: the start that trains in it leaves its name and shows that it lives.

The fence (``checkpoint.check_fence``) keeps an old writer from doing harm; this keeps a second
launch of the same run from ending the first by mistake.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say

BEAT_SECONDS = 2.0
WATCH_SECONDS = 30.0  # without a sign of life from another machine, after which it counts as gone


def _machine() -> str:
    """Names the boot and the pid namespace in which a pid means something."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    here = [boot.read_text().strip() if boot.is_file() else socket.gethostname()]
    return " ".join([*here, os.readlink(namespace) if namespace.is_symlink() else ""])


def _began(pid: int) -> str | None:
    """The start time of a living process, so that a pid that is used again is not taken for it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Hold:
    """This process's name in a run folder, from the claim to ``release``.

    Args:
        run_dir: the claimed run folder.
        generation: number of this start.
        job: the Slurm job, if any.
        restarts: how often Slurm restarted it.
    """

    def __init__(self, run_dir: Path, generation: int, job: str | None, restarts: int) -> None:
        self._file, self._beat = run_dir / "holder.json", run_dir / "heartbeat"
        self._held = {
            "start": generation,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "began": _began(os.getpid()),
            "job": job,
            "restarts": restarts,
        }
        self._over = threading.Event()
        write_atomically(self._file, json.dumps(self._held) + "\n")
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        number, told = 0, False
        while not self._over.wait(BEAT_SECONDS):
            number += 1
            try:
                self._beat.write_text(f"{self._held['start']} {number}\n")
            except OSError as error:
                if not told:
                    say(f"{self._beat}: {error.strerror}: others cannot see that this run lives")
                told = True

    def release(self) -> None:
        """Says that nobody holds the folder any more."""
        self._over.set()
        self._thread.join()
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            say(f"{self._file}: {error.strerror}; the next start sees that this process is gone")


def _read(file: Path) -> dict[str, Any]:
    """Of a file that is broken, a holder without a name: its heartbeat tells."""
    held: dict[str, Any] = dict.fromkeys(("start", "host", "pid"), "?")
    try:
        return held | json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError):
        return held


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def check_free(run_dir: Path, job: str | None, restarts: int) -> None:
    """Refuses a run folder in which another start is training.

    What this very Slurm job was before its restart is no other: Slurm has ended it, and should its
    node wake up again, the fence stops it. On this machine the process itself is looked for; of
    another machine's, a sign of life is awaited for 30 s, without comparing clocks.

    Raises:
        UserError: with host, process and job of the holder.
    """
    held = _read(run_dir / "holder.json")
    earlier = held.get("restarts")
    same = job is not None and held.get("job") == job
    if not held or (same and isinstance(earlier, int) and earlier < restarts):
        return
    name = f"start {held['start']} on {held['host']}, pid {held['pid']}"
    name += f", Slurm job {held['job']}" if held.get("job") else ""
    if held.get("machine") == _machine():
        began = _began(held["pid"]) if isinstance(held["pid"], int) else None
        if held["pid"] == os.getpid() or began is None or began != held.get("began"):
            return
    else:
        before, since = _text(run_dir / "heartbeat"), time.monotonic()
        while _text(run_dir / "heartbeat") == before:
            if time.monotonic() - since > WATCH_SECONDS:
                say(f"{run_dir}: no sign of life from {name} for {WATCH_SECONDS:g} s: taken over")
                return
            time.sleep(0.5)
    end = f"scancel {held['job']}" if held.get("job") else "end it with SIGTERM"
    raise UserError(
        f"run_dir={run_dir}: is held by {name}, which is training there; wait for it, or {end},"
        " or choose another run_dir"
    )
