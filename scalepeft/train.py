"""Training, top to bottom: build -> resume -> steps -> adapter; what is due is a visible ``if``."""

import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGUSR1
from typing import Any

import torch

from scalepeft.adapters import diagnostics, targets
from scalepeft.adapters import inject as injection
from scalepeft.build import build, check_batch, start_ranks, task_of
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.launch import world_size
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, STOPPED, StopFlag, Stopping
from scalepeft.core.text import size
from scalepeft.data import token_file
from scalepeft.data.tasks.base import Split
from scalepeft.data.tokens import TokenSet
from scalepeft.models.hub import Base, open_base
from scalepeft.models.weights import resident_bytes
from scalepeft.parallel.base import full_shape
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import Checkpoint
from scalepeft.run.folder import check_nodes
from scalepeft.run.provenance import device_name
from scalepeft.run.records import RunRecorder
from scalepeft.run.saver import NotSaved, Saver
from scalepeft.trainer import Outcome, Trainer, batches, summed_loss


def _check_resumed(
    config: RunConfig, base: Base, rows: "_Rows", ranks: Ranks, resumed: Checkpoint | None
) -> str:
    """The fingerprint of the training rows. Raises UserError: the checkpoint is not of this run."""
    fingerprint = ranks.assert_equal(rows.fingerprint, "data.train: training rows differ")
    where = f"run_dir={config.run_dir}"
    if resumed is None:
        return fingerprint
    if resumed.step > rows.total:
        raise UserError(
            f"{where}: is at step {resumed.step} already, the run is to end at {rows.total}; raise"
            " train.max_steps or train.epochs, or choose another run_dir"
        )
    base.check_same(resumed.state["base"], where, ranks)
    if resumed.state["data"] != fingerprint:
        raise UserError(
            f"{where}: training rows differ from those it began with; restore the files"
        )
    return fingerprint


def learning_rate(config: RunConfig, step: int, total: int) -> float:
    """The rate of ``step`` (from 0): linear warm-up, then linear or cosine to zero, or constant."""
    train = config.train
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    left = 1 - done if train.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return train.lr * left


@torch.no_grad()
def held_out_loss(trainer: Trainer, rows: TokenSet, poll: Callable[[], None]) -> float:
    """Validation loss: the mean over all label tokens of the validation rows."""
    config, ranks, model = trainer.config, trainer.ranks, trainer.built.model
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    steps = math.ceil(len(rows) / config.train.global_batch)
    with trainer.factors.made():
        for step in batches(trainer, rows, 0, steps, shuffle=False):
            poll()
            for batch in step.micro:
                total[0] += float(summed_loss(model, batch.to(ranks.device), config))
            total[1] += step.label_tokens / ranks.world_size
    injection.train_mode(model)
    summed, count = ranks.sum(total).tolist()
    return summed / count


def run(config: RunConfig, stop: StopFlag, resume_with_changes: bool = False) -> int:
    """Trains or resumes ``config.run_dir``; returns the exit code, 0 or 75. Raises UserError: a
    mistake in config, data or model, another run's folder; Superseded: it was started elsewhere.
    """
    check_batch(config, world_size())
    ranks = start_ranks(config)
    code = run_on(ranks, config, stop, resume_with_changes)
    ranks.finish()
    return code


def run_on(
    ranks: Ranks,
    config: RunConfig,
    stop: StopFlag,
    resume_with_changes: bool,
    base: Base | None = None,
) -> int:
    """``run`` on ranks that have met; ``base`` where the caller has opened it already."""
    records = RunRecorder(config, ranks, resume_with_changes)
    code, by = FINISHED, "a signal"
    try:
        check_nodes(config.run_dir, ranks)
        base = base or open_base(config.model, ranks)
        if records.finished():  # for its own base and rows; others are named, not passed over
            rows = _rows(config, base, ranks, stop)
            _check_resumed(config, base, rows, ranks, records.resumed)
        else:
            code = _train(config, base, ranks, records, stop)
    except Stopping:  # before the first step: nothing is trained but what is saved
        code = STOPPED
    except NotSaved as error:
        code, by = STOPPED, str(error)
    except Exception:
        records.withdraw()
        raise
    records.close(code == FINISHED, stop.planned, by)
    stop.saved = True
    return code


def _train(
    config: RunConfig, base: Base, ranks: Ranks, records: RunRecorder, stop: StopFlag
) -> int:
    times = {"launched": stop.launched, "startup": time.time() - stop.launched}
    began = time.monotonic()
    ranks.check(stop)
    rows = _rows(config, base, ranks, stop)
    fingerprint = _check_resumed(config, base, rows, ranks, records.resumed)
    built = build(config, base, ranks, lambda: ranks.check(stop))
    trainer = Trainer(config, ranks, built, fingerprint)
    records.claim(stop.launched)
    read_bytes = trainer.restore(records.resumed)
    times["load"] = time.monotonic() - began
    saver = Saver(records, saved=trainer.done)
    _announce(trainer, records, rows, read_bytes, times)
    try:
        _steps(trainer, rows, saver, stop)
    except Stopping:
        saver.cancel(trainer.done)
        if saver.saved != trainer.done:
            trainer.save(saver, final=True)
        return STOPPED
    if reason := records.save_adapter(rows.total, built.base, base.name, built.model):
        raise NotSaved(f"a disk that refuses the adapter ({reason})")
    return FINISHED


def _steps(trainer: Trainer, rows: "_Rows", saver: Saver, stop: StopFlag) -> None:
    """All steps that are left, and what is due between them."""
    config, records, done, total = trainer.config, saver.records, trainer.done, rows.total
    unread, known = list[tuple[dict[str, Any], int, float, Outcome]](), 0.0

    def log() -> None:
        """Waits for the last step and logs it."""
        nonlocal known
        while unread:
            row, tokens, launched, outcome = unread.pop()
            row["loss"], row["grad_norm"], penalty = outcome.read()
            begun, known = max(launched, known), time.monotonic()
            row |= {"seconds": known - begun, "tokens_per_second": tokens / (known - begun)}
            row |= {} if penalty is None else {"penalty": penalty}
            records.log("metrics", row | {"time": time.time()})
            trainer.check_finite(row["step"], total, saver)

    def between() -> None:
        saver.poll()
        trainer.ranks.check(stop)

    stream = iter(batches(trainer, rows.train, done, total - done))
    injection.train_mode(trainer.built.model)
    while True:
        if _due(config.train.eval_every, trainer.done, total, records.newest["validation"]):
            log()
            records.log("validation", _validate(trainer, rows.valid, between))
        if _due(config.train.diagnose_every, trainer.done, total, records.newest["diagnostics"]):
            log()
            layers = diagnostics.diagnose(trainer.built.model, trainer.built.engine, between)
            records.log("diagnostics", {"step": trainer.done, "layers": layers})
        if trainer.done == total:
            return
        try:
            between()
        except Stopping:
            log()
            raise
        clock = time.monotonic()
        batch = next(stream)
        lr = learning_rate(config, trainer.done, total)
        outcome = trainer.step(batch.micro, batch.label_tokens, lr)
        log()  # of the step before: the device has this one to work on
        row = {"step": trainer.done, "loss": None, "lr": lr, "grad_norm": None}
        row |= {"label_tokens": batch.label_tokens, "sample_index": trainer.sample_index}
        if trainer.ranks.device.type == "cuda":
            row["memory_reserved"] = torch.cuda.memory_reserved()
        unread.append((row, batch.tokens, clock, outcome))
        due = trainer.done % config.train.save_every == 0
        if due or trainer.done == total or not outcome.late:
            log()
        # Not amid skipped steps: retention must not drop the checkpoint from before the trouble.
        if (due and not trainer.nonfinite) or trainer.done == total:
            trainer.save(saver, final=trainer.done == total)
        if trainer.done == config.train.stop_at:
            stop.planned = stop.signal is None
            stop.request(SIGUSR1)


def _validate(trainer: Trainer, rows: TokenSet | None, poll: Callable[[], None]) -> dict[str, Any]:
    assert rows is not None
    clock = time.monotonic()
    value = held_out_loss(trainer, rows, poll)
    loss, seconds = value if math.isfinite(value) else None, time.monotonic() - clock
    return {"step": trainer.done, "loss": loss, "rows": len(rows), "seconds": seconds}


def _due(every: int, step: int, total: int, newest: int) -> bool:
    return every > 0 and step > newest and (step % every == 0 or step == total)


def _announce(
    trainer: Trainer, records: RunRecorder, rows: "_Rows", read_bytes: int, times: dict[str, float]
) -> None:
    """Tells user and events.jsonl what starts, with the bytes that each rank read and holds."""
    built, ranks, step = trainer.built, trainer.ranks, trainer.done
    total, tokens = rows.total, list(map(str, rows.files.values()))
    here: dict[str, Any] = {"host": socket.gethostname(), "device": device_name(ranks.device)}
    here |= {"bytes_read": built.bytes_read, "bytes_held": resident_bytes(built.model)}
    per_rank = ranks.gather(here | {"checkpoint_bytes_read": read_bytes})
    count = sum(full_shape(p).numel() for p in trainer.trained.values())
    if ranks.is_main:
        tensors = len(trainer.trained)
        read = size(sum(rank["bytes_read"] for rank in per_rank))
        say(f"training {count:,} parameters in {tensors} tensors, steps {step + 1} to {total};"
            f" {read} of the base read")  # fmt: skip
        layers = [name for name, _ in injection.adapted_layers(built.model)]
        if {n.rsplit(".", 1)[-1] for n in layers} != set(trainer.config.adapter.target_modules):
            say(f"adapter.target_modules are {targets.short(layers)}: {len(layers)} layers")
        if built.unpacked and trainer.config.train.batching == "auto":
            say(f"rows are padded, not packed: {built.unpacked}")
    more: dict[str, Any] = {"engine": trainer.config.engine.name, "world_size": ranks.world_size}
    more |= {"parameters": count, "tokens": tokens} | times
    records.started(step, steps=total, **more, per_rank=per_rank)
    # Parameters and both moments in fp32, headers and manifest.
    held = sum(full_shape(p).numel() for p in trainer.saved.values())
    records.keep_room(8 * count + 4 * held + 1000 * len(trainer.saved) + (16 << 10))
    records.show(step, total)


@dataclass(frozen=True)
class _Rows:
    train: TokenSet
    valid: TokenSet | None
    fingerprint: str  # of ``train``
    total: int  # steps of the whole run
    files: dict[Split, Path]  # with the tokens, on this node


def _rows(config: RunConfig, base: Base, ranks: Ranks, stop: StopFlag) -> _Rows:
    """Tokenized rows, and the number of steps; one rank a node tokenizes for all of them."""

    def make() -> list[Any] | None:
        if ranks.local_rank != 0:
            return None
        cutoff, limit = config.data.cutoff, base.positions
        if limit is not None and cutoff > limit:
            where = f"data.cutoff={cutoff}"
            raise UserError(f"{where} is beyond the model's {limit} positions; lower it")
        task = task_of(config, base.tokenizer)
        task.poll = stop.check
        try:
            files = token_file.files(task, base.tokenizer, base.vocab_size, base.ends)
        except Stopping:
            return None
        fingerprint = token_file.prepared(files, config.data, seed)[0].fingerprint()
        return [{split: str(file) for split, file in files.items()}, fingerprint]

    seed = config.train.seed
    made = ranks.all_or_raise(make)
    ranks.check(stop)
    paths, fingerprint = ranks.of_node(made)  # whose folders may be others than another's
    files: dict[Split, Path] = {split: Path(file) for split, file in paths.items()}
    train, valid, report = ranks.all_or_raise(lambda: token_file.prepared(files, config.data, seed))
    for line in report if ranks.is_main else ():
        say(line)
    total = config.train.max_steps
    if total is None:
        assert config.train.epochs is not None
        total = max(1, math.ceil(config.train.epochs * len(train) / config.train.global_batch))
        cfg.check_length(config.train, total)
    if ranks.is_main and config.train.warmup_steps >= total:  # a trial of a few steps
        warmup = f"train.warmup_steps={config.train.warmup_steps}"
        say(f"{warmup} is not shorter than the run of {total} steps: train.lr is never reached")
    return _Rows(train, valid, fingerprint, total, files)
