"""Generate, extract, score: predictions are appended by example id, so a killed evaluation
continues.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scalepeft import __version__, injection, models
from scalepeft.build import Built, build, start_ranks, task_of
from scalepeft.checkpoint import write_atomically
from scalepeft.config import RunConfig
from scalepeft.data import strip_eos
from scalepeft.lookup import UserError
from scalepeft.parallel.mesh import Ranks
from scalepeft.preemption import FINISHED, STOPPED, StopFlag, Stopping, tell_job
from scalepeft.progress import say
from scalepeft.records import check_base, load_run, older_adapter
from scalepeft.tasks.base import Example, Task

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
                done[row["id"]] = {"id": row["id"], "prediction": str(row["prediction"])}
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


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: list[str], config: RunConfig, built: Built, ranks: Ranks
) -> list[str]:
    """Continues each prompt greedily, left-padded, with a KV cache; returns the new text alone."""
    ids = [
        strip_eos(i, tokenizer)
        for i in tokenizer(prompts, add_special_tokens=True, verbose=False)["input_ids"]
    ]
    room = model.config.max_position_embeddings - config.evaluate.max_new_tokens
    if room < 1:
        raise UserError(
            f"evaluate.max_new_tokens={config.evaluate.max_new_tokens} fills the model's"
            f" {model.config.max_position_embeddings} positions"
        )
    length = min(max(map(len, ids)), room)
    tokens = torch.zeros(len(ids), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(ids):
        prompt = prompt[-length:]  # the end of a prompt asks the question
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    out = model.generate(
        input_ids=tokens.to(ranks.device),
        attention_mask=mask.to(ranks.device),
        max_new_tokens=config.evaluate.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        synced_gpus=built.engine.sharded and ranks.world_size > 1,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    return texts


def interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 %), in [0, 1]."""
    p, n = correct / count, count
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def score(task: Task, examples: list[Example], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Scores predictions: over all, and for each source file."""
    groups: dict[str, list[Any]] = {}
    for example in examples:
        result = task.score(rows[example.id]["prediction"], example)
        groups.setdefault("all", []).append(result)
        groups.setdefault(str(example.meta.get("source", "")), []).append(result)

    def summary(results: list[Any]) -> dict[str, Any]:
        correct = sum(r.correct for r in results)
        low, high = interval(correct, len(results))
        return {
            "count": len(results),
            "correct": correct,
            "accuracy": correct / len(results),
            "ci95": [low, high],
            "no_answer_found": sum(r.extracted is None for r in results),
        }

    return {
        **summary(groups.pop("all")),
        "sources": {name: summary(r) for name, r in sorted(groups.items())},
    }


def run(run_dir: str, settings: list[str], base: bool, stop: StopFlag) -> int:
    """Evaluates a run's adapter (or its base alone) on ``data.test``; returns the exit code, 0 or
    75.

    Writes ``RUN_DIR/eval/TASK/`` (``eval-base/TASK/`` for the base): predictions.jsonl and
    scores.json.

    Raises:
        UserError: no run, no adapter yet, no test rows.
    """
    config = load_run(run_dir, settings, ALLOWED, "an evaluation")
    ranks = start_ranks(config)
    try:
        _evaluate(config, base, ranks, stop)
        code = FINISHED
    except Stopping:
        if ranks.is_main:
            say(f"stopped; scalepeft evaluate {run_dir} continues with the rows that are left")
            tell_job("stopped", "evaluation")
        code = STOPPED
    stop.saved = True
    ranks.finish()
    return code


def _evaluate(config: RunConfig, base: bool, ranks: Ranks, stop: StopFlag) -> None:
    def poll() -> None:
        if ranks.any(stop.signal is not None):
            raise Stopping

    run_dir = Path(config.run_dir)
    task = task_of(config)
    examples = ranks.together(lambda: _limited(task.examples("test"), config.evaluate.limit))
    adapter = None if base else ranks.together(lambda: injection.read_adapter(run_dir / "adapter"))
    step = adapter[2].get("step") if adapter else None
    if ranks.is_main and (word := older_adapter(run_dir, step)):
        say(word)
    settings = {
        "adapter": None if base else _digest(run_dir / "adapter" / "adapter.safetensors"),
        "task": task.Config.__name__,
        "task_version": task.version,
        "prompt": config.data.prompt,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "model": config.model.path,
        "quant": [config.model.quant, config.model.double_quant],
        "precision": config.train.precision,
        "examples": hashlib.sha256("".join(e.id + e.prompt for e in examples).encode()).hexdigest(),
    }
    folder = run_dir / ("eval-base" if base else "eval") / config.data.name
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
        scores = score(task, examples, predictions.done)
        scores = {
            "task": config.data.name,
            "step": step,
            "adapter": None if base else config.adapter.name,
            **scores,
            **_versions(task),
        }
        write_atomically(folder / "scores.json", json.dumps(scores, indent=1))
        low, high = scores["ci95"]
        say(
            f"{config.data.name}: {scores['correct']}/{scores['count']} right ="
            f" {scores['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), no answer found in"
            f" {scores['no_answer_found']}; {folder}/scores.json"
        )


def _generate_all(
    config: RunConfig,
    adapter: Any,
    left: list[Example],
    predictions: Predictions | None,
    ranks: Ranks,
    poll: Any,
) -> None:
    built = build(config, ranks, poll, adapted=adapter is not None)
    if adapter is not None:
        trained_on, fingerprint = adapter[2].get("base_model", {}), built.base["fingerprint"]
        ranks.together(lambda: check_base(config, trained_on, fingerprint))
        injection.load_state(built.model, adapter[1], f"{config.run_dir}/adapter")
    built.engine.attach(built.model, None)
    folder = models.resolve(config.model, ranks)
    tokenizer = ranks.together(lambda: models.load_tokenizer(config.model, folder))
    built.model.eval()
    begin = time.monotonic()
    last_line = begin
    size = config.evaluate.batch_size
    for first in range(0, len(left), size * ranks.world_size):
        poll()
        batch = left[first : first + size * ranks.world_size]
        mine = batch[ranks.rank :: ranks.world_size]
        # A rank with nothing left generates for the first prompt once more: sharded forwards are
        # collectives.
        texts = generate(
            built.model, tokenizer, [e.prompt for e in mine or batch[:1]], config, built, ranks
        )
        rows = [{"id": e.id, "prediction": t} for e, t in zip(mine, texts, strict=False)]
        gathered = [row for part in ranks.gather(rows) for row in part]
        ranks.together(partial(predictions.append, gathered) if predictions else lambda: None)
        now = time.monotonic()
        if ranks.is_main and now - last_line > 10:
            last_line = now
            count = first + len(batch)
            say(
                f"{count}/{len(left)} rows, about {(now - begin) / count * (len(left) - count):.0f}"
                " s left"
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
