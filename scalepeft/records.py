"""What a run writes about itself: config.yaml, metrics.jsonl, validation.jsonl, events.jsonl,
adapter/.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from scalepeft import config as cfg
from scalepeft.checkpoint import RunFolder, fsync, write_atomically
from scalepeft.config import RunConfig
from scalepeft.lookup import UserError
from scalepeft.progress import Progress, say


def check_same_run(config: RunConfig, allow_changes: bool) -> None:
    """Refuses to continue a run under another config; lists the keys that differ.

    Raises:
        UserError: the folder holds a run with other settings, or something that is no run.
    """
    file = Path(config.run_dir) / "config.yaml"
    # Before the first checkpoint there is nothing that another config could spoil.
    if not file.exists() or not any(file.parent.glob("checkpoints/step-*")):
        return
    try:
        old = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({error}); choose another run_dir") from None
    changed = cfg.differences(old or {}, cfg.to_dict(config))
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


class Records:
    """The run folder on rank 0: takes the next generation, finds where to resume, keeps logs."""

    def __init__(self, config: RunConfig, allow_changes: bool) -> None:
        check_same_run(config, allow_changes)
        self.config = config
        self.folder = RunFolder(Path(config.run_dir))
        path = self.folder.path
        write_atomically(path / "config.yaml", cfg.dump(config))
        self.resumed, passed_over = self.folder.newest()
        for reason in passed_over:
            say(f"checkpoint passed over: {reason}")
        step = self.resumed.step if self.resumed else 0
        if self.resumed:
            say(f"resuming {path} at step {step}")
        elif passed_over:
            say(f"no checkpoint of {path} verifies: starting from step 0")
        self.metrics = RowLog(path / "metrics.jsonl", step)
        self.validation = RowLog(path / "validation.jsonl", step)
        self.progress: Progress | None = None

    def finished(self) -> bool:
        """True if the adapter of this very config is written and no step is left to do."""
        file = self.folder.path / "adapter" / "adapter_config.json"
        if self.resumed is None or not file.is_file():
            return False
        try:
            done = json.loads(file.read_text())
        except ValueError:
            return False
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

    def show(self, first_step: int, steps: int) -> None:
        """Opens the bar and the trackers."""
        self.progress = Progress(self.config, first_step, steps)

    def close(self, finished: bool) -> None:
        """Writes the last event and tells the user how the run ended."""
        path = self.folder.path
        if self.progress is not None:
            self.progress.close()
        self.event("finished" if finished else "stopped", max(self.folder.steps(), default=0))
        if finished:
            say(f"finished: adapter in {path}/adapter, loss in {path}/metrics.jsonl")
        else:
            say(f"stopped by a signal and saved; the same command continues {path}")

    def log(self, row: dict[str, Any]) -> None:
        """Appends a step to metrics.jsonl and shows it."""
        self.folder.check_fence()
        if complaint := self.metrics.append(row):
            say(f"metrics.jsonl: {complaint}; the rows wait in memory")
        if self.progress is not None:
            self.progress.step(row)

    def held_out(self, row: dict[str, Any]) -> None:
        """Appends a held-out loss to validation.jsonl and shows it."""
        self.folder.check_fence()
        if complaint := self.validation.append(row):
            say(f"validation.jsonl: {complaint}; the rows wait in memory")
        if self.progress is not None:
            self.progress.held_out(row)

    def save(
        self,
        step: int,
        trained: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
    ) -> str | None:
        """Commits a checkpoint; returns the disk's complaint if there is none to be had."""
        begin = time.monotonic()
        try:
            self.metrics.sync()
            self.validation.sync()
            self.folder.save(step, trained, optimizer, state, self.config.train.keep_checkpoints)
        except OSError as error:
            return error.strerror or str(error)
        self.event("saved", step, seconds=time.monotonic() - begin)
        return None

    def save_adapter(self, step: int, trained: dict[str, Tensor], base: dict[str, Any]) -> None:
        """Writes adapter/: ``adapter.safetensors``, then ``adapter_config.json``, which says it is
        complete.
        """
        self.folder.check_fence()
        folder = self.folder.path / "adapter"
        folder.mkdir(exist_ok=True)
        temporary = folder / "adapter.safetensors.tmp"
        save_file(trained, temporary)
        fsync(temporary)
        temporary.replace(folder / "adapter.safetensors")
        description = {
            "format": 1,
            "adapter": cfg.to_dict(self.config.adapter),
            "base_model": base,
            "step": step,
            "length": [self.config.train.max_steps, self.config.train.epochs],
        }
        write_atomically(folder / "adapter_config.json", json.dumps(description, indent=2) + "\n")


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class RowLog:
    """A JSON-lines file of steps: appended, flushed, and cut back to the resumed step; never a
    double or torn row.

    A row that the disk refuses waits in memory and is written before the next one.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._end = 0
        self.last_step = 0
        if path.exists():
            with path.open("rb") as f:
                for line in f:
                    step = _step(line)
                    if step is None or step > last_step:
                        break
                    self.last_step = step
                    self._end += len(line)
            os.truncate(path, self._end)

    def append(self, row: dict[str, Any]) -> str | None:
        """Writes a row; returns the disk's complaint if it has to wait."""
        self._waiting.append(json.dumps(row) + "\n")
        self.last_step = row["step"]
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
        if self._waiting:
            raise OSError(28, f"{self.path.name} cannot be written")
        if self.path.exists():
            fsync(self.path)
