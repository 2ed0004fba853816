"""What a run writes about itself: config.yaml, logs, events, adapter/."""

import errno
import functools
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from scalepeft.adapters import inject as injection
from scalepeft.adapters import layout
from scalepeft.config import schema as cfg
from scalepeft.core.files import read_lines, read_mapping, write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import tell_job
from scalepeft.core.slurm import slurm_start
from scalepeft.models.tensors import Reader
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import Checkpoint, RunFolder, steps_of, writing_in
from scalepeft.run.folder import check_same_run
from scalepeft.run.goodput import lost_since
from scalepeft.run.lease import Lease, check_fence, check_free
from scalepeft.run.logs import RowLog
from scalepeft.run.progress import Progress
from scalepeft.run.provenance import commit, peak_memory, versions
from scalepeft.run.room import Room

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "deepspeed",
             "datasets", "peft")  # fmt: skip
"""Whose versions a start writes down."""
LOGS = ("metrics", "validation", "diagnostics")


@dataclass
class Save:
    """A save between its begin and its commit."""

    step: int  # steps that are done
    folder: Path  # from ``begin_save``, for all files
    state: dict[str, Any]  # position in the data, and what the checkpoint may be continued with
    begin: float  # ``time.monotonic()`` then
    stall: float = 0.0  # seconds that the training stood still for a save in the background; else 0
    files: dict[str, Any] = field(default_factory=dict)  # size and checksum of what this rank wrote
    error: list[Any] | None = None  # whether a newer start owns the folder; what went wrong
    cancelled: bool = False

    def check(self) -> None:
        """Raises OSError if the save was cancelled."""
        if self.cancelled:
            raise OSError(errno.ECANCELED, "cancelled for the save of the last step")


Method = TypeVar("Method", bound=Callable[..., Any])


def on_main(method: Method) -> Method:
    """Make a method a collective: rank 0 runs it, every rank returns its result."""

    @functools.wraps(method)
    def call(self: "RunRecorder", *args: Any) -> Any:
        return self.ranks.run_on_main(lambda: method(self, *args))

    return cast(Method, call)


class RunRecorder:
    """A run's folder on every rank: rank 0 reads and writes. ``claim``, ``show`` and what is
    ``on_main`` are collectives; the others do nothing off rank 0. Raises UserError: the folder
    holds a run of another config, is in use, or cannot be written.
    """

    def __init__(self, config: cfg.RunConfig, ranks: Ranks, allow_changes: bool) -> None:
        self.config, self.ranks, self.path = config, ranks, Path(config.run_dir)
        self.generation = 0  # number of this start, the fencing token; 0 before ``claim``
        self.newest: dict[str, int] = {}  # step of the newest row, by log
        self.folder: RunFolder
        self.logs: dict[str, RowLog] = {}
        self._lease: Lease | None = None
        self._room = Room(self.path / "checkpoints" / ".room")
        self._progress: Progress | None = None  # on rank 0, from ``show`` on
        self._complaint: str | None = None  # the disk's, about the newest row
        self._lost: dict[str, float] = {}  # as ``lost_since`` says, for the report
        # The newest that verifies; the same on every rank.
        self.resumed = Checkpoint.of(self._open(allow_changes))

    @on_main
    def _open(self, allow_changes: bool) -> list[Any] | None:
        check_same_run(self.config, allow_changes)
        check_free(self.path)
        self.folder = RunFolder(self.path)
        resumed, passed_over = self.folder.newest()
        for reason in passed_over:
            say(f"checkpoint passed over: {reason}")
        return resumed.plain() if resumed else None

    def withdraw(self) -> None:
        """Leaves no empty folder of a start that came to an end before ``claim``."""
        if self.ranks.is_main:
            if self.generation:
                self._room.give()
            self.folder.withdraw()

    def claim(self, launched: float) -> None:
        """Makes the run folder this start's own (``launched``: seconds of the epoch); what an older
        process that was taken for dead saved meanwhile is resumed.
        """
        self.generation, resumed, self.newest = self._claim(launched)
        self.resumed = Checkpoint.of(resumed)

    @on_main
    def _claim(self, launched: float) -> list[Any]:
        path = self.path
        self.folder.claim()
        self._lease = Lease(path, self.folder.generation)
        resumed, _ = self.folder.newest()
        step = resumed.step if resumed else 0
        if resumed:
            say(f"resuming {path} at step {step}")
        self._lost = lost_since(path, step, launched)
        if step:  # a start that saves nothing has gained nothing
            tell_job("progress", f"step {step}")
        with writing_in(path):
            write_atomically(path / "config.yaml", cfg.dump(self.config))
            check = functools.partial(check_fence, path, self.folder.generation)
            self.logs = {name: RowLog(path / f"{name}.jsonl", step, check) for name in LOGS}
        newest = {name: log.last_step for name, log in self.logs.items()}
        if (last := newest["metrics"]) < step:
            say(f"metrics.jsonl lacks rows: it ends at step {last} of {step}")
        checkpoint = resumed.plain() if resumed else None
        return [self.folder.generation, checkpoint, newest]

    @on_main
    def finished(self) -> bool:
        """True if the adapter of this very config is written and no step is left to do."""
        file = layout.description_file(self.path / "adapter")
        if self.resumed is None or file is None or not file.is_file():
            return False
        done = read_mapping(file, json.loads, f"remove {file.parent} to have it written again")
        wanted = [self.config.train.max_steps, self.config.train.epochs]
        return done.get("length") == wanted and done.get("step") == self.resumed.step

    def event(self, name: str, step: int, **more: Any) -> None:
        """Appends a line to events.jsonl: starts, stops and saves, for reports and job scripts."""
        if not self.ranks.is_main:
            return
        row = {"event": name, "time": time.time(), "generation": self.generation, "step": step}
        try:
            with (self.path / "events.jsonl").open("a") as f:
                f.write(json.dumps(row | more) + "\n")
        except OSError as error:
            say(f"events.jsonl: {error.strerror}")

    def started(self, step: int, launched: float, **more: Any) -> None:
        """Writes the start event: where and with what it began, and what was lost before it."""
        if not self.ranks.is_main:
            return
        job, restarts = slurm_start()
        if job:
            more |= {"job": job, "restarts": restarts}
        more |= {"versions": versions(*LIBRARIES), "commit": commit()}
        host = socket.gethostname()
        self.event("start", step, launched=launched, host=host, **self._lost, **more)

    def show(self, first_step: int, steps: int) -> None:
        """Opens the bar and the trackers. Raises UserError: a tracker is not installed."""
        self._progress = self.ranks.alone(lambda: Progress(self.config, first_step, steps))

    def keep_room(self, size: int = 0) -> None:
        """Keeps room on the disk for the next save, of ``size`` bytes from the first call on."""
        if self.ranks.is_main:
            self._room.keep(size)

    def close(self, finished: bool, planned: bool, by: str) -> None:
        """Tells events, user and job script how the run ended: ``finished``, or stopped ``by``
        what; where ``planned`` (``train.stop_at``) the job does not come back.
        """
        if not self.ranks.is_main:
            return
        self._room.give()
        if self._lease is not None:
            self._lease.release()
        if self._progress is not None:
            self._progress.close()
        path, step = self.path, max(steps_of(self.path), default=0)
        if self.generation:
            name = "finished" if finished else "stopped"
            self.event(name, step, planned=planned, **peak_memory())
        if finished:
            say(f"finished: adapter in {path}/adapter, loss in {path}/metrics.jsonl")
            return
        by = "train.stop_at" if planned else by
        say(f"stopped by {by}, saved at step {step}; the same command continues {path}")
        tell_job("planned" if planned else "stopped", f"step {step}")

    def log(self, name: str, row: dict[str, Any]) -> None:
        """Appends a row to one of the ``LOGS``; shows a step and a validation loss."""
        self.newest[name] = row["step"]
        if self._progress is None:
            return
        log = self.logs[name]
        log.keep(row)
        try:
            check_fence(self.path, self.generation)
            reason = log.flush()
        except OSError as error:
            reason = error.strerror or str(error)
        if reason and reason != self._complaint:
            say(f"{log.path.name}: {reason}; the rows wait in memory")
        self._complaint = reason
        if name == "metrics":
            self._progress.step(row)
        elif name == "validation":
            self._progress.held_out(row)

    @on_main
    def begin_save(self, step: int) -> list[str]:
        """Returns the folder that the ranks write into, or why the disk refused; logs go first."""
        self._room.give()
        try:
            for log in self.logs.values():
                log.sync()
            return [str(self.folder.begin(step)), ""]
        except OSError as error:
            return ["", error.strerror or str(error)]

    @on_main
    def commit_save(self, save: Save, files: dict[str, Any]) -> str | None:
        """Commits a checkpoint of these files; returns why the disk refused, or None."""
        try:
            self.folder.commit(save.folder, files, save.state, self.config.train.keep_checkpoints)
        except OSError as error:
            return error.strerror or str(error)
        took = time.monotonic() - save.begin
        size = sum(info["bytes"] for info in files.values())
        self.event("saved", save.step, seconds=save.stall or took, written=took, bytes=size)
        self._room.keep()
        tell_job("progress", f"step {save.step}")
        return None

    @on_main
    def save_adapter(
        self, step: int, base: dict[str, Any], name: str, model: nn.Module
    ) -> str | None:
        """Writes adapter/ out of the last checkpoint; returns why the disk refused, or None."""
        length = [self.config.train.max_steps, self.config.train.epochs]
        about = {"base_model": base, "step": step, "length": length}
        folder, adapters = self.path / "adapter", dict(injection.adapters(model))
        self._room.give()
        try:
            check_fence(self.path, self.generation)
            rows = card_rows(self.config, step)
            reader = Reader(self.folder.checkpoints / f"step-{step:06d}")
            state = {key: reader.whole(key) for key in reader.shapes if "/" not in key}
            layout.write(folder, model, adapters, state, about, name, rows)
        except OSError as error:
            return error.strerror or str(error)
        return None


def card_rows(config: cfg.RunConfig, step: int) -> dict[str, str]:
    """What a model card tells of a run, by name."""
    data, train = config.data, config.train
    start = read_lines(Path(config.run_dir) / "events.jsonl", "versions", newest_first=True)
    held = next(start, {}).get("versions") or {}
    return {
        "base held as": config.model.quant if config.model.quant != "none" else train.precision,
        "data": ", ".join([data.name, *(Path(name).name for name in data.train)]),
        "protocol": data.protocol or "",
        "training": f"{step} steps of {train.global_batch} rows, AdamW, learning rate {train.lr}"
        f" ({train.schedule}), seed {train.seed}",
        "versions": ", ".join(f"{key} {value}" for key, value in held.items()),
    }
