"""Training, top to bottom: build -> resume -> steps -> adapter; what is due is a visible ``if``."""

import math
import socket
import time
from collections.abc import Callable
from signal import SIGUSR1

import torch

from scalepeft.build import Built, build, check_batch, start_ranks, task_of
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, STOPPED, StopFlag, Stopping
from scalepeft.data import loader, tokens
from scalepeft.data import tokens as data
from scalepeft.models import hub as models
from scalepeft.models.weights import Weights, resident_bytes
from scalepeft.parallel.base import full_shape
from scalepeft.parallel.ranks import Ranks, world_size
from scalepeft.run.checkpoint import Checkpoint
from scalepeft.run.folder import check_nodes
from scalepeft.run.provenance import device_name
from scalepeft.run.records import Records
from scalepeft.run.saver import Saver
from scalepeft.trainer import Trainer, batches


def check_resumed(
    config: RunConfig, resumed: Checkpoint | None, total: int, weights: str, rows: str
) -> None:
    """Compares a checkpoint with what this process is about to continue, or calls finished.

    Args:
        config: of the run.
        resumed: the newest checkpoint, if there is one.
        total: steps of the whole run.
        weights: fingerprint of the base's files.
        rows: fingerprint of the tokenised training rows.

    Raises:
        UserError: it belongs to another base model, to other training rows or a longer run.
    """
    if resumed is None:
        return
    where = f"run_dir={config.run_dir}"
    if resumed.step > total:
        raise UserError(
            f"{where}: is at step {resumed.step} already, the run is to end at {total}; raise"
            " train.max_steps or train.epochs, or choose another run_dir"
        )
    if resumed.state["base"]["fingerprint"] != weights:
        raise UserError(
            f"{where}: was trained on another base than model.path={config.model.path} now"
            " holds (the fingerprint of its files differs); give the old base, or choose"
            " another run_dir"
        )
    if resumed.state["data"] != rows:
        raise UserError(
            f"{where}: the tokenised training rows differ from those it began with; restore the"
            " files"
        )


def learning_rate(config: RunConfig, step: int, total: int) -> float:
    """The rate of step ``step`` (from 0) of ``total``: linear warm-up, then linear or cosine to
    zero, or constant.
    """
    train = config.train
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    return train.lr * (
        1 - done if train.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    )


@torch.no_grad()
def held_out_loss(
    config: RunConfig, built: Built, rows: data.TokenSet, ranks: Ranks, poll: Callable[[], None]
) -> float:
    """Mean loss over all label tokens of the held-out rows; the same number of forwards on every
    rank.
    """
    built.model.eval()
    size = config.train.global_batch
    steps = math.ceil(len(rows) / size)
    forwards = math.ceil(math.ceil(size / ranks.world_size) / config.train.micro_batch)
    total = torch.zeros(2, dtype=torch.float64)
    nothing = loader.MicroBatch(
        torch.zeros(1, data.PAD_TO, dtype=torch.int64),
        torch.full((1, data.PAD_TO), tokens.IGNORED),
        torch.zeros(1, dtype=torch.int64),
    )
    for step in batches(config, rows, ranks, 0, steps, shuffle=False):
        poll()
        for batch in [*step.micro, *[nothing] * (forwards - len(step.micro))]:
            batch = batch.to(ranks.device)
            value = built.model(
                batch.input_ids, token_labels=batch.labels, loss_chunk=config.train.loss_chunk
            )
            total[0] += float(value)
        total[1] += step.label_tokens / ranks.world_size
    built.model.train()
    summed, count = ranks.sum(total).tolist()
    return summed / count


def run(config: RunConfig, stop: StopFlag, resume_with_changes: bool = False) -> int:
    """Trains or resumes ``config.run_dir``; returns the exit code, 0 or 75.

    Raises:
        UserError: a mistake in config, data or model, or a run folder of a different config.
        Fenced: the run was started again elsewhere meanwhile.
    """
    check_batch(config, world_size())
    ranks = start_ranks(config)
    code = run_on(ranks, config, stop, resume_with_changes)
    ranks.finish()
    return code


def run_on(ranks: Ranks, config: RunConfig, stop: StopFlag, resume_with_changes: bool) -> int:
    """``run`` on ranks that have met."""
    records = ranks.together(
        lambda: Records(config, resume_with_changes) if ranks.is_main else None
    )
    check_nodes(config.run_dir, ranks)
    code = FINISHED
    if ranks.main_only(lambda: records is not None and records.finished()):
        _check_finished(config, ranks, records)
    else:
        try:
            code = _train(config, ranks, records, stop)
        except Stopping:  # before the first step: nothing is trained but what is saved
            code = STOPPED
    if records:
        records.close(code == FINISHED, stop.planned)
    stop.saved = True
    return code


def _check_finished(config: RunConfig, ranks: Ranks, records: Records | None) -> None:
    """A finished run is finished for its own base and rows; others are named, not passed over."""
    rows, _, total = _rows(config, ranks)
    folder = models.resolve(config.model, ranks)
    resumed = records.resumed if records else None
    ranks.together(
        lambda: check_resumed(
            config, resumed, total, Weights(folder).fingerprint(), rows.fingerprint()
        )
    )


def _train(config: RunConfig, ranks: Ranks, records: Records | None, stop: StopFlag) -> int:
    def poll() -> None:
        if ranks.any(stop.signal is not None):
            raise Stopping

    spent = {"startup": time.time() - stop.launched}
    began = time.monotonic()
    poll()
    train_rows, valid_rows, total = _rows(config, ranks)
    fingerprint = ranks.same(train_rows.fingerprint(), "data.train: training rows differ")
    poll()
    built = build(config, ranks, poll)
    trainer = Trainer(config, ranks, built, fingerprint)
    resumed = records.resumed if records else None
    base = built.base["fingerprint"]
    ranks.together(lambda: check_resumed(config, resumed, total, base, fingerprint))
    ranks.together(lambda: records.claim(stop.launched) if records else None)
    step, read_bytes = trainer.restore(records)
    saver = Saver(config, ranks, records, saved=step)

    def between() -> None:
        saver.poll()
        poll()

    evaluated = ranks.main_only(lambda: records.validation.last_step if records else 0)
    spent["load"] = time.monotonic() - began
    _announce(trainer, records, step, total, read_bytes, stop.launched, spent)
    stream = iter(batches(config, train_rows, ranks, step, total - step))
    built.model.train()
    try:
        while True:
            if valid_rows is not None and _due(config, step, total) and evaluated < step:
                clock = time.monotonic()
                value = held_out_loss(config, built, valid_rows, ranks, between)
                evaluated = step
                if records:
                    records.held_out(
                        {
                            "step": step,
                            "loss": value if math.isfinite(value) else None,
                            "rows": len(valid_rows),
                            "seconds": time.monotonic() - clock,
                        }
                    )
            if step == total:
                break
            between()
            clock = time.monotonic()
            batch = next(stream)
            lr = learning_rate(config, step, total)
            mean, norm = trainer.step(batch.micro, batch.label_tokens, lr)
            step += 1
            if records:
                seconds = time.monotonic() - clock
                row = {
                    "step": step,
                    "loss": mean,
                    "lr": lr,
                    "grad_norm": norm,
                    "label_tokens": batch.label_tokens,
                    "sample_index": step * config.train.global_batch,
                    "seconds": seconds,
                    "tokens_per_second": batch.tokens / seconds,
                }
                if trainer.penalty is not None:
                    row["penalty"] = trainer.penalty
                records.log(row)
            trainer.check_finite(step, total, saver)
            # Not amid skipped steps: retention must not drop the checkpoint from before the
            # trouble.
            due = step % config.train.save_every == 0 and not trainer.nonfinite
            if due or step == total:
                trainer.save(saver, step, final=step == total)
            if step == config.train.stop_at:
                stop.planned = stop.signal is None
                stop.request(SIGUSR1)
    except Stopping:
        saver.stop(step)
        if saver.saved != step:
            trainer.save(saver, step, final=True)
        return STOPPED
    ranks.main_only(lambda: records.save_adapter(total, built.base) if records else None)
    return FINISHED


def _due(config: RunConfig, step: int, total: int) -> bool:
    every = config.train.eval_every
    return bool(every and step and (step % every == 0 or step == total))


def _announce(
    trainer: Trainer,
    records: Records | None,
    step: int,
    total: int,
    read_bytes: int,
    launched: float,
    seconds: dict[str, float],
) -> None:
    """Tells user and events.jsonl what starts, with the bytes that each rank read and holds."""
    built, ranks = trainer.built, trainer.ranks
    mine = {
        "host": socket.gethostname(),
        "device": device_name(ranks.device),
        "bytes_read": built.bytes_read,
        "bytes_held": resident_bytes(built.model),
        "checkpoint_bytes_read": read_bytes,
    }
    per_rank = ranks.gather(mine)
    if records:
        count = sum(full_shape(p).numel() for p in trainer.trained.values())
        tensors = len(trainer.trained)
        say(f"training {count:,} parameters in {tensors} tensors, steps {step + 1} to {total}")
        more = {
            "engine": trainer.config.engine.name,
            "world_size": ranks.world_size,
            "parameters": count,
        }
        records.started(step, launched, steps=total, **more, **seconds, per_rank=per_rank)
    ranks.together(lambda: records.show(step, total) if records else None)


def _rows(config: RunConfig, ranks: Ranks) -> tuple[data.TokenSet, data.TokenSet | None, int]:
    """Tokenised training and held-out rows, and the number of steps; one rank a node tokenises."""
    folder = models.resolve(config.model, ranks)

    def prepare() -> tuple[data.TokenSet, data.TokenSet | None, list[str]]:
        limit = models.positions(folder)
        if limit is not None and config.data.cutoff > limit:
            raise UserError(
                f"data.cutoff={config.data.cutoff} is beyond the model's {limit} positions;"
                " lower it"
            )
        tokenizer = models.load_tokenizer(config.model, folder)
        return data.prepare(
            task_of(config), tokenizer, models.vocab_size(folder), config.train.seed
        )

    found = ranks.together(lambda: prepare() if ranks.local_rank == 0 else None)
    found = ranks.together(lambda: found or prepare())  # now from the cache
    train_rows, valid_rows, report = found
    if ranks.is_main:
        for line in report:
            say(line)
    total = config.train.max_steps
    if total is None:
        assert config.train.epochs is not None
        total = max(1, math.ceil(config.train.epochs * len(train_rows) / config.train.global_batch))
        cfg.check_length(config.train, total)
    if ranks.is_main and config.train.warmup_steps >= total:  # a trial of a few steps
        say(
            f"train.warmup_steps={config.train.warmup_steps} is not shorter than the run of {total}"
            f" steps: the learning rate never reaches train.lr={config.train.lr}"
        )
    return train_rows, valid_rows, total
