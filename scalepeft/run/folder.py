"""Reading a run's folder: its config, and whether it is the same run and file system."""

import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

from scalepeft.config import changes
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping, try_to_write
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import steps_of, writing_in


def load_run(run_dir: str, settings: list[str], allowed: tuple[str, ...], what: str) -> RunConfig:
    """Reads a run's config and lays settings of ``allowed`` keys (``engine.``: a section) over it,
    for ``what``. Raises UserError: not a run folder, or a setting that would make it another run.
    """
    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is not a run directory (no config.yaml); name a run's run_dir")
    values = read_mapping(file, config_files.parse_yaml, "restore the config of the run")
    for setting in settings:
        key = cfg.renamed_key(setting.partition("=")[0])
        if not changes.matches_key(key, allowed):
            raise UserError(
                f"{key}: cannot be changed for {what}; allowed:"
                f" {', '.join(k + 'KEY' if k.endswith('.') else k for k in allowed)}"
            )
    return replace(config_files.overlay(values, settings), run_dir=run_dir)


def older_adapter(run_dir: Path, step: int | None) -> str | None:
    """Says that the run has gone on since its adapter was written; None where it has not."""
    newest = max(steps_of(run_dir), default=step)
    if step is None or newest == step:
        return None
    return (
        f"the adapter is that of step {step}, the newest checkpoint of step {newest}: the run went"
        " on after it, or is still training"
    )


def check_same_run(config: RunConfig, allow_changes: bool) -> None:
    """Raise UserError if the folder holds a run of other settings, or one without config.yaml."""
    file = Path(config.run_dir) / "config.yaml"
    # Before the first checkpoint there is nothing that another config could spoil.
    if not any(file.parent.glob("checkpoints/step-*")):
        return
    remedy = "restore it (the run's config cannot be compared without), or choose another run_dir"
    held = read_mapping(file, config_files.parse_yaml, remedy)
    try:
        held = cfg.to_dict(cfg.from_dict(held))  # keys that are newer than the run: their defaults
    except UserError as error:
        raise UserError(f"{file}: {error}; {remedy}") from None
    changed = changes.differences(held, cfg.to_dict(config))
    if not changed:
        return
    listed = "; ".join(f"{key}: {was} there, {now} now" for key, (was, now) in changed.items())
    harmful = [key for key in changed if not changes.is_harmless(key)]
    if harmful or not allow_changes:
        what = f"set {', '.join(harmful)} back" if harmful else "add --resume-with-changes"
        raise UserError(
            f"run_dir={config.run_dir} holds a run with another config ({listed}); {what}, or"
            " choose another run_dir"
        )


def check_nodes(run_dir: str, ranks: Ranks) -> None:
    """Raise UserError unless all nodes see and write the same folder: any may be rank 0's next."""
    folder = Path(run_dir)

    def mark() -> str:
        with writing_in(folder):
            ours = f".{socket.gethostname()}.{os.getpid()}.tmp"  # removed, should this one die
            handle, name = tempfile.mkstemp(ours, ".seen-by-all-nodes-", folder)
        os.close(handle)
        return name

    seen = Path(ranks.run_on_main(mark))

    def look() -> None:
        with writing_in(folder):
            if not seen.exists():
                raise UserError(
                    f"run_dir={folder}: is another folder on {socket.gethostname()} than on rank"
                    " 0's node; it must be on a file system that all nodes share"
                )
            try_to_write(folder)

    try:
        ranks.all_or_raise(lambda: look() if ranks.local_rank == 0 else None)
    finally:
        if ranks.is_main:
            seen.unlink(missing_ok=True)
