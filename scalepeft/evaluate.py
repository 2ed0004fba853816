"""Generate, extract, score: predictions are appended by example id, so a killed evaluation
continues.
"""

import hashlib
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scalepeft import __version__, injection, models, scores
from scalepeft.build import build, start_ranks, task_of
from scalepeft.checkpoint import write_atomically
from scalepeft.config import RunConfig, Subject, deviations
from scalepeft.generation import Generator
from scalepeft.goodput import duration
from scalepeft.lookup import UserError
from scalepeft.parallel.mesh import Ranks
from scalepeft.preemption import FINISHED, STOPPED, StopFlag, Stopping, tell_job
from scalepeft.progress import say
from scalepeft.records import check_base, load_run, older_adapter
from scalepeft.tasks.base import Example, Task
from scalepeft.weights import Weights

ALLOWED = (
    "evaluate.",
    "data.test",
    "data.cache",
    "engine",
    "engine.",
    "model.path",
    "model.revision",
    "train.precision",
)


@dataclass
class Predictions:
    """``predictions.jsonl`` of one evaluation on rank 0: what is done already, and appending."""

    path: Path
    done: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> "Predictions":
        """Continues predictions of the same adapter and settings; sets those of others aside."""
        path = folder / "predictions.jsonl"
        marker = folder / "settings.json"
        try:
            same = not path.exists() or json.loads(marker.read_text()) == settings
        except (OSError, ValueError):
            same = False
        try:
            if not same:
                number = 1 + len(list(folder.parent.glob(f"{folder.name}.old-*")))
                folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
                say(
                    f"{folder}: predictions of another adapter or other settings: kept as"
                    f" {folder.name}.old-{number}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(marker, json.dumps(settings, indent=1, sort_keys=True))
            done, lines = cls._read(path)
            if path.exists() and lines != path.read_bytes():
                write_atomically(path, lines.decode())  # without what a kill left torn
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        return cls(path, done)

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
        done: dict[str, dict[str, Any]] = {}
        kept = b""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                row = json.loads(line)
                done[row["id"]] = {**row, "prediction": str(row["prediction"]), "cut": row["cut"]}
            except (ValueError, KeyError, TypeError):
                continue  # generated again
            kept += line if line.endswith(b"\n") else line + b"\n"
        return done, kept

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes a batch of predictions."""
        with self.path.open("a") as f:
            f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.done.update((row["id"], row) for row in rows)
        tell_job("progress", f"{len(self.done)} predictions")


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
    config = load_run(run_dir, settings, ALLOWED, "an evaluation")
    ranks = start_ranks(config)
    try:
        evaluate(config, subject, ranks, stop)
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

    run_dir = Path(config.run_dir)
    task = task_of(config)
    examples = ranks.together(lambda: _limited(task.examples("test"), config.evaluate.limit))
    adapter, step, of = None, None, None
    if subject == "adapter":
        adapter = ranks.together(lambda: injection.read_adapter(run_dir / "adapter"))
        step, of = adapter[2].get("step"), _digest(run_dir / "adapter" / "adapter.safetensors")
        if ranks.is_main and (word := older_adapter(run_dir, step)):
            say(word)
    elif subject == "merged":
        config, of = ranks.together(lambda: _merged(config))
    settings = {
        "subject": of,
        "task": task.Config.__name__,
        "task_version": task.version,
        "prompt": task.template("test"),
        "generation": [getattr(config.evaluate, key) for key in DECIDING],
        "model": config.model.path,
        "quant": [config.model.quant, config.model.double_quant],
        "precision": config.train.precision,
        "examples": hashlib.sha256("".join(e.id + e.prompt for e in examples).encode()).hexdigest(),
    }
    folder = run_dir / FOLDERS[subject] / config.data.name
    predictions = ranks.together(
        lambda: Predictions.open(folder, settings) if ranks.is_main else None
    )
    done: set[str] = ranks.main_only(lambda: set(predictions.done) if predictions else set())
    left = sorted((e for e in examples if e.id not in done), key=lambda e: (-len(e.prompt), e.id))
    if ranks.is_main and done:
        say(f"{len(done)} predictions are there already, {len(left)} to go")
    if left:
        _generate_all(config, adapter, left, predictions, ranks, poll)
    if predictions:
        _write_scores(config, task, examples, predictions, {"subject": subject, "step": step})


DECIDING = ("max_new_tokens", "max_tokens", "num_beams", "stop", "backend")
"""Keys of ``evaluate`` that decide what is generated."""


def _merged(config: RunConfig) -> tuple[RunConfig, str]:
    """The config that loads ``RUN_DIR/merged`` in place of base and adapter, and which it is."""
    folder = Path(config.run_dir) / "merged"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no merged checkpoint there; scalepeft merge {config.run_dir} {folder}"
        )
    model = replace(config.model, path=str(folder), revision=None, quant="none", double_quant=False)
    return replace(config, model=model), Weights(folder).fingerprint()


def _write_scores(
    config: RunConfig,
    task: Task,
    examples: list[Example],
    predictions: Predictions,
    about: dict[str, Any],
) -> None:
    texts = {id_: row["prediction"] for id_, row in predictions.done.items()}
    summed, rows = scores.summarise(task, examples, texts)
    folder = predictions.path.parent
    found = {
        "task": config.data.name,
        "protocol": config.data.protocol,
        "deviations": deviations(config),
        **about,
        "adapter": config.adapter.name if about["subject"] != "base" else None,
        "prompts_cut": sum(predictions.done[e.id]["cut"] for e in examples),
        **summed,
        **_versions(task),
    }
    scores.write(folder, found, rows)
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


def _generate_all(
    config: RunConfig,
    adapter: Any,
    left: list[Example],
    predictions: Predictions | None,
    ranks: Ranks,
    poll: Any,
) -> None:
    generator = _generator(config, adapter, ranks, poll)
    begin = time.monotonic()
    last_line = begin
    size = config.evaluate.batch_size
    for first in range(0, len(left), size * ranks.world_size):
        poll()
        batch = left[first : first + size * ranks.world_size]
        mine = batch[ranks.rank :: ranks.world_size]
        # A rank with nothing left generates for the first prompt once more: sharded forwards are
        # collectives.
        texts, cut = generator([e.prompt for e in mine or batch[:1]])
        rows = [
            {"id": e.id, "prediction": t, "cut": c}
            for e, t, c in zip(mine, texts, cut, strict=False)
        ]
        gathered = [row for part in ranks.gather(rows) for row in part]
        ranks.together(partial(predictions.append, gathered) if predictions else lambda: None)
        now = time.monotonic()
        if ranks.is_main and now - last_line > 10:
            last_line = now
            count = first + len(batch)
            say(
                f"{count}/{len(left)} rows, about"
                f" {duration((now - begin) / count * (len(left) - count))} left"
            )


def _generator(config: RunConfig, adapter: Any, ranks: Ranks, poll: Any) -> Generator:
    built = build(config, ranks, poll, adapted=adapter is not None)
    if adapter is not None:
        trained_on, fingerprint = adapter[2].get("base_model", {}), built.base["fingerprint"]
        ranks.together(lambda: check_base(config, trained_on, fingerprint))
        injection.load_state(built.model, adapter[1], f"{config.run_dir}/adapter")
    built.engine.attach(built.model, None)
    folder = models.resolve(config.model, ranks)
    tokenizer = ranks.together(lambda: models.load_tokenizer(config.model, folder))
    built.model.eval()
    return Generator(
        built.model,
        tokenizer,
        config.evaluate,
        ranks.device,
        built.engine.sharded and ranks.world_size > 1,
    )


def _limited(examples: list[Example], limit: int | None) -> list[Example]:
    if limit is None:
        return examples
    taken: dict[str, int] = {}
    kept = []
    for example in examples:
        source = str(example.meta.get("source", ""))
        taken[source] = taken.get(source, 0) + 1
        if taken[source] <= limit:
            kept.append(example)
    return kept


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
