"""What a run writes about itself: config.yaml, metrics.jsonl, validation.jsonl, events.jsonl,
adapter/.
"""

import json
import socket
import time
from pathlib import Path
from typing import Any

from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.files import read_lines, read_mapping, write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import tell_job
from scalepeft.core.slurm import slurm_job, slurm_start
from scalepeft.run.checkpoint import RunFolder, stored_generation
from scalepeft.run.folder import check_same_run
from scalepeft.run.lease import Hold, check_free
from scalepeft.run.logs import RowLog
from scalepeft.run.progress import Progress
from scalepeft.run.provenance import commit, peak_memory, versions
from scalepeft.run.tensors import Reader, write_tensors

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "deepspeed")
"""Whose versions a start writes down."""


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
