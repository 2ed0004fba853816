"""Run folders that the code of 2026-11-21 made: they resume, are found finished, evaluate, merge.

``tests/data/run-2026-11-21`` holds a base of two layers, one run stopped at step 8 of 12 and the
same run finished; ``SETTINGS`` made them, but for ``adapter.form``, which is newer.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import ROOT, zygote
from safetensors.torch import load_file
from torch import Tensor

from scalepeft.adapters.inject import read_adapter
from scalepeft.adapters.methods.hoft import HOFTConfig

OLD = ROOT / "tests/data/run-2026-11-21"
SETTINGS = (
    "model.path=base model.quant=nf4 data=toy data.train_size=120 data.valid_size=8 adapter=hoft"
    " adapter.rank=2 adapter.target_modules=q_proj,v_proj adapter.form=pairs train.precision=fp32"
    " train.lr=3e-3 train.global_batch=4 train.micro_batch=2 train.max_steps=12 train.save_every=4"
    " train.eval_every=6 evaluate.limit=12 evaluate.max_new_tokens=6"
).split()
# One float in another order is a last digit in another machine's libraries.
NEAR = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with copies of the base and of both runs, as they lay where they were made."""
    for part in OLD.iterdir():
        shutil.copytree(part, tmp_path / part.name)
    return tmp_path


def scalepeft(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return zygote().run(("-m", "scalepeft"), list(arguments), env, timeout=120, cwd=here)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        torch.testing.assert_close(tensor, b[name], **NEAR)


def test_a_stopped_run_resumes_to_the_same_adapter(here: Path) -> None:
    done = scalepeft(here, "train", *SETTINGS, "run_dir=stopped")
    assert done.returncode == 0, done.stderr
    assert "resuming stopped at step 8" in done.stderr
    new = read_adapter(here / "stopped/adapter")[1]
    same_tensors(new, load_file(OLD / "finished/adapter/adapter.safetensors"))
    steps = [json.loads(line)["step"] for line in (here / "stopped/metrics.jsonl").open()]
    assert steps == list(range(1, 13))


def test_without_a_form_an_adapter_is_of_pairs(here: Path) -> None:
    """``adapter=hoft`` means another form now: the run says so and is not spoilt."""
    adapter = here / "finished/adapter"
    assert "form" not in json.loads((adapter / "adapter_config.json").read_text())["adapter"]
    assert read_adapter(adapter)[0] == HOFTConfig(
        rank=2, target_modules=["q_proj", "v_proj"], form="pairs"
    )
    settings = [s for s in SETTINGS if s != "adapter.form=pairs"]
    refused = scalepeft(here, "train", *settings, "run_dir=stopped")
    assert refused.returncode == 2
    said = "(adapter.form: pairs there, cayley now); set adapter.form back"
    assert said in refused.stderr


def test_a_finished_run_has_nothing_left_to_train(here: Path) -> None:
    adapter = here / "finished/adapter/adapter.safetensors"
    before = (adapter.read_bytes(), adapter.stat().st_mtime_ns)
    done = scalepeft(here, "train", *SETTINGS, "run_dir=finished")
    assert done.returncode == 0, done.stderr
    assert (adapter.read_bytes(), adapter.stat().st_mtime_ns) == before


def test_the_same_run_writes_the_same_checkpoints(here: Path) -> None:
    assert scalepeft(here, "train", *SETTINGS, "run_dir=new").returncode == 0
    step = "checkpoints/step-000008"
    new, old = here / "new" / step, OLD / "stopped" / step
    assert sorted(p.name for p in new.iterdir()) == sorted(p.name for p in old.iterdir())
    for file in ("trained.safetensors", "optimizer.safetensors"):
        same_tensors(load_file(new / file), load_file(old / file))
        header = int.from_bytes((old / file).read_bytes()[:8], "little") + 8
        assert (new / file).read_bytes()[:header] == (old / file).read_bytes()[:header]
    states = [json.loads((folder / "state.json").read_text()) for folder in (new, old)]
    assert states[0]["base"].pop("sha256").keys() == {"model.safetensors"}  # of its own
    assert states[0] == states[1]


def test_old_predictions_are_kept_and_scored_again(here: Path) -> None:
    old = {
        which: json.loads((OLD / "finished" / which / "toy/scores.json").read_text())
        for which in ("eval", "eval-base")
    }
    for which, flag in (("eval", []), ("eval-base", ["--base"])):
        kept = (here / "finished" / which / "toy/predictions.jsonl").read_bytes()
        done = scalepeft(here, "evaluate", "finished", *flag)
        assert done.returncode == 0, done.stderr
        assert (here / "finished" / which / "toy/predictions.jsonl").read_bytes() == kept
        scores = json.loads((here / "finished" / which / "toy/scores.json").read_text())
        assert scores["metrics"]["accuracy"]["value"] == old[which]["metrics"]["accuracy"]["value"]
        assert scores["count"] == old[which]["count"]


def test_an_old_run_merges_and_exports(here: Path) -> None:
    done = scalepeft(here, "merge", "finished", "merged", "--base", "dequantized")
    assert done.returncode == 0, done.stderr
    assert "the next token agrees at 64 of 64" in done.stderr
    assert (here / "merged/model.safetensors").is_file()
    done = scalepeft(here, "export", "finished", "lora", "--format", "lora")
    assert done.returncode == 0, done.stderr
