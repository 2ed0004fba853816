"""The file system of a run folder: does it hold what a checkpoint relies on, and do all nodes see
the same folder?
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalepeft.adapters import inject
from scalepeft.cluster.doctor.check import Check, Context, Verdict
from scalepeft.cluster.doctor.findings import Hosts, Values, by_value, where
from scalepeft.cluster.doctor.inputs import base_folder
from scalepeft.config.schema import RunConfig
from scalepeft.core.files import fsync, try_to_write, write_atomically
from scalepeft.core.text import size
from scalepeft.models import structure, tiny
from scalepeft.models.hub import BUILTIN

SEEN_WITHIN = 5.0  # seconds that another node may take to see a new file
LOGS = 16 << 20  # bytes: room for metrics, events and manifests
# File systems that give a guarantee up in silence, by their type in /proc/self/mountinfo.
WEAK = {
    ("s3fs", "gcsfuse", "goofys", "rclone", "mount-s3", "blobfuse", "ossfs"): (
        "the rename of a folder copies file by file: a crash during a save can leave a half-written"
        " checkpoint under its final name, which is passed over by its checksum",
        "choose a file system with atomic rename (ext4, XFS, NFS, Lustre)",
    ),
    ("tmpfs", "ramfs"): (
        "in this node's memory: nothing in it survives a reboot, or a job on another node",
        "choose a run_dir on a disk",
    ),
}


def probe_saving(context: Context) -> dict[str, Any]:
    """Do what a save does, in a new folder; return each step's seconds or error, and ``type``."""
    try:
        name = tempfile.mkdtemp(prefix=".scalepeft-doctor-", dir=existing(context.run_dir))
        context.rendezvous.client().set("folder", name)
        (Path(name) / "token").write_text(name)
    except OSError as error:
        text = f"run_dir={context.run_dir} cannot be written: {error.strerror}"
        raise OSError(text) from None
    return {"type": file_system(Path(name)), **save_steps(Path(name))}


def save_steps(folder: Path, rename: Callable[[Path, Path], Any] = os.rename) -> dict[str, Any]:
    """Do what a save does, in a folder; return step -> seconds, or the system's error."""
    source, target, log = folder / "step.tmp", folder / "step", folder / "log"
    source.mkdir()

    def rename_all() -> None:
        rename(source, target)
        if source.exists() or os.listdir(target) != ["data"]:
            raise OSError(5, f"it holds {os.listdir(target)} afterwards")

    def append() -> None:  # as metrics.jsonl is written after a resume
        os.truncate(log, 4)
        with log.open("a") as f:
            f.write("two\n")
        if (text := log.read_bytes()) != b"one\ntwo\n":
            raise OSError(5, f"read back {text!r}")

    steps: dict[str, Callable[[], Any]] = {
        "write": lambda: (source / "data").write_bytes(bytes(1 << 20)),
        "fsync of a file": lambda: fsync(source / "data"),
        "fsync of a folder": lambda: fsync(source),
        "rename of a folder": rename_all,
        "replacing a file": lambda: write_atomically(log, "one\nold\n"),
        "append and truncate": append,
    }
    results: dict[str, Any] = {}
    for step, work in steps.items():
        start = time.monotonic()
        try:
            work()
            results[step] = time.monotonic() - start
        except OSError as error:
            results[step] = error.strerror or str(error)
    return results


def check_saving(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield the guarantees that the file system does not give."""
    name, times = f"run_dir={context.run_dir} ({values[0]['type']}): ", []
    for step, result in values[0].items():
        if isinstance(result, float):
            times.append(f"{step} {1000 * result:.1f} ms")
        elif step != "type":
            remedy = "make room, or choose a run_dir on another file system"
            yield "fix", f"{name}{step}: {result}: saves would fail", remedy
    for kinds, (text, remedy) in WEAK.items():
        if values[0]["type"].removeprefix("fuse.").startswith(kinds):
            yield "warn", name + text, remedy
    yield "ok", name + ", ".join(times)


def clean_up(context: Context) -> None:
    """Remove the folder of ``probe_saving``, on rank 0."""
    if context.ranks.is_main and (store := context.rendezvous.client()).check(["folder"]):
        shutil.rmtree(store.get("folder").decode(), ignore_errors=True)


def probe_same(context: Context) -> str | None:
    """Return why rank 0's folder cannot be written from here; None: it is another folder here."""
    folder = Path(context.rendezvous.client().get("folder").decode())
    until = time.monotonic() + SEEN_WITHIN
    while not (folder / "token").is_file():
        if time.monotonic() > until:
            return None
        time.sleep(0.1)
    try:
        try_to_write(folder)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_same(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield the nodes that see another folder, or one they cannot write."""
    name = f"run_dir={context.run_dir}"
    if other := [rank for rank, error in values.items() if error is None]:
        text = f"{name} is another folder on {where(other, hosts)} than on rank 0's node"
        yield "fix", text, "put run_dir on a file system that all nodes share"
    if errors := {rank: error for rank, error in values.items() if error}:
        remedy = "any node may hold rank 0 after a restart: make it writable on all"
        yield "fix", f"{name} cannot be written: {by_value(errors, hosts)}", remedy
    if len(values) > 1:
        yield "ok", f"all {len(values)} ranks see the same folder and write in it"


def probe_space(context: Context) -> dict[str, Any]:
    """Return free bytes and inodes (None where none are counted), bytes of the checkpoints that are
    there and of one of this config (None: not known).
    """
    run_dir, config = context.run_dir, context.config
    stat = os.statvfs(existing(run_dir))
    files = (f for f in run_dir.glob("checkpoints/step-*/*") if f.is_file())
    return {
        "bytes": stat.f_bavail * stat.f_frsize,
        "inodes": stat.f_favail if stat.f_files else None,
        "stored": sum(f.stat().st_size for f in files),
        "checkpoint": checkpoint_bytes(config) if config else None,
        "keep": config.train.keep_checkpoints if config else 0,
    }


def check_space(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield whether the checkpoints that are kept and the one being written fit."""
    bytes_free, inodes, stored, one, keep = values[0].values()
    text, need = f"run_dir={context.run_dir}: {size(bytes_free)} free", LOGS
    if one is not None:
        need += max(0, (keep + 1) * one - stored) + one // 3
        text += (
            f"; a run needs {size(need)} more ({keep} checkpoints of {size(one)}, the one being"
            " written, the adapter, logs)"
        )
    if bytes_free < need:
        yield "fix", text, "make room, choose another run_dir, or lower train.keep_checkpoints"
    elif inodes is not None and inodes < 10 * (keep + 1):
        yield "fix", f"{text}: {inodes} inodes are too few", "remove files there"
    else:
        yield "ok", f"{text}; a quota is not seen here"


def checkpoint_bytes(config: RunConfig) -> int | None:
    """Return the size of one checkpoint: the adapter and AdamW's two moments in fp32.

    Returns:
        None for a base of the hub that is not in this node's cache: its shape is not known.

    Raises:
        UserError: the base or the adapter's config is wrong.
    """
    folder = tiny.make(0) if config.model.path == BUILTIN else base_folder(config)
    if folder is None or not (folder / "config.json").is_file():
        return None
    model = structure.build(config.model, folder, config.train.precision)
    inject.inject(model, config.adapter)
    return 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(f for f in (folder, *folder.parents) if f.exists())


def file_system(folder: Path) -> str:
    """Return its type, as ``ext4`` or ``fuse.s3fs``; empty where the kernel does not say."""
    mounts = Path("/proc/self/mountinfo")
    kind, length = "", -1
    for line in mounts.read_text().splitlines() if mounts.is_file() else []:
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if folder.resolve().is_relative_to(point) and len(point) >= length:
            kind, length = right.split()[0], len(point)
    return kind


REMEDY = "make room, mount it writable, or choose another run_dir"
SAVING = Check("run folder", probe_saving, check_saving, on="main", remedy=REMEDY)
SAME = Check("run folder", probe_same, check_same, remedy=REMEDY)
SPACE = Check("free space", probe_space, check_space, on="main", remedy=REMEDY)
