"""What a run of the config reads, and what training refuses before it loads anything."""

import os
from pathlib import Path
from typing import Any

from scalepeft.build import check_batch, task_of
from scalepeft.cluster.doctor.check import Check, Context
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.slurm import slurm_start
from scalepeft.data.rows import expand, paths_of
from scalepeft.models import hub
from scalepeft.models.weights import Weights
from scalepeft.run.folder import check_same_run
from scalepeft.run.lease import check_free


def base(context: Context) -> Any:
    """Look for base and tokenizer without a network; return the fingerprint.

    Raises:
        UserError: it is here and cannot be used, or it is not and there is no hub.
    """
    model = context.config.model
    if model.path == hub.BUILTIN:
        return f"{model.path} is made in the cache when it is needed"
    hub.check_place(model.path)
    absent = (
        "info",
        f"{model.path} is not here: each node downloads it at the start (HF_HOME on a shared file"
        " system: once)",
    )
    folder = base_folder(context.config)
    if folder is None:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise UserError(
                f"model.path={model.path}: not in the hub's cache, and HF_HUB_OFFLINE is set;"
                " download it where there is a network, or name its folder"
            )
        return absent
    try:
        hub.architecture(folder)
        weights = Weights(folder)
    except UserError:
        if str(folder) == model.path:
            raise
        return absent  # an interrupted download is resumed
    hub.load_tokenizer(model, folder)
    fingerprint = weights.fingerprint()[:12]
    return f"{model.path}: complete shards and a tokenizer; fingerprint {fingerprint}"


def base_folder(config: RunConfig) -> Path | None:
    """Return the base's folder on this node; None if it has to be downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = config.model.path, config.model.revision
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


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
        text = f"{', '.join(found)}; {broken} broken ones are left out (data.on_error=skip)"
        return "warn", text
    return ", ".join(found) or ("info", "of the hub: read when training starts")


def batch(context: Context) -> str:
    """Refuse a global batch that the ranks cannot share."""
    check_batch(context.config, context.ranks.world_size)
    each = context.config.train.global_batch // context.ranks.world_size
    return f"{each} rows a step on each rank"


def same_run(context: Context) -> str:
    """Refuse a run folder that holds a checkpoint of another config."""
    check_same_run(context.config, allow_changes=False)
    return f"run_dir={context.run_dir} holds no checkpoint of another config"


def free(context: Context) -> str:
    """Refuse a run folder in which another process trains."""
    check_free(context.run_dir, *slurm_start())
    return f"run_dir={context.run_dir} is not in use"


CHECKS = (
    Check("base", base, on="nodes"),
    Check("data", data, on="nodes"),
    Check("rows", rows, on="main"),
    Check("global batch", batch, on="main"),
    Check("run config", same_run, on="main"),
    Check("holder", free, on="main"),
)
