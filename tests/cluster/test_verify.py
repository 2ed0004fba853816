"""scalepeft verify: each part of a pipeline's folder, whole, damaged, stale; who else sees it."""

import json
import shutil
from pathlib import Path

import pytest
from processes import ROOT, call, flip

BASE = ROOT / "tests/data/run-2026-11-21/base"

SETTINGS = (
    "data=commonsense adapter=hoft adapter.rank=2 adapter.target_modules=q_proj"
    " train.precision=fp32 train.global_batch=4 train.micro_batch=2 train.max_steps=4"
    " train.save_every=2 evaluate.limit=4 evaluate.max_new_tokens=2 data.cutoff=128"
    " pipeline.evaluate=adapter,merged"
).split()
PARTS = {  # what is damaged in the test's turn -> what the next pipeline says of it
    "merged/model.safetensors": "merge: done again: outputs changed",
    "eval/commonsense/predictions.jsonl": "rows are damaged or were changed",
    "adapter/adapter_model.safetensors": "train: done again: outputs changed",
    "checkpoints/step-000004/optimizer.safetensors": None,
    "checkpoints/step-000004/manifest.json": None,
    "adapter/adapter_config.json": None,
    "adapter/scalepeft.json": None,
    "data/test.jsonl": None,
    "stages/merge.json": None,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(BASE, folder / "base")
    rows = [
        {
            "instruction": f"Is {i} even?", "input": "", "answer": "true",
            "output": "the correct answer is true",
        }
        for i in range(12)
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    words = ["pipeline", *SETTINGS, f"model.path={folder / 'base'}", f"data.cache={folder}/cache"]
    words += [f"data.{split}={folder / 'rows.json'}" for split in ("train", "test")]
    done = call(*words, f"run_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder, words


def verified(run: Path, code: int) -> dict[str, list[str]]:
    """State -> the parts in it."""
    done = call("verify", str(run), "--json")
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for part in json.loads(done.stdout):
        found.setdefault(part["state"], []).append(part["part"])
        assert len(part["reason"]) <= 300 and part["reason"].isprintable()
    return found


@pytest.mark.slow
def test_every_part_is_read(pipeline: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, words = pipeline
    parts = verified(folder / "run", 0)["whole"]
    assert len(parts) == 5 + 2 + 4 + 1 + 1, parts  # stages, checkpoints, results, tokens, base
    text = call("verify", str(folder / "run")).stdout
    assert text.count("whole") == len(parts) == len(text.splitlines())
    for name, says in PARTS.items():
        run = tmp_path / "run"
        shutil.copytree(folder / "run", run)
        flip(run / name, (run / name).stat().st_size // 2)
        damaged = verified(run, 1)["damaged"]
        assert any(name.startswith(part) or part.startswith("stages") for part in damaged), name
        if says:
            again = call(*words, f"run_dir={run}")
            assert again.returncode == 0 and says in again.stderr, again.stderr
            assert "damaged" not in verified(run, 0)
        shutil.rmtree(run)
    for part in (folder / "base/model.safetensors", *(folder / "cache/tokens").iterdir()):
        flip(part, part.stat().st_size * 2 // 3 + 1)
        assert len(verified(folder / "run", 1)["damaged"]) == 1
        flip(part, part.stat().st_size * 2 // 3 + 1)


@pytest.mark.slow
def test_what_was_made_of_something_else_is_stale(
    pipeline: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, words = pipeline
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    more = [*words, f"run_dir={run}", "train.max_steps=6", "--until", "train"]
    assert call(*more).returncode == 0
    stale = verified(run, 1)["stale"]
    assert stale == [
        "stages/evaluate.json", "stages/merge.json", "stages/report.json",
        "eval/commonsense/predictions.jsonl",
    ]  # fmt: skip
    assert call(*more[:-2]).returncode == 0
    assert "stale" not in verified(run, 0)
    refused = call("verify", str(tmp_path))
    assert refused.returncode == 2 and "nothing of a run is in it" in refused.stderr


@pytest.mark.slow
def test_merged_as_a_link_to_scratch_stays_one(
    pipeline: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, words = pipeline
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    (run / "merged").rename(tmp_path / "scratch")
    (run / "merged").symlink_to(tmp_path / "scratch")
    done = call(*words, f"run_dir={run}", "pipeline.dtype=bf16")
    assert done.returncode == 0, done.stderr
    assert "merge: done again" in done.stderr and (run / "merged").is_symlink()
    assert (tmp_path / "scratch/model.safetensors").is_file()
    assert "damaged" not in verified(run, 0)


@pytest.mark.slow
def test_merged_weights_are_compared_before_they_answer(
    pipeline: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = pipeline
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    flip(run / "merged/model.safetensors", (run / "merged/model.safetensors").stat().st_size // 2)
    done = call("evaluate", str(run), "--merged")
    assert done.returncode == 2, done.stderr
    assert "model.safetensors has changed: sha256 differs" in done.stderr.splitlines()[-1]
