"""``scalepeft pipeline``: prepare -> train -> merge -> evaluate -> report, each ``Stage`` once."""

import json
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from scalepeft import __version__, train
from scalepeft.analysis import rows
from scalepeft.analysis.report import command as report
from scalepeft.analysis.report.load import read_all
from scalepeft.build import check_batch, start_ranks, task_of
from scalepeft.config import changes
from scalepeft.config.schema import RunConfig, to_dict
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides
from scalepeft.core.files import write_atomically, writing
from scalepeft.core.launch import world_size
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, StopFlag, tell_job
from scalepeft.core.text import duration, table
from scalepeft.data import prepared, token_file
from scalepeft.data.rows import expand, paths_of
from scalepeft.data.tasks.base import SPLITS, Split
from scalepeft.eval import comet, evaluate
from scalepeft.export import merge
from scalepeft.export.streaming import MADE_FROM, changed
from scalepeft.models.hub import open_base
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.lease import Lease, check_free, claim
from scalepeft.run.stage import MADE_OF, Stage, facts, plain, set_aside

STAGES = ("prepare", "train", "merge", "evaluate", "report")
ON_RANKS = ("train", "evaluate")
"""All ranks work in these, on their GPUs; the others are rank 0's."""
RESULTS = {
    "train": (
        "checkpoints", "adapter", "config.yaml", "metrics.jsonl", "validation.jsonl",
        "diagnostics.jsonl", "events.jsonl", "loss.png", "report.html", "report.md", "report",
    ),
    "evaluate": tuple(evaluate.FOLDERS.values()),
}  # fmt: skip
"""What belongs to one training of a run folder, whose generation goes on, and to evaluations."""


class Pipeline:
    """The stages of one run; everything but training and evaluation happens on rank 0."""

    def __init__(self, config: RunConfig, ranks: Ranks, stop: StopFlag) -> None:
        self.raw, self.ranks, self.stop = config, ranks, stop
        self.folder = Path(config.run_dir)
        self.stages = {name: Stage(self.folder / "stages", name) for name in STAGES}
        files: dict[str, Any] = {s: [str(self._rows(s))] for s in SPLITS if getattr(config.data, s)}
        self.config = replace(config, data=replace(config.data, **files))
        self.base = base = open_base(config.model, ranks)
        self.task = task_of(config, base.tokenizer)
        self.prepared = task_of(self.config, base.tokenizer)  # over the prepared rows
        self.task.poll = self.prepared.poll = stop.check  # for work of rank 0 alone
        self.base_hashes = ranks.run_on_main(
            lambda: {"weights": base.fingerprint, "tokenizer": base.tokenizer_hash}
        )

    def run(self, first: str | None, last: str, only: str | None) -> int:
        """Goes through the stages to ``last``; returns the exit code."""
        for name in STAGES[: STAGES.index(last) + 1]:
            self.stop.saved = False
            inputs = self.ranks.run_on_main(partial(self._begin, name, first, only))
            if inputs is None:
                continue
            started = time.time()
            code, files = self._do(name)
            if code != FINISHED:
                return code
            if self.ranks.is_main:
                manifest = self.stages[name].finish(inputs, files, started)
                say(f"{name}: done in {duration(manifest['seconds'])}")
                tell_job("progress", f"{name} done")
        return FINISHED

    def _rows(self, split: str) -> Path:
        return self.folder / "data" / f"{split}.jsonl"

    def _begin(self, name: str, first: str | None, only: str | None) -> dict[str, Any] | None:
        """Returns the inputs of a stage that is begun, or continued; None if it is done."""
        stage, inputs = self.stages[name], plain(self._inputs(name))
        forced = first is not None and STAGES.index(name) >= STAGES.index(first)
        if not forced and stage.is_done(inputs):
            say(f"{name}: done already")
            return None
        changed = stage.changes(inputs)
        why = f", as its inputs changed ({changed})" if changed else ""
        if only not in (None, name):
            raise UserError(
                f"{self.folder}: stage {name} comes before {only} and is not done for"
                f" these settings{why}; run it first, with --stage {name} or without --stage"
            )
        if stage.is_begun(inputs) and (stage.begun().get("forced") or not forced):
            say(f"{name}: continues where it was stopped")
            return inputs
        if stage.done() or stage.begun():
            why = " as asked by --from" if forced else why or ": outputs changed"
            say(f"{name}: done again{why}")
            self._set_aside(name, forced)
        else:
            say(f"{name}: begins")
        stage.begin(inputs, forced=forced)
        return inputs

    def _set_aside(self, name: str, forced: bool) -> None:
        if name == "merge":
            self._drop_merged()
        # Predictions that are still valid stay.
        old = RESULTS.get(name, ()) if name == "train" or forced else ()
        if any((self.folder / entry).exists() for entry in old):
            check_free(self.folder)
            say(f"{name}: results of the old inputs: moved to {set_aside(self.folder, old)}")

    def _drop_merged(self) -> None:
        folder = self._merged()
        if (folder / MADE_FROM).is_file():
            say(f"{folder}: of the old adapter or settings, or damaged: removed")
            with writing(folder, "remove it"):
                shutil.rmtree(folder)

    def _merged(self) -> Path:
        """Where the merged checkpoint lies: a link, to scratch say, stays one."""
        folder = self.folder / "merged"
        return folder.resolve() if folder.is_symlink() else folder

    def _inputs(self, name: str) -> dict[str, Any]:
        """Everything that decides a stage's outputs, by dotted name."""
        config = self.raw
        made_of = MADE_OF.get(name, {}).items()
        made: dict[str, Any] = {key: self.stages[of].outputs() for key, of in made_of}
        if name == "prepare":
            sources = {s: expand(getattr(config.data, s), f"data.{s}") for s in SPLITS}
            form = self.task.renderer.chat_template
            return {
                "data": settings_of(name, config),
                "task_version": self.task.version,
                "base": self.base_hashes,
                **({"chat_template": form} if form else {}),
                "files": {
                    split: {str(path): facts(path) for name in names for path in paths_of(name)}
                    for split, names in sources.items()
                },
            }
        if name == "train":
            return {
                "config": settings_of(name, config),
                "length": {"max_steps": config.train.max_steps, "epochs": config.train.epochs},
                "rows": self._prepared("train", "valid"),
                "base": self.base_hashes,
            }
        if name == "merge":
            settings = {"base": config.pipeline.merge, "dtype": config.pipeline.dtype}
            return made | {"pipeline": settings}
        if name == "evaluate":
            return made | {
                "rows": self._prepared("test"),
                "base": self.base_hashes,
                "evaluate": settings_of(name, config),
                "subjects": config.pipeline.evaluate,
                "task_version": self.task.version,
                "comet": os.environ.get(comet.VARIABLE) if self.task.translates else None,
            }
        return made | {"scalepeft": __version__}

    def _prepared(self, *splits: str) -> dict[str, Any]:
        if not self.task.reads_files:  # its rows follow from the config
            return {"data": _rows_of(self.raw)}
        names, outputs = [f"data/{s}.jsonl" for s in splits], self.stages["prepare"].outputs()
        return {name: outputs[name] for name in names if name in outputs}

    def _do(self, name: str) -> tuple[int, list[Path]]:
        """Does a stage; returns the exit code and the files that it made."""
        if name == "train":
            code = train.run_on(self.ranks, self.config, self.stop, True, self.base)
            return code, _files(self.folder / "adapter")
        if name == "evaluate":
            kinds = self.config.pipeline.evaluate
            for kind in kinds:
                evaluate.evaluate(self.config, kind, self.ranks, self.stop)
            folders = (evaluate.folder_of(self.config, kind) for kind in kinds)
            return FINISHED, [f for folder in folders for f in _files(folder, "*.json*")]
        work = {
            "prepare": self._prepare,
            "merge": self._merge,
            "report": lambda: report.write(read_all([self.folder])),
        }
        return FINISHED, self.ranks.alone(work[name]) or []

    def _prepare(self) -> list[Path]:
        """Reads, checks and counts all rows once, and tokenizes those to train on."""
        stage = self.stages["prepare"]
        summary: dict[str, Any] = stage.begun().get("splits", {})
        files: dict[Split, Path] = {}
        for split in SPLITS:
            self.stop.check()
            if not getattr(self.raw.data, split):
                continue
            path = files[split] = self._rows(split)
            # Of a start that was killed, a split that was written whole is not read again.
            if split not in summary or not path.is_file() or facts(path) != summary[split]["file"]:
                summary[split] = prepared.write(self.task, split, path) | {"file": facts(path)}
                stage.note(splits=summary)
        summary |= prepared.overlaps(files)
        self.stop.check()
        if self.config.pipeline.merge != "none":
            merge.check_method(self.config, self.base.folder)
        base, raw = self.base, self.raw
        made = token_file.files(self.prepared, base.tokenizer, base.vocab_size, base.ends)
        summary["said"] = token_file.prepared(made, self.config.data, raw.train.seed)[2]
        summary["tokens"] = {s: rows.counts_of(token_file.read(f)[0], raw) for s, f in made.items()}
        for line in [*summary["said"], *table(rows.cells(rows.columns(summary)))]:
            say(line)
        target = self.folder / "data" / "summary.json"
        target.parent.mkdir(exist_ok=True)  # a task that reads no files has written no rows
        write_atomically(target, json.dumps(summary, indent=1))
        return [*files.values(), target]

    def _merge(self) -> list[Path]:
        mode, target = self.config.pipeline.merge, self._merged()
        if mode == "none":
            return []
        if self.config.model.quant == "none":
            mode = "original"  # as dequantized is then
        key = json.dumps(self.stages["merge"].begun()["inputs"])
        made = target / MADE_FROM
        # After a kill between the folder's rename and the manifest it is there, and whole.
        if not made.is_file() or made.read_text() != key or changed(target):
            self._drop_merged()
            settings = [f"model.path={self.config.model.path}", "engine.device=auto"]
            dtype = self.config.pipeline.dtype
            merge.run(self.config.run_dir, str(target), settings, mode, dtype, key, self.stop.check)
        return _files(self.folder / "merged")


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    return [f for f in folder.glob(pattern) if f.is_file()]


def settings_of(stage: str, config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide what ``prepare``, ``train`` or ``evaluate`` makes."""
    if stage == "prepare":
        return _rows_of(config, Decides.LENGTH, Decides.PREDICTIONS)
    if stage == "train":
        return changes.deciding(config, *changes.LEARNED)
    scored = changes.deciding(config, *changes.EVALUATED, but=(Decides.FILES,))
    return {key.removeprefix("evaluate."): value for key, value in scored.items()}


def _rows_of(config: RunConfig, *also: Decides) -> dict[str, Any]:
    """The keys of ``data`` that decide the rows to train on, and those marked ``also``."""
    more = changes.deciding(config, *also)
    return {
        key: value
        for key, value in to_dict(config.data).items()
        if changes.decides_rows(f"data.{key}") or f"data.{key}" in more
    }


def run(
    config: RunConfig, stop: StopFlag, first: str | None, last: str | None, only: str | None
) -> int:
    """Runs a config's pipeline; returns the exit code, 0 or 75. From ``first`` on all is done
    again, ``last`` is the end, ``only`` is done alone. Raises UserError: a mistake in config or
    data, an earlier stage is not done, or the folder is another process's.
    """
    check(config)
    ranks = Ranks()  # a job without a GPU, whatever engine and device the others are for
    if only in (None, *ON_RANKS) or world_size() > 1:
        check_batch(config, world_size())
        ranks = start_ranks(config)
    stages = Path(config.run_dir) / "stages"
    lease = ranks.alone(lambda: _claim(stages))

    def work() -> int:
        return Pipeline(config, ranks, stop).run(first, only or last or STAGES[-1], only)

    try:
        code = stop.guard(work, "pipeline", "the same command continues this stage")
    finally:
        if lease is not None:
            lease.release()
    ranks.finish()
    return code


def _claim(stages: Path) -> Lease:
    with writing(stages):
        stages.mkdir(parents=True, exist_ok=True)
        return Lease(stages, claim(stages))


def check(config: RunConfig) -> None:
    """Raise UserError for what would else be found after the training."""
    task, wanted, merged = task_of(config), config.pipeline, Path(config.run_dir) / "merged"
    if wanted.merge != "none" and merged.exists() and not (merged / MADE_FROM).is_file():
        fix = "move it, or set pipeline.merge=none"
        raise UserError(f"{merged}: was not made by this pipeline; {fix}")
    if "merged" in wanted.evaluate and wanted.merge == "none":
        raise UserError("pipeline.evaluate has merged, but pipeline.merge=none; change one")
    if task.reads_files and not config.data.test:
        raise UserError("data.test is empty: the evaluate stage needs rows, data.test=FILES")
    if not wanted.evaluate:
        raise UserError("pipeline.evaluate is empty; allowed: adapter, merged, base")
