"""Whose a run folder is: ``holder-N.json`` is start N's, and its number the fencing token."""

import errno
import json
import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import (
    fsync,
    lines_of,
    parse_json,
    read_text,
    remove_strays,
    write_atomically,
)
from scalepeft.core.log import say
from scalepeft.core.slurm import slurm_start

BEAT_SECONDS = 2.0
WATCH_SECONDS = 30.0  # without a sign of life from another machine, after which it counts as gone
HOLDER = re.compile(r"holder-?(\d*)\.json")  # without a number: an older version's
STRAYS = ("*.tmp", ".*.tmp", "*/*.tmp", "eval*/*/*.tmp", ".seen-by-all-nodes-*")
RECORDS = ("events.jsonl", "heartbeat", "log.txt")  # not replaced as a whole but written in place
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class Superseded(Exception):
    """A newer start of the same run owns the folder; this process must not write."""


def _holders(run_dir: Path) -> dict[int, Path]:
    """Number of a start -> its file; raises OSError where the folder cannot be listed."""
    found = ((HOLDER.fullmatch(name), run_dir / name) for name in os.listdir(run_dir))
    return {int(match[1] or 0): file for match, file in found if match}


def stored_generation(run_dir: Path) -> int:
    """Number of the start that owns a run folder; 0 where none ever did."""
    return max(_holders(run_dir), default=0)


def _largest_generation(run_dir: Path) -> int:
    """The largest generation that the run's events and checkpoints were written under."""
    files = (run_dir / "events.jsonl", *run_dir.glob("checkpoints/*/manifest.json"))
    lines = (line for file in files for line in lines_of(file))
    numbers = (n for line in lines for n in re.findall(rb'"generation": (\d{1,17})\b', line))
    return max(map(int, numbers), default=0)


def claim(run_dir: Path) -> int:
    """Make the folder this process's own, and return the number of this start. Its file gets its
    name in one act that fails where that is taken (on NFS too). Raises OSError, and UserError:
    another start holds the folder, or a record in it is a link.
    """
    for file in (run_dir / name for name in RECORDS):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise UserError(
                f"{file}: is a link, or no file: a run writes in its own folder; remove it"
            )
    job, restarts = slurm_start()
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
    owner |= {"began": _began(os.getpid()), "job": job, "restarts": restarts}
    while True:
        # In this order, else a start that comes meanwhile is not the one that is looked at. The
        # records count too: were the holders lost, an older start could take itself for the newest.
        begun = _largest_generation(run_dir)
        number = max(begun, check_free(run_dir)) + 1
        file = run_dir / f"holder-{number}.json"
        if not _make(file, json.dumps({"start": number} | owner) + "\n"):
            continue  # who was faster is looked at
        fsync(run_dir)
        holders = _holders(run_dir)
        if max(holders) == number:
            break
        file.unlink()  # frozen before it was made, for longer than a whole start took
    for older in holders.keys() - {number}:
        holders[older].unlink(missing_ok=True)
    remove_strays(run_dir, *STRAYS)
    return number


def _make(file: Path, text: str) -> bool:
    """Make a file of this text, at once and whole; False where its name is taken."""
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write_atomically(temporary, text)
        with suppress(FileExistsError):  # which NFS also says where its first answer was lost
            os.link(temporary, file)
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with suppress(FileExistsError), file.open("x") as f:
            return f.write(text) > 0
        return False
    finally:
        temporary.unlink(missing_ok=True)


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
    """This process's sign of life in the run folder that it claimed, until ``release``."""

    def __init__(self, run_dir: Path, generation: int) -> None:
        self._file, self._beat = run_dir / f"holder-{generation}.json", run_dir / "heartbeat"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        number, told = 0, False
        while not self._over.wait(BEAT_SECONDS):
            number += 1
            try:
                self._beat.write_text(f"{self._file.stem} {number}\n")
            except OSError as error:
                if not told:
                    say(f"{self._beat}: {error.strerror}: others cannot see that this run lives")
                told = True

    def release(self) -> None:
        """Gives the folder back."""
        self._over.set()
        self._thread.join()
        try:
            if self._file.exists():  # else a newer start has taken over
                write_atomically(self._file, "{}\n")
        except OSError as error:
            say(f"{self._file}: {error.strerror}; the next start sees that this process is gone")


def _read(file: Path) -> dict[str, Any]:
    """The owner's entry, empty once it is released; of a broken file one without a name."""
    found: Any = None
    with suppress(ValueError):
        found = parse_json(_text(file))
    unnamed: dict[str, Any] = dict.fromkeys(("start", "host", "pid"), "?")
    return found and unnamed | found if isinstance(found, dict) else unnamed


def _text(file: Path) -> str:
    with suppress(OSError, ValueError):
        return read_text(file)
    return ""


def check_free(run_dir: Path) -> int:
    """Return the number of the run folder's last start, which is over, or 0. Raises UserError if it
    trains there. What this Slurm job was before its restart is over; on this machine the process is
    looked for; another's sign of life is awaited for 30 s, without comparing clocks.
    """
    holders = _holders(run_dir) if run_dir.is_dir() else {}
    number = max(holders, default=0)
    owner, (job, restarts) = _read(holders[number]) if holders else {}, slurm_start()
    earlier = owner.get("restarts")
    same = job is not None and owner.get("job") == job
    if not owner or (same and isinstance(earlier, int) and earlier < restarts):
        return number
    name = f"start {owner['start']} on {owner['host']}, pid {owner['pid']}"
    name += f", Slurm job {owner['job']}" if owner.get("job") else ""
    if owner.get("machine") == _machine():
        began = _began(owner["pid"]) if isinstance(owner["pid"], int) else None
        if owner["pid"] == os.getpid() or began is None or began != owner.get("began"):
            return number
    else:
        before, since = _text(run_dir / "heartbeat"), time.monotonic()
        while _text(run_dir / "heartbeat") == before:
            if time.monotonic() - since > WATCH_SECONDS:
                say(f"{run_dir}: no sign of life from {name} for {WATCH_SECONDS:g} s: taken over")
                return number
            time.sleep(0.5)
        if stored_generation(run_dir) != number:  # the sign of life is its successor's
            return check_free(run_dir)
    end = f"scancel {owner['job']}" if owner.get("job") else "end it with SIGTERM"
    raise UserError(
        f"run_dir={run_dir}: is in use by {name}, which is training there; wait for it, or {end},"
        " or choose another run_dir"
    )
