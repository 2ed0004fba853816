"""Reading a run's folder: its config, and whether it is the same run and file system."""

import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from scalepeft.adapters.layout import ABOUT, CONFIG, Adapted, description_file, read_adapter
from scalepeft.config import changes
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping, try_to_write
from scalepeft.core.log import say
from scalepeft.models.hub import Base
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import steps_of, writing_in


def load_run(
    run_dir: str, settings: list[str], allowed: tuple[str, ...], what: str, task: bool = False
) -> RunConfig:
    """A run's config under settings of ``allowed`` keys (``engine.``: a section), for ``what``.
    Raises UserError: not a run folder, a setting that is not allowed, no ``task`` for an adapter.
    """
    file = Path(run_dir) / "config.yaml"
    if file.is_file():
        values = read_mapping(file, config_files.parse_yaml, "restore the config of the run")
    elif adapter_folder(run_dir).is_dir():
        if task and not any(s.startswith(("data=", "data.name=")) for s in settings):
            raise UserError(f"{run_dir}: is an adapter and no run; add data=TASK (data.test=FILES)")
        values = _of_adapter(Path(run_dir), settings)
        more = ("data", "data.", "train.precision") if "evaluate." in allowed else ()
        allowed = (*allowed, "model", "model.", *more)
    else:
        raise UserError(f"{run_dir} is not a run directory (no config.yaml); name a run's run_dir")
    for setting in settings:
        key = cfg.renamed_key(setting.partition("=")[0])
        if not changes.matches_key(key, allowed):
            raise UserError(
                f"{key}: cannot be changed for {what}; allowed:"
                f" {', '.join(k + 'KEY' if k.endswith('.') else k for k in allowed)}"
            )
    return replace(config_files.overlay(values, settings), run_dir=run_dir)


def _of_adapter(folder: Path, settings: list[str]) -> dict[str, Any]:
    """The config of a run that would have left this adapter: its settings, its base."""
    config, _, about = read_adapter(folder)
    base = about.get("base_model") or {}
    if not base.get("path") and not any(s.startswith(("model=", "model.path=")) for s in settings):
        raise UserError(f"{folder}: does not name its base; add model.path=FOLDER_OR_HUB_ID")
    keys = [key for key in ("path", "revision", "quant", "double_quant") if base.get(key)]
    model = {key: base[key] for key in keys}
    values = {"run_dir": str(folder), "model": model, "adapter": cfg.to_dict(config)}
    return {**values, "train": {"max_steps": 1}}


def adapter_folder(run_dir: str | Path) -> Path:
    """Where the adapter of a run is; of what is no run but an adapter's own folder, that itself."""
    folder = Path(run_dir)
    alone = (folder / CONFIG).is_file() and not (folder / "config.yaml").is_file()
    return folder if alone else folder / "adapter"


def read_run_adapter(run_dir: str | Path) -> Adapted:
    """``read_adapter`` of ``adapter_folder``. Raises UserError: the run did not write all of it."""
    folder = adapter_folder(run_dir)
    if folder != Path(run_dir) and description_file(folder) is None:
        fix = f"run the train command of {run_dir} again, which writes it anew"
        raise UserError(f"{folder / ABOUT}: no such file: it was not written to its end; {fix}")
    return read_adapter(folder)


def check_base(base: Base, run_dir: str | Path, about: dict[str, Any], ranks: Ranks) -> None:
    """As ``Base.check_same``, of what ``about`` an adapter tells; PEFT's has its name alone."""
    known, folder = about.get("base_model") or {}, adapter_folder(run_dir)
    if folder != Path(run_dir) or "fingerprint" in known:
        base.check_same(known, str(folder), ranks)
    elif ranks.is_main:
        say(
            f"{folder} tells no checksum of its base: model.path={base.config.path} is taken for it"
        )


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
        held = cfg.to_dict(cfg.from_dict(held, saved=True))  # with keys that are newer than the run
    except UserError as error:
        raise UserError(f"{file}: {error}; {remedy}") from None
    changed = changes.differences(held, cfg.to_dict(config))
    harmful = [key for key in changed if not changes.is_harmless(key)]
    if harmful or (changed and not allow_changes):
        listed = "; ".join(f"{key}: {was} there, {now} now" for key, (was, now) in changed.items())
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
