"""prepare -> train -> merge -> evaluate -> report: each stage done once for its inputs, resumable.

A stage leaves ``RUN_DIR/stages/STAGE.begun.json`` with its inputs when it begins and
``STAGE.json`` with inputs and outputs, written last. The next start of the pipeline passes over
what is done, continues a stage whose inputs are those it began with, and does again what depends on
a changed one; results of the old inputs are set aside, never deleted, but for a merged checkpoint,
which is made again from what is there.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from scalepeft import __version__, build, train
from scalepeft.analysis.report import command as report
from scalepeft.build import start_ranks, task_of
from scalepeft.config import changes
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides
from scalepeft.core.files import digest, fsync, read_lines, write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, STOPPED, StopFlag, Stopping, tell_job
from scalepeft.core.slurm import slurm_start
from scalepeft.core.text import duration
from scalepeft.data import tokens as data
from scalepeft.data.rows import expand, paths_of
from scalepeft.data.tasks.base import Split, Task, prepared_for, to_prepared
from scalepeft.data.tokens import tokenizer_hash
from scalepeft.eval import comet, evaluate
from scalepeft.export import merge
from scalepeft.export.streaming import MADE_FROM
from scalepeft.models import hub as models
from scalepeft.models.weights import Weights
from scalepeft.parallel import ranks as ranks_
from scalepeft.parallel.ranks import Ranks, world_size
from scalepeft.run.lease import Hold, check_free

STAGES = ("prepare", "train", "merge", "evaluate", "report")
ON_RANKS = ("train", "evaluate")
"""Stages that all ranks work in, on their GPUs; the others are rank 0's."""
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
TRAINED = (
    "checkpoints", "adapter", "config.yaml", "metrics.jsonl", "validation.jsonl", "events.jsonl",
    "loss.png", "report.html", "report.md", "report",
)  # fmt: skip
"""What belongs to one training of a run folder; its generation goes on."""


@dataclass(frozen=True)
class Options:
    """What ``scalepeft pipeline`` was asked for.

    Attributes:
        first: do this stage and those after it again, though nothing has changed.
        last: end after this stage.
        only: this stage alone, as a job of a chain does; the ones before it must be done.
    """

    first: str | None = None
    last: str | None = None
    only: str | None = None


class Pipeline:
    """The stages of one run; everything but training and evaluation happens on rank 0."""

    def __init__(self, config: RunConfig, ranks: Ranks, stop: StopFlag) -> None:
        self.given, self.ranks, self.stop = config, ranks, stop
        self.folder = Path(config.run_dir)
        self.reads_files = task_of(config).reads_files
        files: dict[str, Any] = {s: [str(self._rows(s))] for s in SPLITS if getattr(config.data, s)}
        self.config = replace(config, data=replace(config.data, **files))
        """The config over the prepared rows."""
        folder = models.resolve(config.model, ranks)
        self.base = ranks.main_only(
            lambda: {
                "weights": Weights(folder).fingerprint(),
                "tokenizer": tokenizer_hash(models.load_tokenizer(config.model, folder)),
            }
        )
        """Which base this is, wherever it lies."""

    def poll(self) -> None:
        """Raises Stopping once a signal came; for work of rank 0 alone."""
        if self.stop.signal is not None:
            raise Stopping

    def check_merged(self) -> None:
        """Refuses, before a night of training, a merged checkpoint that somebody else made."""
        folder = self.folder / "merged"
        wanted = self.given.pipeline.merge != "none"
        if wanted and folder.exists() and not (folder / MADE_FROM).is_file():
            raise UserError(
                f"{folder}: is there and was not made by this pipeline; move it away"
                f" (mv {folder} {folder}-by-hand), or take pipeline.merge=none"
            )

    def _rows(self, split: str) -> Path:
        return self.folder / "data" / f"{split}.jsonl"

    # ---- manifests ------------------------------------------------------------------------------

    def _file(self, stage: str, begun: bool = False) -> Path:
        return self.folder / "stages" / f"{stage}{'.begun' if begun else ''}.json"

    def read(self, stage: str, begun: bool = False) -> dict[str, Any]:
        """A stage's manifest; empty where there is none, or a broken one."""
        try:
            found = json.loads(self._file(stage, begun).read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        inputs = found.get("inputs")
        if isinstance(inputs, dict) and isinstance(inputs.get("config"), dict):
            inputs["config"] = changes.current(inputs["config"])  # as older code wrote it
        return found

    def outputs_hold(self, stage: str) -> bool:
        """True if every file of the stage's manifest is there as it was written."""
        outputs = self.read(stage).get("outputs")
        return isinstance(outputs, dict) and all(
            (path := self.folder / name).is_file() and _facts(path) == facts
            for name, facts in outputs.items()
        )

    def begin(self, stage: str, inputs: dict[str, Any], forced: bool) -> None:
        """Leaves word of what the stage begins with; what it did before is no longer valid."""
        self._file(stage).unlink(missing_ok=True)
        write_atomically(
            self._file(stage, begun=True), json.dumps({"inputs": inputs, "forced": forced})
        )

    def finish(self, stage: str, inputs: dict[str, Any], files: list[Path], began: float) -> None:
        """Writes the manifest, after all it names is on the disk."""
        for file in files:
            fsync(file)
        outputs = {str(f.relative_to(self.folder)): _facts(f) for f in sorted(files)}
        seconds = time.time() - began
        manifest = {
            "stage": stage,
            "inputs": inputs,
            "outputs": outputs,
            "finished": time.time(),
            "seconds": seconds,  # of the start that ended it
            "scalepeft": __version__,
        }
        write_atomically(self._file(stage), json.dumps(manifest, indent=1))
        self._file(stage, begun=True).unlink(missing_ok=True)
        say(f"{stage}: done in {duration(seconds)}")
        tell_job("progress", f"{stage} done")

    # ---- what a stage depends on ----------------------------------------------------------------

    def inputs(self, stage: str) -> dict[str, Any]:
        """Everything that decides a stage's outputs, by dotted name."""
        config, task = self.given, task_of(self.given)
        if stage == "prepare":
            return {
                "data": _rows_of(config, Decides.LENGTH, Decides.PREDICTIONS),
                "task_version": task.version,
                "base": self.base,
                "files": {
                    split: {
                        str(path): _facts(path)
                        for source in expand(getattr(config.data, split), f"data.{split}")
                        for path in paths_of(source)
                    }
                    for split in SPLITS
                },
            }
        if stage == "train":
            kept = changes.deciding(config, *changes.LEARNED)
            length = {"max_steps": config.train.max_steps, "epochs": config.train.epochs}
            rows = self._prepared("train", "valid")
            return {"config": kept, "length": length, "rows": rows, "base": self.base}
        adapter = self._outputs("train")
        if stage == "merge":
            settings = {"base": config.pipeline.merge, "dtype": config.pipeline.dtype}
            return {"adapter": adapter, "pipeline": settings}
        if stage == "evaluate":
            return {
                "adapter": adapter,
                "merged": self._outputs("merge"),
                "rows": self._prepared("test"),
                "base": self.base,
                "evaluate": changes.deciding(config, *changes.EVALUATED, but=(Decides.FILES,)),
                "subjects": config.pipeline.evaluate,
                "task_version": task.version,
                "comet": os.environ.get(comet.VARIABLE) if task.translates else None,
            }
        return {"adapter": adapter, "scores": self._outputs("evaluate"), "scalepeft": __version__}

    def _outputs(self, stage: str) -> dict[str, Any]:
        return dict(self.read(stage).get("outputs", {}))

    def _prepared(self, *splits: str) -> dict[str, Any]:
        outputs = self._outputs("prepare")
        if not self.reads_files:  # its rows follow from the config
            return {"data": _rows_of(self.given)}
        names = [str(self._rows(s).relative_to(self.folder)) for s in splits]
        return {name: outputs[name] for name in names if name in outputs}

    # ---- the stages -----------------------------------------------------------------------------

    def run(self, options: Options) -> int:
        """Goes through the stages; returns the exit code."""
        last = STAGES.index(options.only or options.last or STAGES[-1])
        for stage in STAGES[: last + 1]:
            self.stop.saved = False
            inputs, state = self.ranks.main_only(partial(self._look, stage, options))
            if state == "done":
                continue
            began = time.time()
            code, files = self._do(stage)
            if code != FINISHED:
                return code
            if self.ranks.is_main:
                self.finish(stage, inputs, files, began)
        return FINISHED

    def _look(self, stage: str, options: Options) -> tuple[dict[str, Any], str]:
        """Decides between done, continued and (again) begun; says which, and why."""
        inputs = json.loads(json.dumps(self.inputs(stage)))
        manifest, begun = self.read(stage), self.read(stage, begun=True)
        forced = options.first is not None and STAGES.index(stage) >= STAGES.index(options.first)
        # A stage that is begun has no manifest.
        current = manifest.get("inputs") == inputs and self.outputs_hold(stage)
        if current and not forced:
            say(f"{stage}: done already")
            return inputs, "done"
        if options.only not in (None, stage):
            raise UserError(
                f"{self.folder}: stage {stage} comes before {options.only} and is not done for"
                f" these settings{_why(manifest or begun, inputs)}; run scalepeft pipeline with"
                f" --stage {stage} first, or without --stage"
            )
        if begun.get("inputs") == inputs and (begun.get("forced") or not forced):
            say(f"{stage}: continues where it was stopped")
            return inputs, "continued"
        held = manifest or begun
        if held:
            why = " as asked by --from" if forced else _why(held, inputs) or ": outputs changed"
            say(f"{stage}: done again{why}")
            self._set_aside(stage, forced)
        else:
            say(f"{stage}: begins")
            if stage == "train" and (self.folder / "checkpoints").is_dir():
                say(f"{self.folder}: continues the training that is there")
        self.begin(stage, inputs, forced)
        return inputs, "begun"

    def _set_aside(self, stage: str, forced: bool) -> None:
        if stage == "merge" and (self.folder / "merged").is_dir():
            say(f"{self.folder}/merged: of the old adapter or settings: removed")
            shutil.rmtree(self.folder / "merged")
        names: tuple[str, ...] = TRAINED if stage == "train" else ()
        if stage == "evaluate" and forced:  # else predictions that are still valid stay
            names = tuple(evaluate.FOLDERS.values())
        present = [n for n in names if (self.folder / n).exists()]
        if not present:
            return
        check_free(self.folder, *slurm_start())
        number = 1 + len(list(self.folder.glob("replaced-*")))
        target = self.folder / f"replaced-{number}"
        target.mkdir()
        for name in present:
            (self.folder / name).rename(target / name)
        say(f"{', '.join(present)}: of the old inputs: moved to {target}")

    def _do(self, stage: str) -> tuple[int, list[Path]]:
        """Does a stage; returns the exit code and the files that it made."""
        if stage == "train":
            code = train.run_on(self.ranks, self.config, self.stop, resume_with_changes=True)
            return code, [f for f in (self.folder / "adapter").glob("*") if f.is_file()]
        if stage == "evaluate":
            found: list[Path] = []
            for subject in self.config.pipeline.evaluate:
                evaluate.evaluate(self.config, subject, self.ranks, self.stop)
                evaluate.add_comet(self.config, subject, self.ranks, self.stop)
                where = self.folder / evaluate.FOLDERS[subject] / self.config.data.name
                found += [f for f in where.glob("*.json*") if f.is_file()]
            return FINISHED, found
        folder = models.resolve(self.config.model, self.ranks)
        alone: dict[str, Callable[[], list[Path]]] = {
            "prepare": lambda: self._prepare(folder),
            "merge": self._merge,
            "report": lambda: report.write([self.folder]),
        }
        return FINISHED, ranks_.alone(self.ranks, alone[stage])

    def _prepare(self, folder: Path) -> list[Path]:
        """Reads, checks and counts all rows once, and tokenises those to train on."""
        begun = self.read("prepare", begun=True)
        summary: dict[str, Any] = begun.get("splits", {})
        questions: dict[str, set[str]] = {}
        files = []
        for split in SPLITS:
            self.poll()
            if not getattr(self.given.data, split):
                continue
            path = self._rows(split)
            if split not in summary or not path.is_file() or _facts(path) != summary[split]["file"]:
                summary[split] = _write_rows(task_of(self.given), split, path)
                write_atomically(
                    self._file("prepare", begun=True), json.dumps({**begun, "splits": summary})
                )
            questions[split] = _questions(path)
            files.append(path)
        for held, other in (("test", "train"), ("test", "valid"), ("valid", "train")):
            common = len(questions.get(held, set()) & questions.get(other, set()))
            summary[f"{held}_questions_in_{other}"] = common
            if common:
                say(f"data.{held}: {common} of its questions are in data.{other} too")
        self.poll()
        if self.config.pipeline.merge != "none":
            merge.check_method(self.config, folder)
        tokenizer = models.load_tokenizer(self.config.model, folder)
        task = task_of(self.config)
        vocabulary = models.vocab_size(folder)
        _, _, summary["said"] = data.prepare(task, tokenizer, vocabulary, self.config.train.seed)
        for line in summary["said"]:
            say(line)
        target = self.folder / "data" / "summary.json"
        target.parent.mkdir(exist_ok=True)  # a task that reads no files has written no rows
        write_atomically(target, json.dumps(summary, indent=1))
        return [*files, target]

    def _merge(self) -> list[Path]:
        mode, target = self.config.pipeline.merge, self.folder / "merged"
        if mode == "none":
            return []
        if mode == "dequantized" and self.config.model.quant == "none":
            mode = "original"  # one and the same
        key = json.dumps(self.read("merge", begun=True)["inputs"])
        made = target / MADE_FROM
        # After a kill between the folder's rename and the manifest it is there, and whole.
        if not made.is_file() or made.read_text() != key:
            settings = [f"model.path={self.config.model.path}", "engine.device=auto"]
            run_dir, dtype = self.config.run_dir, self.config.pipeline.dtype
            merge.run(run_dir, str(target), settings, mode, dtype, key, self.poll)
        return [f for f in target.iterdir() if f.is_file()]


def _rows_of(config: RunConfig, *also: Decides) -> dict[str, Any]:
    """The keys of ``data`` that decide the rows to train on, and those marked ``also``."""
    more = changes.deciding(config, *also) if also else {}
    return {
        key: value
        for key, value in changes.flatten({"data": cfg.to_dict(config.data)})
        if changes.decides_rows(key) or key in more
    }


def _facts(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file; of merged weights, which may be hundreds of GB, the size alone."""
    known: dict[str, Any] = {"bytes": path.stat().st_size}
    if path.parent.name != "merged" or path.suffix != ".safetensors":
        known["sha256"] = digest(path)
    return known


def _why(held: dict[str, Any], inputs: dict[str, Any]) -> str:
    """Names the inputs that differ."""
    if not held:
        return ""
    was, now = (dict(changes.flatten(d)) for d in (held.get("inputs") or {}, inputs))
    changed = [k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
    said = {}
    for key in changed:
        file = key.removesuffix(".bytes").removesuffix(".sha256")
        said[file] = "" if file != key else f": {_short(was.get(key))} -> {_short(now.get(key))}"
    if not said:
        return ""
    shown = "; ".join(key + change for key, change in list(said.items())[:4])
    more = f" and {len(said) - 4} more" if len(said) > 4 else ""
    return f", as its inputs changed ({shown}{more})"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _write_rows(task: Task, split: Split, path: Path) -> dict[str, Any]:
    """Writes a split's examples as prepared rows; returns what was found in it."""
    examples = task.examples(split)
    key = prepared_for(task, split)
    rows = (json.dumps(to_prepared(e, key), ensure_ascii=False) + "\n" for e in examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(rows))
    listed = path.with_name(f"{split}.left-out.txt")
    listed.unlink(missing_ok=True)  # of an earlier reading
    if task.skipped:
        write_atomically(listed, "".join(f"{where}\n" for where in task.skipped))
        say(f"data.{split}: {len(task.skipped)} broken rows left out, listed in {listed}")
    if task.repeated:
        say(f"data.{split}: {task.repeated} rows left out as duplicates")
    for note in task.notes:
        say(f"data.{split}: {note}")
    return {
        "rows": len(examples),
        "left_out": len(task.skipped),
        "duplicates": task.repeated,
        "notes": task.notes,
        "file": _facts(path),
    }


def _questions(path: Path) -> set[str]:
    """What the prepared rows of a file ask, but for case and spacing."""
    rows = read_lines(path, "prompt", "meta")
    return {" ".join(str(r["meta"].get("question", r["prompt"])).lower().split()) for r in rows}


def run(config: RunConfig, options: Options, stop: StopFlag) -> int:
    """Runs a config's pipeline in ``config.run_dir``; returns the exit code, 0 or 75.

    Raises:
        UserError: a mistake in config or data, a stage whose predecessors are not done, or the
            folder is another process's.
    """
    check(config)
    if options.only in (None, *ON_RANKS) or world_size() > 1:
        build.check_batch(config, world_size())
        ranks = start_ranks(config)
    else:
        ranks = Ranks()  # a job without a GPU, whatever engine and device the others are for
    stages = Path(config.run_dir) / "stages"

    def claim() -> Hold | None:
        if not ranks.is_main:
            return None
        try:
            stages.mkdir(parents=True, exist_ok=True)
            check_free(stages, *slurm_start())
            return Hold(stages, 1, *slurm_start())
        except OSError as error:
            raise UserError(f"{stages}: cannot be written: {error.strerror}") from None

    hold = ranks.together(claim)
    try:
        pipeline = Pipeline(config, ranks, stop)
        ranks.main_only(pipeline.check_merged)
        code = pipeline.run(options)
    except Stopping:
        if ranks.is_main:
            say("stopped; the same command continues this stage")
            tell_job("stopped", "pipeline")
        code = STOPPED
    finally:
        if hold is not None:
            hold.release()
    stop.saved = True
    ranks.finish()
    return code


def check(config: RunConfig) -> None:
    """Refuses what would only be found out after the training."""
    wanted = config.pipeline
    if "merged" in wanted.evaluate and wanted.merge == "none":
        raise UserError(
            "pipeline.evaluate has merged, but pipeline.merge=none; take"
            " pipeline.evaluate=base,adapter"
        )
    if task_of(config).reads_files and not config.data.test:
        raise UserError("data.test is empty: the evaluate stage needs rows, data.test=FILES")
    if not wanted.evaluate:
        raise UserError("pipeline.evaluate is empty; allowed: adapter, merged, base")
