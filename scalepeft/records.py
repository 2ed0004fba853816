"""What a run writes about itself: config.yaml, metrics.jsonl, validation.jsonl, events.jsonl,
adapter/.
"""

import errno
import json
import os
import shutil
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from scalepeft import config as cfg
from scalepeft.checkpoint import (
    RunFolder,
    fsync,
    stored_generation,
    try_to_write,
    write_atomically,
)
from scalepeft.config import RunConfig
from scalepeft.holder import Hold, check_free
from scalepeft.lookup import UserError, read_mapping
from scalepeft.parallel.mesh import Ranks
from scalepeft.preemption import tell_job
from scalepeft.progress import Progress, say
from scalepeft.provenance import commit, peak_memory, versions
from scalepeft.tensorfiles import Reader, write_tensors


def load_run(run_dir: str, settings: list[str], allowed: tuple[str, ...], what: str) -> RunConfig:
    """Reads a run's config and lays settings over it that do not change what was trained.

    Args:
        run_dir: the folder.
        settings: ``key=value`` arguments.
        allowed: keys that may be set; one that ends with a dot stands for its section.
        what: the purpose, for the message: ``an evaluation``.

    Raises:
        UserError: not a run folder, or a setting that would make it another run.
    """
    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"{run_dir} is no run folder: it has no config.yaml; name the run_dir of a training"
        )
    values = read_mapping(file, yaml.safe_load, "restore the config of the run")
    for setting in settings:
        key = setting.partition("=")[0]
        if not cfg.matches_key(key, allowed):
            raise UserError(
                f"{key}: cannot be changed for {what}; allowed:"
                f" {', '.join(k + 'KEY' if k.endswith('.') else k for k in allowed)}"
            )
    return replace(cfg.overlay(values, settings), run_dir=run_dir)


def slurm_job() -> str | None:
    """The Slurm job of this process as ``scontrol`` calls it: ``12``, ``12_3`` in an array."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def slurm_start() -> tuple[str | None, int]:
    """The Slurm job, if any, and how often it was restarted."""
    return slurm_job(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "deepspeed")
"""Whose versions a start writes down."""

NUMBERS = {
    "time", "launched", "startup", "load", "waited", "idle", "recomputed", "recomputed_steps",
    "step", "steps", "seconds", "tokens_per_second", "sample_index", "world_size",
}  # fmt: skip


def _is_row(row: Any, keys: set[str]) -> bool:
    """A mapping with these keys, and a number wherever one belongs."""
    return (
        isinstance(row, dict)
        and row.keys() >= keys
        and all(type(row[key]) in (int, float) for key in NUMBERS & row.keys())
    )


def read_lines(file: Path, *keys: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file that have these keys; torn and broken lines are left out."""
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if _is_row(row, set(keys)):
            found.append(row)
    return found


def older_adapter(run_dir: Path, step: int | None) -> str | None:
    """Says that the run has gone on since its adapter was written; None where it has not."""
    newest = max(RunFolder.steps_in(run_dir / "checkpoints"), default=step)
    if step is None or newest == step:
        return None
    return (
        f"the adapter is that of step {step}, the newest checkpoint of step {newest}: the run went"
        " on after it, or is still training"
    )


def check_base(config: RunConfig, trained_on: dict[str, Any], fingerprint: str) -> None:
    """Refuses a base whose files are not those that the adapter was trained on.

    Args:
        config: of the run, with the ``model.path`` that is used now.
        trained_on: ``base_model`` of ``adapter_config.json``.
        fingerprint: of the files there.

    Raises:
        UserError: they differ.
    """
    if trained_on.get("fingerprint") != fingerprint:
        raise UserError(
            f"{config.run_dir}/adapter was trained on another base than"
            f" model.path={config.model.path} now holds (the fingerprint of its files differs);"
            " name the folder of that base with model.path=FOLDER"
        )


def check_same_run(config: RunConfig, allow_changes: bool) -> None:
    """Refuses to continue a run under another config; lists the keys that differ.

    Raises:
        UserError: the folder holds a run with other settings, or one whose config.yaml is lost.
    """
    file = Path(config.run_dir) / "config.yaml"
    # Before the first checkpoint there is nothing that another config could spoil.
    if not any(file.parent.glob("checkpoints/step-*")):
        return
    remedy = "restore it (the run's config cannot be compared without), or choose another run_dir"
    held = read_mapping(file, yaml.safe_load, remedy)
    try:
        held = cfg.to_dict(cfg.from_dict(held))  # keys that are newer than the run: their defaults
    except UserError as error:
        raise UserError(f"{file}: {error}; {remedy}") from None
    changed = cfg.differences(held, cfg.to_dict(config))
    if not changed:
        return
    listed = "; ".join(f"{key}: {was} there, {now} now" for key, (was, now) in changed.items())
    harmful = [key for key in changed if not cfg.matches_key(key, cfg.HARMLESS)]
    if harmful:
        raise UserError(
            f"run_dir={config.run_dir} holds a run with another config ({listed}); choose another"
            f" run_dir, or set {', '.join(harmful)} back"
        )
    if not allow_changes:
        raise UserError(
            f"run_dir={config.run_dir} holds a run with another config ({listed}); these keys may"
            " change: add --resume-with-changes, or choose another run_dir"
        )


def check_nodes(run_dir: str, ranks: Ranks) -> None:
    """Refuses a run folder that is not one folder on all nodes, or that one of them cannot write.

    Any node may hold rank 0 after the next restart. Found out before anything is loaded.

    Raises:
        UserError: with the node's name.
    """
    folder = Path(run_dir)

    def mark() -> Path:
        handle, name = tempfile.mkstemp(prefix=".seen-by-all-nodes-", dir=folder)
        os.close(handle)
        return Path(name)

    seen = ranks.main_only(mark)

    def look() -> None:
        try:
            if not seen.exists():
                raise UserError(
                    f"run_dir={folder}: is another folder on {socket.gethostname()} than on rank"
                    " 0's node; it must be on a file system that all nodes share"
                )
            try_to_write(folder)
        except OSError as error:
            raise UserError(
                f"run_dir={folder}: cannot be written on {socket.gethostname()}: {error.strerror}"
            ) from None

    try:
        ranks.together(lambda: look() if ranks.local_rank == 0 else None)
    finally:
        if ranks.is_main:
            seen.unlink(missing_ok=True)


class Records:
    """The run folder on rank 0: takes the next generation, finds where to resume, keeps logs."""

    def __init__(self, config: RunConfig, allow_changes: bool) -> None:
        check_same_run(config, allow_changes)
        check_free(Path(config.run_dir), *slurm_start())
        self.config = config
        self._hold: Hold | None = None
        self.folder = RunFolder(Path(config.run_dir))
        self.resumed, passed_over = self.folder.newest()
        for reason in passed_over:
            say(f"checkpoint passed over: {reason}")
        self.metrics: RowLog
        self.validation: RowLog
        self.progress: Progress | None = None
        self.lost: dict[str, float] = {}
        """What came between the last sign of life of the run and this start; for the report."""

    def claim(self, launched: float) -> None:
        """Makes the run folder this process's own, once all that can be wrong has been checked.

        An older process of it that was taken for dead stops at its next write; what it saved
        meanwhile is what resumes here.

        Args:
            launched: when this process began, in seconds of the epoch.
        """
        seen = stored_generation(self.folder.path)
        check_free(self.folder.path, *slurm_start())  # once more: loading took its time
        self.folder.claim(seen)
        self._hold = Hold(self.folder.path, self.folder.generation, *slurm_start())
        self.resumed, _ = self.folder.newest()
        path, step = self.folder.path, self.resumed.step if self.resumed else 0
        if self.resumed:
            say(f"resuming {path} at step {step}")
        write_atomically(path / "config.yaml", cfg.dump(self.config))
        self.lost = self._lost_since(step, launched)
        if step:  # a start that saves nothing has gained nothing
            tell_job("progress", f"step {step}")
        self.metrics = RowLog(path / "metrics.jsonl", step)
        self.validation = RowLog(path / "validation.jsonl", step)
        if self.metrics.last_step < step:
            say(f"metrics.jsonl lacks rows: it ends at step {self.metrics.last_step} of {step}")

    def _lost_since(self, step: int, launched: float) -> dict[str, float]:
        events = read_lines(self.folder.path / "events.jsonl", "event", "time")
        rows = read_lines(self.folder.path / "metrics.jsonl", "step", "seconds", "time")
        if not events:
            return {}
        gap = max(0.0, launched - max(row["time"] for row in (*events, *rows)))
        # A run that was finished, stopped as planned, or whose job was over, waited for its user.
        jobs = [event.get("job") for event in events if event["event"] == "start"]
        ended = events[-1]["event"] == "finished" or events[-1].get("planned")
        ended = ended or (jobs and jobs[-1] and jobs[-1] != slurm_job())
        again = [row["seconds"] for row in rows if row["step"] > step]
        return {
            "idle" if ended else "waited": gap,
            "recomputed_steps": len(again),
            "recomputed": sum(again),
        }

    def finished(self) -> bool:
        """True if the adapter of this very config is written and no step is left to do."""
        file = self.folder.path / "adapter" / "adapter_config.json"
        if self.resumed is None or not file.is_file():
            return False
        done = read_mapping(file, json.loads, f"remove {file.parent} to have it written again")
        wanted = [self.config.train.max_steps, self.config.train.epochs]
        return done.get("length") == wanted and done.get("step") == self.resumed.step

    def event(self, name: str, step: int, **more: Any) -> None:
        """Appends a line to events.jsonl: starts, stops and saves, for reports and job scripts."""
        row = {
            "event": name,
            "time": time.time(),
            "generation": self.folder.generation,
            "step": step,
            **more,
        }
        try:
            with (self.folder.path / "events.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:
            say(f"events.jsonl: {error.strerror}")

    def started(self, step: int, launched: float, **more: Any) -> None:
        """Writes the start event: where, when and with what this start began, and what was lost
        before it.
        """
        job, restarts = slurm_start()
        if job:
            more |= {"job": job, "restarts": restarts}
        more |= {"versions": versions(*LIBRARIES), "commit": commit()}
        host = socket.gethostname()
        self.event("start", step, launched=launched, host=host, **self.lost, **more)

    def show(self, first_step: int, steps: int) -> None:
        """Opens the bar and the trackers."""
        self.progress = Progress(self.config, first_step, steps)

    def close(self, finished: bool, planned: bool) -> None:
        """Writes the last event and tells user and job script how the run ended.

        Args:
            finished: the adapter is written.
            planned: the stop was ``train.stop_at``'s, so the job is not to come back by itself.
        """
        path = self.folder.path
        if self._hold is not None:
            self._hold.release()
        if self.progress is not None:
            self.progress.close()
        step = max(self.folder.steps(), default=0)
        if self.folder.generation:
            name = "finished" if finished else "stopped"
            self.event(name, step, planned=planned, **peak_memory())
        if finished:
            say(f"finished: adapter in {path}/adapter, loss in {path}/metrics.jsonl")
        elif planned:
            say(
                f"stopped by train.stop_at, saved at step {step}; the same command continues {path}"
            )
            tell_job("planned", f"step {step}")
        else:
            say(f"stopped by a signal, saved at step {step}; the same command continues {path}")
            tell_job("stopped", f"step {step}")

    def log(self, row: dict[str, Any]) -> None:
        """Appends a step to metrics.jsonl and shows it."""
        row["time"] = time.time()
        if complaint := self._append(self.metrics, row):
            say(f"metrics.jsonl: {complaint}; the rows wait in memory")
        if self.progress is not None:
            self.progress.step(row)

    def held_out(self, row: dict[str, Any]) -> None:
        """Appends a held-out loss to validation.jsonl and shows it."""
        if complaint := self._append(self.validation, row):
            say(f"validation.jsonl: {complaint}; the rows wait in memory")
        if self.progress is not None:
            self.progress.held_out(row)

    def _append(self, log: "RowLog", row: dict[str, Any]) -> str | None:
        log.keep(row)
        try:
            self.folder.check_fence()
        except OSError as error:
            return error.strerror or str(error)
        return log.flush()

    def begin_save(self, step: int) -> Path:
        """Makes the folder that the ranks write into; the logs are on the disk before.

        Raises:
            OSError: the disk refused.
        """
        self.metrics.sync()
        self.validation.sync()
        return self.folder.begin(step)

    def commit_save(
        self,
        step: int,
        temporary: Path,
        files: dict[str, Any],
        state: dict[str, Any],
        begin: float,
        stall: float,
    ) -> str | None:
        """Commits a checkpoint; returns the disk's complaint if there is none to be had.

        Args:
            step: steps that are done.
            temporary: from ``begin_save``, with all files.
            files: their bytes and checksums.
            state: position in the data, and what the checkpoint may be continued with.
            begin: ``time.monotonic()`` when the save began.
            stall: seconds that the training stood still, if it went on meanwhile; else 0.
        """
        try:
            self.folder.commit(temporary, files, state, self.config.train.keep_checkpoints)
        except OSError as error:
            return error.strerror or str(error)
        took = time.monotonic() - begin
        size = sum(info["bytes"] for info in files.values())
        self.event("saved", step, seconds=stall or took, written=took, bytes=size)
        tell_job("progress", f"step {step}")
        return None

    def save_adapter(self, step: int, base: dict[str, Any]) -> None:
        """Writes adapter/: ``adapter.safetensors`` out of the last checkpoint, then
        ``adapter_config.json``, which says it is complete.
        """
        self.folder.check_fence()
        folder = self.folder.path / "adapter"
        folder.mkdir(exist_ok=True)
        temporary = folder / "adapter.safetensors.tmp"
        reader = Reader(self.folder.checkpoints / f"step-{step:06d}")
        names = [name for name in reader.shapes if "/" not in name]
        written = write_tensors(temporary, {name: reader.whole(name) for name in names})
        temporary.replace(folder / "adapter.safetensors")
        description = {
            "format": 1,
            "adapter": cfg.to_dict(self.config.adapter),
            "base_model": base,
            "step": step,
            "sha256": written["sha256"],
            "length": [self.config.train.max_steps, self.config.train.epochs],
        }
        write_atomically(folder / "adapter_config.json", json.dumps(description, indent=2) + "\n")


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class RowLog:
    """A JSON-lines file of steps: appended, flushed, cut back to the resumed step.

    Never a double or torn row. A row that the disk refuses waits in memory and is written before
    the next one.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self._waiting: list[str] = []
        self.last_step = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = []
        for line in lines:
            step = _step(line)
            if step is not None and self.last_step < step <= last_step:
                kept.append(line)
                self.last_step = step
        self._end = sum(map(len, kept))
        if kept == lines[: len(kept)]:
            if lines:
                os.truncate(path, self._end)
            return
        damaged = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        say(f"{path} holds broken rows: kept as {damaged.name}")
        shutil.copy(path, damaged)
        write_atomically(path, b"".join(kept).decode())

    def append(self, row: dict[str, Any]) -> str | None:
        """Writes a row; returns the disk's complaint if it has to wait."""
        self.keep(row)
        return self.flush()

    def keep(self, row: dict[str, Any]) -> None:
        """Takes a row, to be written by the next ``flush``."""
        self._waiting.append(json.dumps(row) + "\n")
        self.last_step = row["step"]

    def flush(self) -> str | None:
        """Writes the rows that wait; returns the disk's complaint if they go on waiting."""
        data = "".join(self._waiting).encode()
        try:
            with self.path.open("r+b" if self.path.exists() else "wb", buffering=0) as f:
                f.seek(self._end)
                f.truncate()
                if f.write(data) != len(data):
                    return "short write"
        except OSError as error:
            return error.strerror or str(error)
        self._end += len(data)
        self._waiting.clear()
        return None

    def sync(self) -> None:
        """Puts the rows on the disk: before a checkpoint is committed, so that it never knows more
        than the log.
        """
        if self._waiting and (complaint := self.flush()):
            raise OSError(errno.EIO, f"{self.path.name} cannot be written: {complaint}")
        if self.path.exists():
            fsync(self.path)
