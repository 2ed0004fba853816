"""Generate, extract, score: predictions are appended by example id, so a killed evaluation
continues.
"""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from scalepeft import __version__
from scalepeft.build import start_ranks, task_of
from scalepeft.config import changes
from scalepeft.config.schema import EvaluateConfig, RunConfig, Subject, deviations, to_dict
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides, deciding
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, STOPPED, StopFlag, Stopping, tell_job
from scalepeft.data.tasks.base import Example, Task
from scalepeft.eval import comet, scores
from scalepeft.eval.generation import Generator, _Progress, batches, check
from scalepeft.eval.predictions import Predictions
from scalepeft.eval.target import Chosen
from scalepeft.models import hub as models
from scalepeft.parallel.ranks import Ranks, alone, world_size
from scalepeft.run.folder import load_run

T = TypeVar("T")
FOLDERS: dict[Subject, str] = {"adapter": "eval", "merged": "eval-merged", "base": "eval-base"}


def run(run_dir: str, settings: list[str], subject: Subject, stop: StopFlag) -> int:
    """Evaluates a run on ``data.test``; returns the exit code, 0 or 75.

    Writes ``RUN_DIR/eval/TASK/`` (``eval-merged``, ``eval-base``): predictions.jsonl, scored.jsonl
    and scores.json.

    Args:
        run_dir: the run.
        settings: ``key=value`` arguments over its config.
        subject: its adapter over its base, the checkpoint in ``RUN_DIR/merged``, or the base alone.
        stop: polled between batches.

    Raises:
        UserError: no run, no adapter or merged checkpoint yet, no test rows.
    """
    config = load_run(run_dir, settings, changes.for_evaluation(), "an evaluation")
    # vLLM starts processes of its own; this one needs no group and no device.
    alone = config.evaluate.backend == "vllm" and world_size() == 1
    ranks = Ranks() if alone else start_ranks(config)
    try:
        evaluate(config, subject, ranks, stop)
        add_comet(config, subject, ranks, stop)
        code = FINISHED
    except Stopping:
        if ranks.is_main:
            say(f"stopped; scalepeft evaluate {run_dir} continues with the rows that are left")
            tell_job("stopped", "evaluation")
        code = STOPPED
    stop.saved = True
    ranks.finish()
    return code


def evaluate(config: RunConfig, subject: Subject, ranks: Ranks, stop: StopFlag) -> None:
    """``run`` among ranks that have met already.

    Raises:
        Stopping: a signal came; what is done is on the disk.
    """

    def poll() -> None:
        if ranks.any(stop.signal is not None):
            raise Stopping

    check(config.evaluate)
    if config.evaluate.backend == "vllm":
        from scalepeft.eval import vllm

        vllm.check(config, subject, ranks.world_size)
    run_dir = Path(config.run_dir)
    task = task_of(config)
    examples = ranks.together(lambda: _examples(task, config.evaluate.limit))
    for note in task.notes if ranks.is_main else ():
        say(f"data.test: {note}")
    chosen = Chosen.of(config, subject, ranks)
    settings = {
        "subject": chosen.fingerprint,
        "task": task.Config.__name__,
        "task_version": task.version,
        "prompt": task.template("test"),
        "generation": [
            getattr(config.evaluate, key) for key in deciding(EvaluateConfig, Decides.PREDICTIONS)
        ],
        "model": chosen.config.model.path,
        "quant": [chosen.config.model.quant, chosen.config.model.double_quant],
        "precision": config.train.precision,
        "tokenizer": chosen.tokenizer,
        "batch": config.evaluate.batch_size * ranks.world_size,
        "examples": hashlib.sha256("".join(e.id + e.prompt for e in examples).encode()).hexdigest(),
    }
    folder = run_dir / FOLDERS[subject] / config.data.name
    predictions = ranks.together(
        lambda: (
            Predictions.open(folder, settings, {e.id: e.prompt for e in examples})
            if ranks.is_main
            else None
        )
    )
    done: set[str] = ranks.main_only(lambda: set(predictions.done) if predictions else set())
    left = [e for e in examples if e.id not in done]
    if ranks.is_main and done:
        say(f"{len(done)} predictions are there already, {len(left)} to go")
    if left:
        poll()
        generator = _generator(chosen, left, ranks, poll)
        _generate_all(generator, config.evaluate.batch_size, examples, predictions, ranks, poll)
    about = {"subject": subject, "step": chosen.step}
    ranks.together(
        lambda: _write_scores(config, task, examples, predictions, about) if predictions else None
    )


def _examples(task: Task, limit: int | None) -> list[Example]:
    """The test rows, the first ``limit`` of each source."""
    found = task.examples("test")
    ((most, count),) = Counter(e.id for e in found).most_common(1)
    if count > 1:
        raise UserError(f"data.test: {count} rows have the id {most}; predictions are kept by id")
    if bare := next((e for e in found if not e.prompt), None):
        raise UserError(
            f"data.test: {bare.id} is a reference alone, without what is asked; name"
            " FILE_SOURCE::FILE_TARGET (scalepeft score takes references alone)"
        )
    if limit is None:
        return found
    taken: Counter[str] = Counter()
    kept = []
    for example in found:
        source = str(example.meta.get("source", ""))
        taken[source] += 1
        if taken[source] <= limit:
            kept.append(example)
    return kept


def _generator(chosen: Chosen, left: list[Example], ranks: Ranks, poll: Any) -> Any:
    """What maps prompts to (texts, whether each prompt was cut), and tells their ``lengths``."""
    if chosen.config.evaluate.backend == "vllm":
        from scalepeft.eval import vllm

        folder = models.resolve(chosen.config.model, ranks)
        adapter = None if chosen.adapter is None else chosen.fingerprint
        return vllm.Generator.load(chosen.config, folder, adapter, [e.prompt for e in left])
    built, tokenizer = chosen.load(ranks, poll)
    synced = built.engine.sharded and ranks.world_size > 1
    return Generator(built.model, tokenizer, chosen.config.evaluate, ranks.device, synced)


def _generate_all(
    generator: Any,
    batch_size: int,
    examples: list[Example],
    predictions: Predictions | None,
    ranks: Ranks,
    poll: Any,
) -> None:
    done: set[str] = ranks.main_only(lambda: set(predictions.done) if predictions else set())
    lengths = generator.lengths([e.prompt for e in examples])
    every = batches(examples, lengths, batch_size * ranks.world_size)
    todo = [batch for batch in every if not {e.id for e in batch} <= done]
    progress = _Progress(sum(map(len, todo)))
    for batch in todo:
        poll()
        mine = batch[ranks.rank :: ranks.world_size]
        # A rank with nothing left generates for the first prompt once more: sharded forwards are
        # collectives.
        texts, cut = generator([e.prompt for e in mine or batch[:1]])
        rows = [
            {"id": e.id, "prediction": t, "cut": c}
            for e, t, c in zip(mine, texts, cut, strict=False)
            if e.id not in done  # of a batch that was torn
        ]
        gathered = [row for part in ranks.gather(rows) for row in part]
        ranks.together(partial(predictions.append, gathered) if predictions else lambda: None)
        if ranks.is_main:
            progress.add(len(batch))


def _write_scores(
    config: RunConfig,
    task: Task,
    examples: list[Example],
    predictions: Predictions,
    about: dict[str, Any],
) -> None:
    predictions.check_ours()
    texts = {id_: row["prediction"] for id_, row in predictions.done.items()}
    summed, rows = scores.summarise(task, examples, texts)
    folder = predictions.path.parent
    found = {
        "task": config.data.name,
        "protocol": config.data.protocol,
        "deviations": deviations(config),
        "evaluate": to_dict(config.evaluate),
        **about,
        "adapter": config.adapter.name if about["subject"] != "base" else None,
        "prompts_cut": sum(predictions.done[e.id]["cut"] for e in examples),
        **summed,
        **_versions(task),
    }
    try:
        scores.write(folder, found, rows)
    except OSError as error:
        raise UserError(
            f"{folder}: the scores cannot be written: {error.strerror}; all predictions are kept:"
            " make room and run the same command again"
        ) from None
    if task.translates:
        comet.write(folder, rows)
    for line in scores.lines(found):
        say(line)
    if found["prompts_cut"]:
        say(
            f"{found['prompts_cut']} prompts were longer than the model's positions, or"
            " evaluate.max_tokens, allow beside the answer, and lost their beginning"
        )
    for key, (was, now) in found["deviations"].items():
        say(f"departs from protocol {config.data.protocol}: {key} is {now!r}, not {was!r}")
    say(f"{config.data.name}, {about['subject']}: {folder}/scores.json")


def add_comet(config: RunConfig, subject: Subject, ranks: Ranks, stop: StopFlag) -> None:
    """Scores translations with COMET as well, where a program for it is named; its own process, so
    after ``evaluate`` has let the model go.

    Raises:
        UserError: the program fails.
        Stopping: a signal came; it was ended.
    """
    if not task_of(config).translates:
        return
    folder = Path(config.run_dir) / FOLDERS[subject] / config.data.name

    def work() -> None:
        comet.compute(folder, stop)
        say(f"COMET: {comet.line(folder)}")

    alone(ranks, work)


def _versions(task: Task) -> dict[str, Any]:
    import transformers

    return {
        "task_version": task.version,
        "versions": {
            "scalepeft": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
