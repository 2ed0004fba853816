"""The pipeline from raw files to a report: killed anywhere, changed anywhere, run twice."""

import gzip
import json
import random
import re
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from processes import FULL, Job, call
from safetensors.torch import load_file, save_file

from scalepeft import pipeline
from scalepeft.models import tiny

SHORT = [
    "adapter=hoft", "adapter.rank=4", "train.precision=fp32", "train.lr=1e-3",
    "train.global_batch=8", "train.micro_batch=4", "train.max_steps=6", "train.save_every=2",
    "train.eval_every=3", "evaluate.max_new_tokens=8", "evaluate.num_beams=1",
    "evaluate.batch_size=4",
]  # fmt: skip


def cut(source: Path, target: Path, rows: int) -> Path:
    """The first rows of a data file, as the file has them: array, lines or text."""
    with gzip.open(source, "rt", encoding="utf-8") as f:
        text = f.read()
    if text.lstrip()[:1] == "[":
        target.write_text(json.dumps(json.loads(text)[:rows]), encoding="utf-8")
    else:
        target.write_text("\n".join(text.split("\n")[:rows]) + "\n", encoding="utf-8")
    return target


def commonsense(data: Path, to: Path) -> list[str]:
    where = data / "llm_adapters/dataset"
    train = cut(where / "ARC-Easy/train.json.gz", to / "arc.json", 60)
    tests = [
        cut(where / f"{name}/test.json.gz", to / f"{name}.json", 8)
        for name in ("ARC-Easy", "boolq")
    ]
    return [
        "data=commonsense", f"data.train={train}", f"data.test={tests[0]},{tests[1]}",
        "data.valid_size=8",
    ]  # fmt: skip


def math(data: Path, to: Path) -> list[str]:
    train = cut(data / "gsm8k/train.jsonl.gz", to / "train.jsonl", 60)
    valid = to / "valid.jsonl"
    with gzip.open(data / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as f:
        valid.write_text("".join(f.readlines()[60:68]), encoding="utf-8")
    test = cut(data / "gsm8k/test.jsonl.gz", to / "test.jsonl", 12)
    return ["data=math", f"data.train={train}", f"data.valid={valid}", f"data.test={test}"]


def translation(data: Path, to: Path) -> list[str]:
    where = data / "alma_wmt/human_written_data/deen"
    train = [cut(where / f"train.de-en.{x}.gz", to / f"train.{x}", 60) for x in ("de", "en")]
    test = cut(where / "test.de-en.json.gz", to / "test.json", 12)
    return [
        "data=translation", "data.source_language=de", "data.target_language=en",
        f"data.train={train[0]}::{train[1]}", f"data.test={test}", "data.valid_size=8",
    ]  # fmt: skip


TASKS = {"commonsense": commonsense, "math": math, "translation": translation}


def job(run_dir: Path, *settings: str, ranks: int = 1) -> Job:
    return Job(ranks, ["pipeline", *SHORT, f"run_dir={run_dir}", *settings])


def whole(run_dir: Path, *settings: str, ranks: int = 1, expect: int = 0) -> str:
    codes, text = job(run_dir, *settings, ranks=ranks).wait(180)
    assert codes == [expect] * ranks, text
    return text


def results(run_dir: Path) -> dict[str, Any]:
    """What must not depend on how often a pipeline was killed."""
    found: dict[str, Any] = {
        str(f.relative_to(run_dir)): f.read_bytes()
        for pattern in ("adapter/*.safetensors", "merged/*.safetensors", "data/*.jsonl")
        for f in sorted(run_dir.glob(pattern))
    }
    for file in sorted(run_dir.glob("eval*/*/*.json*")):
        if file.name == "scores.json":
            found[str(file.relative_to(run_dir))] = json.loads(file.read_text())
        if file.name == "scored.jsonl":
            found[str(file.relative_to(run_dir))] = file.read_text()
    assert len(found) >= 6, sorted(found)
    return found


def kill_in(stage: str, run_dir: Path, settings: list[str], after: float) -> None:
    """Starts the pipeline and kills it so long after the stage began."""
    begun, done = (run_dir / "stages" / f"{stage}{end}.json" for end in (".begun", ""))
    running = job(run_dir, *settings)
    until = time.monotonic() + 120
    while not begun.exists() and not done.exists():
        assert running.ranks[0].poll() is None, running.wait()[1]
        assert time.monotonic() < until
        time.sleep(0.002)
    time.sleep(after)
    running.kill()
    running.wait()


CASES = [(task, model) for task in TASKS for model in ("stories260K", "tiny")]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model"), CASES if FULL else CASES[1:2])
def test_killed_once_in_every_stage_it_ends_with_the_same(
    shared_data: Path, tmp_path: Path, task: str, model: str
) -> None:
    settings = TASKS[task](shared_data, tmp_path)
    where = shared_data / "models/stories260K/hf" if model == "stories260K" else "builtin:tiny"
    settings.append(f"model.path={where}")
    whole(tmp_path / "undisturbed", *settings)
    manifests = {s: tmp_path / f"undisturbed/stages/{s}.json" for s in pipeline.STAGES}
    seconds = {s: json.loads(f.read_text())["seconds"] for s, f in manifests.items()}
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for stage in pipeline.STAGES:
        kill_in(stage, tmp_path / "killed", settings, rng.uniform(0, seconds[stage]))
    whole(tmp_path / "killed", *settings)
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")
    text = whole(tmp_path / "killed", *settings)
    assert text.count("done already") == len(pipeline.STAGES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A pipeline run to its end on rows made here; its tests each change something and go on."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name, first in (("train", 0), ("test", 100)):
        rows = [question(first + i) for i in range(24)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    settings = [
        "model=tiny", "data=commonsense", "data.cutoff=128", "data.valid_size=4",
        "train.max_steps=2", f"data.train={folder}/train.json", f"data.test={folder}/test.json",
    ]  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run/merged").symlink_to(folder / "scratch")  # not there yet
    whole(folder / "run", *settings)
    return folder, settings


def question(i: int) -> dict[str, str]:
    answer = ("true", "false")[i % 2]
    return {
        "instruction": f"Is {i} even?", "input": "",
        "output": f"the correct answer is {answer}", "answer": answer,
    }  # fmt: skip


@pytest.mark.slow
def test_the_rows_of_a_run_are_one_table(tmp_path: Path) -> None:
    numbers = {"train": [*range(12), 3], "valid": [50, 5], "test": [60, 61, 5, 7]}
    for split, held in numbers.items():
        (tmp_path / f"{split}.json").write_text(
            "".join(json.dumps(row) + "\n" for row in [*map(question, held), {"broken": 1}])
        )
    settings = ["model=tiny", "data=commonsense", "data.on_error=skip", "--until", "prepare"]
    settings += [f"data.{split}={tmp_path}/{split}.json" for split in numbers]
    text = whole(tmp_path / "run", *settings)
    found = json.loads((tmp_path / "run/data/summary.json").read_text())
    held = found["tokens"]
    assert {split: counts["rows"] for split, counts in held.items()} == {"train": 12, "valid": 2}
    for counts in held.values():
        edges, bins = (counts["histogram"][key] for key in ("edges", "counts"))
        assert sum(bins) == counts["rows"] and len({b - a for a, b in pairwise(edges)}) == 1
        assert edges[-2] < counts["longest"] <= edges[-1] and bins[-1]
    table = [line.split() for line in text.splitlines() if "  " in line]
    for words in (
        "train valid test", "rows 12 2 4", "broken rows left out 1 1 1", "duplicates 1 0 0",
        "questions that train has too 1 2", "questions that valid has too 1",
        f"tokens {held['train']['tokens']:,} {held['valid']['tokens']:,}", "cutoff 512 512",
    ):  # fmt: skip
        assert table.count(["scalepeft:", *words.split()]) == 1, words
    assert "learned tokens" not in whole(tmp_path / "run", *settings), "done already"


def said(text: str) -> dict[str, str]:
    """Stage -> what was said of it first."""
    found: dict[str, str] = {}
    for stage, words in re.findall(r"scalepeft: (\w+): (.*)", text):
        if stage in pipeline.STAGES:
            found.setdefault(stage, words)
    return found


@pytest.mark.slow
def test_what_depends_on_a_change_is_done_again(finished: tuple[Path, list[str]]) -> None:
    folder, settings = finished
    run = folder / "run"
    found = said(whole(run, *settings, "evaluate.limit=5"))
    assert found["train"] == found["merge"] == "done already"
    assert found["evaluate"] == ("done again, as its inputs changed (evaluate.limit: nothing -> 5)")
    # Another row to train on: everything after it, and the old training is kept.
    rows = [question(i) for i in range(25)]
    (folder / "train.json").write_text(json.dumps(rows))
    before = (run / "adapter/adapter_model.safetensors").read_bytes()
    base = (run / "eval-base/commonsense/predictions.jsonl").stat().st_mtime_ns
    text = whole(run, *settings, "evaluate.limit=5")
    assert all(words.startswith("done again") for words in said(text).values()), text
    assert f"files.train.{folder}/train.json" in said(text)["prepare"]
    assert (run / "replaced-1/adapter/adapter_model.safetensors").read_bytes() == before
    assert (run / "replaced-1/checkpoints").is_dir()
    assert (run / "adapter/adapter_model.safetensors").read_bytes() != before
    assert (run / "eval-base/commonsense/predictions.jsonl").stat().st_mtime_ns == base, (
        "the base has not changed, nor what it is asked"
    )
    merged = "eval-merged/commonsense/predictions.jsonl"
    assert (run / "replaced-2" / merged).is_file(), "what the old adapter's checkpoint answered"
    assert (run / "merged").is_symlink() and (folder / "scratch/model.safetensors").is_file()
    # A lost output is made again, and so is what another process wrote into one.
    (run / "merged/model.safetensors").unlink()
    assert said(whole(run, *settings, "evaluate.limit=5"))["merge"] == "done again: outputs changed"
    # By request.
    text = whole(run, *settings, "evaluate.limit=5", "--from", "train", "--until", "train")
    assert said(text) == {
        "prepare": "done already", "train": "done again as asked by --from",
    }  # fmt: skip
    assert (run / "replaced-3/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_another_base_or_a_foreign_training_is_not_taken(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    _, settings = finished
    model = tmp_path / "model"
    shutil.copytree(tiny.make(0), model)
    run = tmp_path / "run"
    words = [*settings, f"model.path={model}", "pipeline.evaluate=base", "pipeline.merge=none"]
    whole(run, *words)
    moved = tmp_path / "moved"
    model.rename(moved)
    words[-3] = f"model.path={moved}"
    assert whole(run, *words).count("done already") == 5, "a moved folder is the same base"
    file = moved / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v * 1.01 for k, v in tensors.items()}, file, {"format": "pt"})
    found = said(whole(run, *words))
    assert "base.weights" in found["train"] and found["evaluate"].startswith("done again")
    assert (run / "replaced-1/adapter").is_dir()
    # A training of other rows in the folder is named, and stays.
    other = tmp_path / "other"
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([question(i) for i in range(30, 60)]))
    done = call("train", *SHORT, *settings, f"data.train={rows}", f"run_dir={other}")
    assert done.returncode == 0, done.stderr
    text = whole(other, *settings, expect=2)
    assert "training rows differ from those it began with" in text
    # So is a merged checkpoint of somebody else's, before anything is done.
    (other / "merged").mkdir()
    assert "was not made by this pipeline" in whole(other, *settings, expect=2)


@pytest.mark.slow
def test_stages_as_jobs_of_their_own(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, settings = finished
    run = tmp_path / "run"
    text = whole(run, *settings, "--stage", "train", expect=2)
    assert "stage prepare comes before train and is not done" in text and "--stage prepare" in text
    whole(run, *settings, "--stage", "prepare")
    whole(run, *settings, "train.stop_at=1", "--stage", "train", expect=75)
    text = whole(run, *settings, "--stage", "merge", expect=2)
    assert "stage train comes before merge" in text, "a job without a GPU trains nothing"
    for stage in pipeline.STAGES:
        ranks = 2 if stage in ("train", "evaluate") else 1
        engine = "engine=ddp" if ranks > 1 else "engine=single"
        found = said(whole(run, *settings, engine, "--stage", stage, ranks=ranks))
        begun = {"prepare": "done already", "train": "continues where it was stopped"}
        assert found[stage] == begun.get(stage, "begins"), found
    text = whole(run, *settings)
    assert text.count("done already") == len(pipeline.STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate"])
def test_a_signal_leaves_with_75_and_the_same_command_goes_on(
    finished: tuple[Path, list[str]], tmp_path: Path, stage: str
) -> None:
    _, settings = finished
    state = tmp_path / "job"
    state.mkdir()
    running = Job(
        1, ["pipeline", *SHORT, *settings, f"run_dir={tmp_path}/run"],
        {"SCALEPEFT_JOB_STATE": str(state)},
    )  # fmt: skip
    begun = tmp_path / f"run/stages/{stage}.begun.json"
    while not begun.exists():
        assert running.ranks[0].poll() is None
        time.sleep(0.002)
    running.kill(signal.SIGTERM)
    codes, text = running.wait()
    if codes != [0]:  # the signal may come when the stage's last batch is done
        assert codes == [75], text
        assert (state / "stopped").is_file()
        text = whole(tmp_path / "run", *settings)
        assert said(text)[stage] in ("continues where it was stopped", "done already"), text


def test_mistakes_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([question(i) for i in range(8)]))
    settings = [*SHORT, "model=tiny", "data=commonsense", f"data.train={rows}", "data.cutoff=128"]
    settings.append("data.valid_size=2")
    for more, wanted in (
        (["run_dir=-x"], "data.test is empty"),
        ([f"data.test={rows}", "pipeline.merge=none"], "pipeline.evaluate has merged"),
        ([f"data.test={tmp_path}/none.json"], "no such file"),
        ([f"data.test={rows}", "adapter=surm_adapter"], "cannot merge"),
        ([f"data.test={rows}", "pipeline.evaluate=adaptor"], "pipeline.evaluate.0='adaptor'"),
        ([f"data.test={rows}", "data.protocol=clear"], "Did you mean 'clean'?"),
    ):
        done = call("pipeline", *settings, f"run_dir={tmp_path}/run", *more)
        assert done.returncode == 2, done.stderr
        assert wanted in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr
