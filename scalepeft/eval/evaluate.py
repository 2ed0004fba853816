"""``scalepeft evaluate``: generate, keep answers by the rows' ids, extract, score."""

import hashlib
import os
import signal
from argparse import Namespace
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from scalepeft.build import start_ranks, task_of
from scalepeft.config import changes
from scalepeft.config.schema import EvaluateConfig, RunConfig, Subject, deviations, to_dict
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides, deciding
from scalepeft.core.files import writing
from scalepeft.core.launch import world_size
from scalepeft.core.log import say
from scalepeft.core.preemption import StopFlag
from scalepeft.data.bitext import lines_of
from scalepeft.data.rows import read_text, text_field
from scalepeft.data.tasks.base import Example, Task
from scalepeft.data.tokens import encode
from scalepeft.eval import comet, scores, vllm
from scalepeft.eval.generation import Backend, Generator, Progress, Streaming, batches, check
from scalepeft.eval.predictions import AGAIN, Predictions
from scalepeft.eval.target import EvalTarget
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.folder import load_run
from scalepeft.run.provenance import versions

FOLDERS: dict[Subject, str] = {"adapter": "eval", "merged": "eval-merged", "base": "eval-base"}


def run(run_dir: str, settings: list[str], kind: Subject, stop: StopFlag) -> int:
    """Evaluates a run on ``data.test`` into ``RUN_DIR/eval/TASK/`` (``eval-merged``,
    ``eval-base``); returns the exit code, 0 or 75. Raises UserError: no run, no adapter or merged
    checkpoint yet, no test rows.
    """
    config = load_run(run_dir, settings, changes.for_evaluation(), "an evaluation", True)
    # vLLM starts processes of its own; this one needs no group and no device.
    without_group = config.evaluate.backend == "vllm" and world_size() == 1
    ranks = Ranks() if without_group else start_ranks(config)
    again = f"scalepeft evaluate {run_dir} continues with the rows that are left"
    code = stop.guard(lambda: evaluate(config, kind, ranks, stop), "evaluation", again)
    ranks.finish()
    return code


def generate(args: Namespace) -> None:
    """Answers a user's prompts. Raises UserError: as ``run``, or a prompt; KeyboardInterrupt."""
    allowed = (*changes.for_evaluation(), "data.format", "data.special_tokens", "data.system")
    config = load_run(args.run_dir, args.settings, allowed, "generate", True)
    check(config.evaluate)
    ranks = start_ranks(config)
    halted = _answer(EvalTarget.find(config, args.kind, ranks), args, ranks)
    ranks.finish()
    if halted:
        raise KeyboardInterrupt


def _answer(target: EvalTarget, args: Namespace, ranks: Ranks) -> bool:
    """Answers all prompts, which rank 0 alone reads; there True if a signal ended it."""
    typed = args.prompt is None and args.file is None and os.isatty(0)
    turns = _turns(target, args, typed)
    if args.prompt or args.file:  # a wrong one is told before the model is loaded
        turns = iter(ranks.run_on_main(lambda: list(turns)))
    model = _generator(target, [], ranks, lambda: None, Streaming if ranks.is_main else Generator)
    halted, passed = False, (None, signal.SIGINT if typed else None)
    while not ranks.any(halted) and (turn := ranks.run_on_main(lambda: next(turns, None))):
        if ranks.is_main:
            halted = model.answer(*turn) not in passed
            continue
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if model.synced:  # as many forwards
            deque(model.stream(turn[1:] if model.whole else []), maxlen=0)
    return halted


def _turns(target: EvalTarget, args: Namespace, typed: bool) -> Iterator[list[str]]:
    """Name and prompt of each text, as rows of the task ask, or ``raw``."""
    base, config, number = target.base, target.config.evaluate, 0
    task = task_of(target.config, base.tokenizer)
    reader = Backend(base.tokenizer, config, base.positions)
    texts: Any = [args.prompt]
    if args.file is not None:
        texts = lines_of(read_text(args.file))
    elif typed:
        with suppress(ImportError):  # edits, and takes more than a terminal's 4095 bytes
            import readline  # noqa: F401
        texts = iter(lambda: input("> "), "")
    elif args.prompt is None:
        texts = (s.removesuffix("\n") for s in os.fdopen(0, errors="surrogateescape"))
    with suppress(EOFError):
        for number, text in enumerate(texts, 1):
            try:
                text_field({"the prompt": text}, "the prompt")
                prompt = (task.renderer.plain if args.raw else task.asked)(text)
                (ids,), _, (cut,) = reader.encoded([prompt])
                if cut:
                    fix = f"shorten it, or lower evaluate.max_new_tokens={config.max_new_tokens}"
                    raise UserError(f"too long: {len(ids)} tokens fit beside an answer; {fix}")
                yield [f"prompt {number}" if args.prompt is None and not typed else "", prompt]
            except UserError as error:
                if not typed:
                    raise UserError(f"prompt {number}: {error}") from None
                say(f"error: {error}")
    if not number and not typed:
        raise UserError("no prompt; give --prompt TEXT, or lines in --file FILE or on stdin")


def folder_of(config: RunConfig, kind: Subject) -> Path:
    """Where an evaluation is written."""
    return Path(config.run_dir) / FOLDERS[kind] / config.data.name


def evaluate(config: RunConfig, kind: Subject, ranks: Ranks, stop: StopFlag) -> None:
    """``run`` among ranks that have met; raises as that, for COMET, and Stopping: all is kept."""
    check(config.evaluate)
    if config.evaluate.backend == "vllm":
        vllm.check(config, kind, ranks.world_size)
    target = EvalTarget.find(config, kind, ranks)
    task = task_of(config, target.base.tokenizer)
    examples = ranks.all_or_raise(lambda: _examples(task, config.evaluate.limit))
    for line in task.remarks("test") if ranks.is_main else ():
        say(line)
    settings = _settings(target, task, examples, ranks)
    prompts = {e.id: e.prompt for e in examples}
    name = str(folder_of(config, kind).relative_to(config.run_dir))
    predictions = Predictions(Path(config.run_dir), name, settings, prompts, ranks)
    if ranks.is_main and (done := len(predictions.done)):
        say(f"{done} predictions are there already, {len(examples) - done} to go")
    if len(predictions.done) < len(examples):
        ranks.check(stop)
        _generate(target, examples, predictions, lambda: ranks.check(stop))
    ranks.run_on_main(lambda: _write_scores(target, task, examples, predictions))
    if task.translates:  # in a process of its own, now that the model is let go
        ranks.alone(lambda: say(comet.line(comet.compute(predictions.path.parent, stop))))


def _examples(task: Task, limit: int | None) -> list[Example]:
    """The test rows, the first ``limit`` of each source."""
    examples = task.examples("test")
    ((id_, count),) = Counter(e.id for e in examples).most_common(1)
    if count > 1:
        raise UserError(f"data.test: {count} rows have the id {id_}; predictions are kept by id")
    if bare := next((e for e in examples if not e.prompt), None):
        fix = "name FILE_SOURCE::FILE_TARGET (scalepeft score takes references alone)"
        raise UserError(f"data.test: {bare.id} is a reference alone, without what is asked; {fix}")
    by_source: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        by_source[str(example.meta.get("source", ""))].append(example.id)
    kept = {id_ for ids in by_source.values() for id_ in ids[:limit]}
    return [example for example in examples if example.id in kept]


def _settings(
    target: EvalTarget, task: Task, examples: list[Example], ranks: Ranks
) -> dict[str, Any]:
    """What decides the predictions, for settings.json beside them."""
    config = target.config
    asked = "".join(e.id + e.prompt for e in examples)
    keys = deciding(EvaluateConfig, Decides.PREDICTIONS)
    return {
        "subject": target.fingerprint,
        "task": task.Config.__name__,
        "task_version": task.version,
        "prompt": task.template("test"),
        "generation": [getattr(config.evaluate, key) for key in keys],
        "model": config.model.path,
        "quant": [config.model.quant, config.model.double_quant],
        "precision": config.train.precision,
        "tokenizer": target.base.tokenizer_hash,
        # Only where there are more than before there were any others.
        **({"ends": ends} if len(ends := target.base.ends) > 1 else {}),
        "batch": config.evaluate.batch_size * ranks.world_size,
        "examples": hashlib.sha256(asked.encode()).hexdigest(),
    }


def _generator(target: EvalTarget, left: Any, ranks: Ranks, poll: Any, cls: Any = Generator) -> Any:
    config = target.config
    if left and config.evaluate.backend == "vllm":
        found: Any = vllm.Generator(target, [e.prompt for e in left])
    else:
        built, tokenizer = target.load(ranks, poll), target.base.tokenizer
        synced = built.engine.sharded and ranks.world_size > 1
        found = cls(built.model, tokenizer, config.evaluate, ranks.device, synced)
    found.ends = target.base.ends
    return found


def _generate(
    target: EvalTarget, examples: list[Example], predictions: Predictions, poll: Callable[[], None]
) -> None:
    """Answers what is left; all ranks write and poll together."""
    ranks, done = predictions.ranks, set(predictions.done)
    left = [e for e in examples if e.id not in done]
    with closing(_generator(target, left, ranks, poll)) as generator:
        size = target.config.evaluate.batch_size * ranks.world_size
        prompts = encode([e.prompt for e in examples], target.base.tokenizer)
        todo = batches(examples, [len(ids) for ids, _ in prompts], size)
        lots = _lots(generator, todo, done, ranks)
        progress = Progress(len(left))
        while (before := len(predictions.done)) < len(examples):  # the same on every rank
            poll()
            predictions.append([row for row in next(lots, []) if row["id"] not in done])
            if ranks.is_main:
                progress.add(len(predictions.done) - before)


def _lots(
    generator: Backend, todo: list[list[Example]], done: set[str], ranks: Ranks
) -> Iterator[list[dict[str, Any]]]:
    """Answers of this rank's share of the rows: as they end, or of each batch that is left."""
    todo = [batch for batch in todo if not {e.id for e in batch} <= done]
    if isinstance(generator, Generator):
        if not generator.whole:
            todo = [[e for batch in todo for e in batch if e.id not in done]]
        elif generator.config.num_beams == 1 and ranks.is_main:
            say(f"a batch goes on until its longest answer ends: {generator.whole}")
    for batch in todo:
        mine = batch[ranks.rank :: ranks.world_size]
        # A rank with nothing left generates for the first prompt once more: sharded forwards are
        # collectives.
        for lot in generator.stream([e.prompt for e in mine or batch[:1]]):
            rows = lot if mine else []
            yield [{"id": mine[i].id, "prediction": text, "cut": cut} for i, text, cut in rows]


def _write_scores(
    target: EvalTarget, task: Task, examples: list[Example], predictions: Predictions
) -> None:
    """Writes scored.jsonl and scores.json, on rank 0, and says what is in them."""
    predictions.check_ours()
    config, done = target.config, predictions.done
    texts = {id_: row["prediction"] for id_, row in done.items()}
    summary, rows = scores.summarize(task, examples, texts)
    folder = predictions.path.parent
    results = {
        "task": config.data.name,
        "protocol": config.data.protocol,
        "deviations": deviations(config),
        "evaluate": to_dict(config.evaluate),
        "subject": target.kind,
        "step": target.step,
        "adapter": config.adapter.name if target.kind != "base" else None,
        "prompts_cut": sum(done[e.id]["cut"] for e in examples),
        **summary,
        "task_version": task.version,
        "versions": versions("torch", "transformers"),
    }
    with writing(folder, f"all predictions are kept: {AGAIN}"):
        scores.write(folder, results, rows)
    if task.translates:
        comet.write(folder, rows)
    for line in scores.lines(results):
        say(line)
    say(f"{config.data.name}, {target.kind}: {folder}/scores.json")
