"""Whose a run folder is: the fencing token (``generation``, the number of the start), which keeps
an old writer from doing harm, and the lease of the start that trains in it, which keeps a second
launch of the same run from ending the first by mistake.
"""

import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say
from scalepeft.core.slurm import slurm_start

BEAT_SECONDS = 2.0
WATCH_SECONDS = 30.0  # without a sign of life from another machine, after which it counts as gone


class Superseded(Exception):
    """A newer start of the same run owns the folder; this process must not write."""


def stored_generation(run_dir: Path) -> int:
    """Number of the start that owns a run folder; 0 where none ever did."""
    text = _text(run_dir / "generation").strip()
    return int(text) if text.isdecimal() else 0


def largest_generation(run_dir: Path) -> int:
    """The largest generation that the run's events and checkpoints were written under."""
    manifests = run_dir.glob("checkpoints/*/manifest.json")
    files = [file for file in (run_dir / "events.jsonl", *manifests) if file.is_file()]
    texts = (file.read_text(errors="replace") for file in files)
    numbers = (n for text in texts for n in re.findall(r'"generation": (\d{1,15})\b', text))
    return max(map(int, numbers), default=0)


def check_fence(run_dir: Path, generation: int) -> None:
    """Raises Superseded if a run folder is a newer start's, OSError if it does not say."""
    if (stored := stored_generation(run_dir)) > generation:
        raise Superseded(
            f"run_dir={run_dir}: start {stored} of this run owns the folder, this is start"
            f" {generation}; it stops without writing"
        )


def _machine() -> str:
    """Names the boot and the pid namespace in which a pid means something."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    here = boot.read_text().strip() if boot.is_file() else socket.gethostname()
    return f"{here} {os.readlink(namespace) if namespace.is_symlink() else ''}"


def _began(pid: int) -> str | None:
    """The start time of a living process, so that a pid that is used again is not taken for it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Lease:
    """This process in a run folder, from the claim of start ``generation`` to ``release``."""

    def __init__(self, run_dir: Path, generation: int) -> None:
        job, restarts = slurm_start()
        self._file, self._beat = run_dir / "holder.json", run_dir / "heartbeat"
        self._owner = {
            "start": generation,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "began": _began(os.getpid()),
            "job": job,
            "restarts": restarts,
        }
        self._over = threading.Event()
        write_atomically(self._file, json.dumps(self._owner) + "\n")
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        number, told = 0, False
        while not self._over.wait(BEAT_SECONDS):
            number += 1
            try:
                self._beat.write_text(f"{self._owner['start']} {number}\n")
            except OSError as error:
                if not told:
                    say(f"{self._beat}: {error.strerror}: others cannot see that this run lives")
                told = True

    def release(self) -> None:
        """Gives the folder back."""
        self._over.set()
        self._thread.join()
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            say(f"{self._file}: {error.strerror}; the next start sees that this process is gone")


def _read(file: Path) -> dict[str, Any]:
    """The owner's entry; of a broken file one without a name, whose heartbeat still tells."""
    unnamed: dict[str, Any] = dict.fromkeys(("start", "host", "pid"), "?")
    try:
        return unnamed | json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError):
        return unnamed


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def check_free(run_dir: Path) -> None:
    """Raise UserError, with its host, process and job, if another start trains in the run folder.

    What this very Slurm job was before its restart is no other: Slurm has ended it, and should its
    node wake up again, the fence stops it. On this machine the process itself is looked for; of
    another machine's, a sign of life is awaited for 30 s, without comparing clocks.
    """
    owner, (job, restarts) = _read(run_dir / "holder.json"), slurm_start()
    earlier = owner.get("restarts")
    same = job is not None and owner.get("job") == job
    if not owner or (same and isinstance(earlier, int) and earlier < restarts):
        return
    name = f"start {owner['start']} on {owner['host']}, pid {owner['pid']}"
    name += f", Slurm job {owner['job']}" if owner.get("job") else ""
    if owner.get("machine") == _machine():
        began = _began(owner["pid"]) if isinstance(owner["pid"], int) else None
        if owner["pid"] == os.getpid() or began is None or began != owner.get("began"):
            return
    else:
        before, since = _text(run_dir / "heartbeat"), time.monotonic()
        while _text(run_dir / "heartbeat") == before:
            if time.monotonic() - since > WATCH_SECONDS:
                say(f"{run_dir}: no sign of life from {name} for {WATCH_SECONDS:g} s: taken over")
                return
            time.sleep(0.5)
    end = f"scancel {owner['job']}" if owner.get("job") else "end it with SIGTERM"
    raise UserError(
        f"run_dir={run_dir}: is in use by {name}, which is training there; wait for it, or {end},"
        " or choose another run_dir"
    )
