"""The file system of a run folder: does it hold what a checkpoint relies on, here and as the other
nodes see it?
"""

import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalepeft.cluster.doctor.findings import Finding, by_value, fix, warn, where
from scalepeft.cluster.doctor.rendezvous import Outcome
from scalepeft.core.files import fsync, try_to_write, write_atomically
from scalepeft.core.text import size

FILES = 64  # in the folder whose rename is watched
SEEN_WITHIN = 10.0  # seconds that another node may take to see what rank 0 wrote
LOGS = 16 << 20  # bytes: room for metrics, events and manifests
HALF_WRITTEN = (
    "a crash during a save can leave a half-written checkpoint under its final name; it is passed"
    " over by its checksum, and an older one is used"
)
# File systems that give a guarantee up in silence, by their type in /proc/self/mountinfo.
COPIES = ("s3fs", "gcsfuse", "goofys", "rclone", "mount-s3", "blobfuse", "ossfs")
MEMORY = ("tmpfs", "ramfs")


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(f for f in (folder, *folder.parents) if f.exists())


def file_system(folder: Path) -> str:
    """Its type, as ``ext4`` or ``fuse.s3fs``; empty where the kernel does not say."""
    mounts = Path("/proc/self/mountinfo")
    found, length = "", -1
    for line in mounts.read_text().splitlines() if mounts.is_file() else []:
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if folder.resolve().is_relative_to(point) and len(point) >= length:
            found, length = right.split()[0], len(point)
    return found


def rename_is_whole(source: Path, target: Path, rename: Callable[[Path, Path], Any]) -> bool:
    """Renames a folder while a thread looks at the new name; False if it ever saw a part of it."""
    whole = len(os.listdir(source))
    fewest = [whole]
    started, over = threading.Event(), threading.Event()

    def look() -> None:
        while not over.is_set():
            try:
                fewest[0] = min(fewest[0], len(os.listdir(target)))
            except FileNotFoundError:
                continue
            finally:
                started.set()

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    started.wait()
    try:
        rename(source, target)
    finally:
        over.set()
        watcher.join()
    return fewest[0] == whole == len(os.listdir(target)) and not source.exists()


def _timed(work: Callable[[], Any]) -> float | str:
    """Seconds, or the system's complaint."""
    began = time.monotonic()
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return time.monotonic() - began


def _append_and_cut(file: Path) -> None:
    """As metrics.jsonl and events.jsonl are written."""
    file.write_bytes(b"one\n")
    with file.open("r+b", buffering=0) as f:
        f.seek(4)
        f.truncate()
        f.write(b"two\nthree\n")
    os.truncate(file, 8)
    with file.open("a") as f:
        f.write("four\n")
    if (held := file.read_bytes()) != b"one\ntwo\nfour\n":
        raise OSError(5, f"read back {held!r}")


def _refuses_a_second(file: Path) -> None:
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    raise OSError(5, "an exclusive create of a file that is there succeeded")


def make_probe(folder: Path) -> str:
    """Makes an empty folder beside or in ``folder`` for the checks. Raises OSError."""
    base = existing(folder)
    if not base.is_dir():
        raise NotADirectoryError(20, f"{base} is a file")
    return tempfile.mkdtemp(prefix=".scalepeft-doctor-", dir=base)


def probe(folder: Path, rename: Callable[[Path, Path], Any] = os.rename) -> dict[str, Any]:
    """Does what a save does, in an empty folder: seconds or a complaint for each step of it."""
    source, target = folder / "step.tmp", folder / "step"
    found: dict[str, Any] = {"type": file_system(folder)}
    source.mkdir()
    write_atomically(folder / "generation", "1")  # Publisher's, for the ranks to look at
    found["write"] = _timed(lambda: try_to_write(folder))
    (source / "data").write_bytes(bytes(1 << 20))
    found["fsync of a file"] = _timed(lambda: fsync(source / "data"))
    found["fsync of a folder"] = _timed(lambda: fsync(source))
    for i in range(FILES):
        (source / str(i)).write_text("x")
    whole: list[bool] = []
    found["rename of a folder"] = _timed(
        lambda: whole.append(rename_is_whole(source, target, rename))
    )
    found["whole"] = whole == [True]
    found["replacing a file"] = _timed(lambda: write_atomically(folder / "data", "x"))
    found["append and truncate"] = _timed(lambda: _append_and_cut(folder / "rows"))
    found["exclusive create"] = _timed(lambda: _refuses_a_second(folder / "one"))
    return found


def room(folder: Path) -> dict[str, int]:
    """Free bytes and inodes (-1 where the file system counts none), and checkpoints held now."""
    held = sum(f.stat().st_size for f in folder.glob("checkpoints/step-*/*") if f.is_file())
    stat = os.statvfs(existing(folder))
    inodes = stat.f_favail if stat.f_files else -1
    return {"bytes": stat.f_bavail * stat.f_frsize, "inodes": inodes, "held": held}


class Publisher:
    """Rank 0 writes, all ranks look until they see it. Their stages run this at the same time.

    Everyone looks once before: names that are not there and contents are cached too.
    """

    def __init__(self, folder: Path, store: Any, rank: int, world_size: int) -> None:
        self.folder, self.store = folder, store
        self.rank, self.world_size = rank, world_size

    def run(self) -> dict[str, Any]:
        """Returns the seconds until a renamed folder and a replaced file were seen, None if not
        in time; or where the folder is not the same one.
        """
        found: dict[str, Any] = {"folder": None, "file": None, "write": None}
        absent = not (self.folder / "generation").is_file()
        self._look("")
        if not absent:
            found["write"] = _timed(lambda: try_to_write(self.folder))
        self.store.add("looked", 1)
        if self.rank == 0:
            while self.store.add("looked", 0) < self.world_size:
                time.sleep(0.005)
            digest = ""
            try:
                digest = self._publish()
            finally:  # the others are not to wait for what cannot come
                self.store.set("published", digest)
        digest = self.store.get("published").decode()
        began = time.monotonic()
        while not absent and time.monotonic() - began < SEEN_WITHIN:
            seen = self._look(digest)
            for key in seen:
                found[key] = found[key] if found[key] is not None else time.monotonic() - began
            if len(seen) == 2:
                break
            time.sleep(0.05)
        return {**found, "absent": absent}

    def _publish(self) -> str:
        temporary, data = self.folder / "seen.tmp", os.urandom(1 << 16)
        temporary.mkdir()
        (temporary / "data").write_bytes(data)
        fsync(temporary / "data")
        temporary.rename(self.folder / "seen")
        fsync(self.folder)
        write_atomically(self.folder / "generation", "2")
        return hashlib.sha256(data).hexdigest()

    def _look(self, digest: str) -> list[str]:
        seen = []
        try:
            if (self.folder / "generation").read_text() == "2":
                seen.append("file")
            data = (self.folder / "seen" / "data").read_bytes()
            if hashlib.sha256(data).hexdigest() == digest:
                seen.append("folder")
        except OSError:  # not yet; by the end it counts as not seen
            return seen
        return seen


def remove(folder: Path) -> None:
    """Takes the probe away."""
    shutil.rmtree(folder, ignore_errors=True)


def judge_writing(name: str, error: str, host: str | None = None) -> Finding:
    """A folder that cannot be written."""
    host = host or socket.gethostname()
    return fix(
        "run folder",
        f"{name} cannot be written on {host}: {error}",
        "make room, mount it writable, or choose another run_dir",
    )


def judge_probe(name: str, found: dict[str, Any]) -> list[Finding]:
    """Which guarantees the file system gives."""
    listed: list[Finding] = []
    for step in ("write", "fsync of a file", "fsync of a folder", "rename of a folder",
                 "replacing a file", "append and truncate"):  # fmt: skip
        if isinstance(found[step], str):
            lost = "every save would fail" if step != "append and truncate" else "logs would break"
            listed.append(
                fix("run folder", f"{name} ({found['type']}): {step}: {found[step]}: {lost}",
                    "choose a run_dir on another file system")
            )  # fmt: skip
    kind = found["type"].removeprefix("fuse.")
    if isinstance(found["rename of a folder"], float) and (
        not found["whole"] or kind.startswith(COPIES)
    ):
        seen = "was seen half done" if not found["whole"] else "copies file by file"
        listed.append(
            warn("run folder", f"{name} ({found['type']}): the rename of a folder {seen}:"
                 f" {HALF_WRITTEN}", "a file system with atomic rename (ext4, XFS, NFS, Lustre)")
        )  # fmt: skip
    if isinstance(found["exclusive create"], str):
        listed.append(
            warn("run folder", f"{name} ({found['type']}): {found['exclusive create']}: two"
                 " processes can take the same temporary name", "start one run at a time in it")
        )  # fmt: skip
    if kind in MEMORY:
        listed.append(
            warn("run folder", f"{name} is {kind}, in this node's memory: nothing in it survives a"
                 " reboot, or a job on another node", "choose a run_dir on a disk")
        )  # fmt: skip
    if not [f for f in listed if f.state == "fix"]:
        times = ", ".join(
            f"{step} {1000 * found[step]:.1f} ms"
            for step in ("fsync of a file", "fsync of a folder", "rename of a folder")
        )
        listed.insert(0, Finding("run folder", "ok", f"{name} ({found['type']}): {times}"))
    return listed


def judge_seen(name: str, outcomes: list[Outcome], hosts: dict[int, str]) -> list[Finding]:
    """Whether all ranks see one and the same folder, and how soon."""
    seen = {r: o.value for r, o in enumerate(outcomes) if o.error is None}
    listed = [
        fix("run folder", f"{where([r], hosts)}: {name}: {o.error}")
        for r, o in enumerate(outcomes)
        if o.error is not None
    ]
    if absent := [r for r, v in seen.items() if v["absent"]]:
        listed.append(
            fix("run folder", f"{name} is another folder on {where(absent, hosts)} than on rank 0's"
                " node", "put run_dir on a file system that all nodes share")
        )  # fmt: skip
    here = {r: v for r, v in seen.items() if not v["absent"]}
    locked = {r: v["write"] for r, v in here.items() if isinstance(v["write"], str)}
    if locked:
        listed.append(
            fix("run folder", f"{name} cannot be written: {by_value(locked, hosts)}",
                "any node may hold rank 0 after a restart: make it writable on all")
        )  # fmt: skip
    for key, what, lost in (
        ("folder", "a folder that rank 0 renamed", "a restart there could pass over the newest"
         " checkpoint"),
        ("file", "a file that rank 0 replaced", "an older start could write on after a newer one"
         " took the run"),
    ):  # fmt: skip
        if late := [r for r, v in here.items() if v[key] is None]:
            listed.append(
                warn("run folder", f"{where(late, hosts)} did not see {what} within"
                     f" {SEEN_WITHIN:.0f} s: {lost}", "shorten the attribute cache (NFS: actimeo)")
            )  # fmt: skip
    if len(outcomes) > 1 and not listed:
        slowest = max(max(v["folder"], v["file"]) for v in here.values())
        listed.append(
            Finding("run folder", "ok", f"all {len(outcomes)} ranks see the same folder and write"
                    f" in it; what rank 0 changes is seen after {1000 * slowest:.0f} ms at most")
        )  # fmt: skip
    return listed


def judge_room(name: str, free: dict[str, int], checkpoint: int | None, keep: int) -> Finding:
    """Whether ``keep`` checkpoints and the one being written fit.

    Args:
        name: of the folder.
        free: what ``room`` found.
        checkpoint: bytes of one; None if no config says.
        keep: ``train.keep_checkpoints``.
    """
    room_now = f"{name}: {size(free['bytes'])} free"
    if free["inodes"] >= 0:
        room_now += f", {free['inodes']} inodes"
    if checkpoint is None:
        need = LOGS
    else:
        need = max(0, (keep + 1) * checkpoint - free["held"]) + checkpoint // 3 + LOGS
        room_now += (
            f"; a run needs {size(need)} more ({keep} checkpoints of {size(checkpoint)}, the one"
            " being written, the adapter, logs)"
        )
    remedy = "make room, choose another run_dir, or lower train.keep_checkpoints"
    if free["bytes"] < need:
        return fix("free space", room_now, remedy)
    if 0 <= free["inodes"] < 10 * (keep + 1):
        return fix("free space", f"{room_now}: too few inodes", "remove files there")
    return Finding("free space", "ok", f"{room_now}; a quota is not seen here")
