"""What a run reads, what training refuses early, and whether the run folder's disk holds saves."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from scalepeft.build import check_batch, task_of
from scalepeft.cluster.doctor.check import Context
from scalepeft.cluster.plan.memory import resident
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import fsync, try_to_write, write_atomically
from scalepeft.core.slurm import output_of
from scalepeft.core.text import size
from scalepeft.data.rows import expand, paths_of
from scalepeft.models import dimensions, hub
from scalepeft.models.weights import Weights

SEEN_WITHIN = 5.0  # seconds that another node may take to see a new file
LOGS = 16 << 20  # bytes: room for metrics, events and manifests
# What file systems do that give a guarantee up in silence, by their type.
WEAK = {
    r"(fuse\.)?(s3fs|gcsfuse|goofys|rclone|mount-s3|blobfuse|ossfs).*": "renames a folder file by"
    " file: a crash in a save can leave half a checkpoint under its final name, passed over by"
    " its checksum -> choose ext4, XFS, NFS or Lustre",
    "tmpfs|ramfs": "is this node's memory: nothing in it survives a reboot, or a job on another"
    " node -> choose a run_dir on a disk",
}


def base(context: Context) -> Any:
    """The base's fingerprint, without a network. Raises UserError: unusable, or not to be had."""
    model = context.config.model
    folder = Path(model.path)
    if model.path == hub.BUILTIN:
        return f"{model.path} is made in the cache when it is needed"
    hub.check_place(model.path)
    if not folder.is_dir():
        try:
            name, revision = model.path, model.revision
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
            Weights(folder)
        except (OSError, ValueError, UserError):  # a download that was interrupted is resumed
            if said := hub.unfetched(f"model.path={name}"):
                raise UserError(said) from None
            text = "not here: each node downloads it at the start (HF_HOME on a shared disk: once)"
            return "info", f"{name} is {text}"
    hub.architecture(folder)
    fingerprint = Weights(folder).fingerprint()[:12]
    hub.load_tokenizer(model, folder)
    return f"{model.path}: complete shards and a tokenizer; fingerprint {fingerprint}"


def data(context: Context) -> Any:
    """Look for the files of rows, not into them; return their number and bytes by split."""
    found = []
    for split in ("train", "valid", "test"):
        if sources := getattr(context.config.data, split):
            files = expand(sources, f"data.{split}")
            total = sum(p.stat().st_size for source in files for p in paths_of(source))
            found.append(f"data.{split} {len(files)} files of {total} bytes")
    return ", ".join(found) or ("info", "no files")


def rows(context: Context) -> Any:
    """Read the rows as training does; data sets of the hub are left to it."""
    config, found, broken = context.config, [], 0
    task = task_of(config)
    for split in ("train", "valid") if config.data.valid else ("train",):
        if not any(s.startswith("hf://") for s in getattr(config.data, split)):
            found.append(f"{len(task.examples(split))} of data.{split}")
            broken += len(task.skipped)
    if broken:
        text = ", ".join(found)
        return "warn", f"{text}; {broken} broken ones are left out (data.on_error=skip)"
    return ", ".join(found) or ("info", "of the hub: read when training starts")


def batch(context: Context) -> str:
    """Refuse a global batch that the ranks cannot share."""
    check_batch(context.config, context.ranks.world_size)
    return f"{context.config.train.global_batch // context.ranks.world_size} rows a step on a rank"


def saving(context: Context) -> Any:
    """Do what a save does, in a new folder."""
    check_writable(f"run_dir={context.run_dir}", context.run_dir)
    folder = Path(tempfile.mkdtemp(prefix=".scalepeft-doctor-", dir=existing(context.run_dir)))
    context.store.clone().set("folder", str(folder))
    kind = "".join(output_of("df", "--output=fstype", str(folder)).split()[-1:])
    name = f"run_dir={context.run_dir} ({kind})"
    try_to_save(folder, name)
    (folder / "token").touch()
    for kinds, text in WEAK.items():
        if re.fullmatch(kinds, kind):
            return "warn", f"{name} {text}"
    return f"{name}: write, fsync, atomic rename, append and truncate"


def try_to_save(folder: Path, name: str, rename: Callable[[Path, Path], Any] = os.rename) -> None:
    """Do what a save does, in a folder. Raises OSError: names the step that fails."""
    source, target, log = folder / "step.tmp", folder / "step", folder / "log"
    step = "write"
    try:
        source.mkdir()
        (source / "data").write_bytes(bytes(1 << 20))
        step = "fsync"
        fsync(source / "data")
        fsync(source)
        step = "rename of a folder"
        rename(source, target)
        if source.exists() or os.listdir(target) != ["data"]:
            raise OSError(5, f"it holds {os.listdir(target)} afterwards")
        step = "append and truncate"  # as metrics.jsonl is written after a resume
        write_atomically(log, "one\nold\n")
        os.truncate(log, 4)
        with log.open("a") as f:
            f.write("two\n")
        if (text := log.read_bytes()) != b"one\ntwo\n":
            raise OSError(5, f"read back {text!r}")
    except OSError as error:
        raise OSError(f"{name}: {step}: {error.strerror or error}: saves would fail") from None


def clean_up(context: Context) -> None:
    """Remove the folder of ``saving``, on rank 0."""
    if context.ranks.is_main and (store := context.store.clone()).check(["folder"]):
        shutil.rmtree(store.get("folder").decode(), ignore_errors=True)


def same_folder(context: Context) -> str:
    """Look for rank 0's folder, and write there. Raises OSError: this cannot be done here."""
    folder = Path(context.store.clone().get("folder").decode())
    until = time.monotonic() + SEEN_WITHIN
    while not (folder / "token").is_file():
        if time.monotonic() > until:
            raise OSError(f"run_dir={context.run_dir} is not the folder of rank 0's node")
        time.sleep(0.1)
    check_writable(f"run_dir={context.run_dir}", folder)
    return "every rank sees the same folder and writes in it"


def space(context: Context) -> str:
    """Refuse a disk on which the checkpoints that are kept and the one being written do not fit."""
    run_dir, config, text = context.run_dir, context.config, ""
    stat, need, keep = os.statvfs(existing(run_dir)), LOGS, 0
    if config is not None and (one := checkpoint_bytes(config)) is not None:
        files = (f for f in run_dir.glob("checkpoints/step-*/*") if f.is_file())
        keep = config.train.keep_checkpoints
        need += max(0, (keep + 1) * one - sum(f.stat().st_size for f in files)) + one // 3
        text = f"; a run needs {size(need)} more ({keep} checkpoints of {size(one)}, the one being"
        text += " written, the adapter, logs)"
    text = f"run_dir={run_dir}: {size(stat.f_bavail * stat.f_frsize)} free{text}"
    if stat.f_bavail * stat.f_frsize < need:
        raise UserError(f"{text}; or lower train.keep_checkpoints")
    if stat.f_files and stat.f_favail < 10 * (keep + 1):
        raise UserError(f"{text}: {stat.f_favail} inodes are too few")
    return f"{text}; a quota is not seen here"


def checkpoint_bytes(config: RunConfig) -> int | None:
    """Return the size of one checkpoint; None for a base whose dimensions are not known here."""
    try:
        source = dimensions.find(config.model, network=False)
    except UserError:
        return None
    return resident(config, source, world=1, per_node=1).checkpoint


def existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(f for f in (folder, *folder.parents) if f.exists())


def check_writable(name: str, folder: Path) -> None:
    """Raise OSError if nothing can be put in the folder, or in the nearest above that is there."""
    try:
        try_to_write(existing(folder))
    except OSError as error:
        raise OSError(f"{name} cannot be written: {error.strerror or error}") from None
