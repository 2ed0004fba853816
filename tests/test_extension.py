"""A method, an engine and a task of others: one file and one YAML each, in a folder of theirs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT, Job, call, losses

METHOD = '''
"""y = base(x) * (1 + s), a scale of each output."""
from pydantic.dataclasses import dataclass
from torch import nn

from scalepeft.adapters.base import Adapter, AdapterConfig
from scalepeft.core.fields import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyConfig(AdapterConfig):
    """Settings.

    Attributes:
        start: the first scale.
    """

    name: str = "toy_method"
    start: float = 0.0


class ToyMethod(Adapter):
    """W' = diag(1 + s) W."""

    Config = ToyConfig
    paper = "none"

    def declare(self):
        self.scale = self.new_parameter(self.out_features)

    def reset_parameters(self):
        nn.init.constant_(self.scale, self.config.start)

    def transform_output(self, y):
        return y * (1 + self.scale).to(y.dtype)

    def flops(self):
        return 2 * self.out_features
'''
ENGINE = '''
"""Every rank holds everything; gradients are summed one tensor at a time."""
import torch.distributed as dist
from pydantic.dataclasses import dataclass

from scalepeft.core.fields import STRICT
from scalepeft.parallel.base import Engine, EngineConfig, Shares


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyConfig(EngineConfig):
    name: str = "toy_engine"


class ToyEngine(Engine):
    Config = ToyConfig

    def attach(self, model, optimizer):
        self._trained = [p for p in model.parameters() if p.requires_grad]
        return model

    def backward(self, loss, last):
        loss.backward()
        for p in self._trained if last else ():
            dist.all_reduce(p.grad)

    @classmethod
    def shares(cls, config, model, world_size, ranks_per_node):
        return Shares(base=7)  # seen in a plan alone
'''
TASK = '''
"""Sums of two digits."""
from pydantic.dataclasses import dataclass

from scalepeft.core.fields import STRICT
from scalepeft.data.tasks.base import Example, Score, Task, TaskConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyTaskConfig(TaskConfig):
    name: str = "toy_task"
    size: int = 40


class ToyTask(Task):
    Config = ToyTaskConfig
    version = 1
    reads_files = False

    def stream(self, split):
        pairs = [(i % 10, i // 10 % 10) for i in range(self.config.size)]
        for i, (a, b) in enumerate(pairs):
            yield Example(f"{split}#{i}", f"{a}+{b}=", str(a + b))

    def score(self, prediction, example):
        word = (prediction.split() or [""])[0]
        return Score(word or None, word == example.completion)
'''
WORDS = [
    "model=tiny", "model.pretrain_steps=1", "adapter=toy_method", "data=toy_task",
    "train.precision=fp32", "train.global_batch=8", "train.micro_batch=4",
    "evaluate.max_new_tokens=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("theirs")
    files = {
        "adapters/toy_method.py": METHOD,
        "engines/toy_engine.py": ENGINE,
        "tasks/toy_task.py": TASK,
        "configs/adapters/toy_method.yaml": "adapter: {name: toy_method, start: 0.5}\n"
        "train: {lr: 2.0e-3}\n",
        "configs/engines/toy_engine.yaml": "engine: {name: toy_engine}\n",
        "configs/tasks/toy_task.yaml": "data: {name: toy_task, size: 32}\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.multiprocess
@pytest.mark.slow
def test_they_train_resume_evaluate_and_merge(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*WORDS, f"extensions={folder}", "engine=toy_engine", f"run_dir={run}"]
    codes, text = Job(2, ["train", *words, "train.max_steps=4", "train.stop_at=2"]).wait()
    assert codes == [75, 75], text
    moved = shutil.copytree(folder, tmp_path / "moved")
    codes, text = Job(2, ["train", *words, f"extensions={moved}", "train.max_steps=4"]).wait()
    assert codes == [0, 0], text
    assert len(losses(run)) == 4
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["extensions"] == str(moved)
    assert (kept["adapter"]["start"], kept["data"]["size"], kept["train"]["lr"]) == (0.5, 32, 2e-3)
    done = call("evaluate", str(run), "engine.name=single")
    assert done.returncode == 0, done.stderr
    scores = json.loads((run / "eval/toy_task/scores.json").read_text())
    assert "32" in json.dumps(scores)
    done = call("merge", str(run), str(tmp_path / "merged"), "--base", "original")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_plan_asks_an_engine_it_never_heard_of(folder: Path) -> None:
    words = [*WORDS, f"extensions={folder}", "--gpus-per-node=2", "--json"]
    plans = {}
    for engine in ("ddp", "toy_engine"):
        done = call("plan", f"engine={engine}", *words)
        assert done.returncode == 0, done.stderr
        plans[engine] = json.loads(done.stdout)
    whole, seventh = (plans[engine]["resident"]["base"] for engine in plans)
    assert seventh == pytest.approx(whole / 7, rel=0.01)
    names = {c["name"]: c["count"] for c in plans["toy_engine"]["collectives"]}
    assert names["all-reduce"] > 10, "one for each tensor, found by running the engine"


def test_names_are_listed_and_guessed(folder: Path) -> None:
    missing = call("plan", "model=tiny", "data=toy", f"extensions={folder}", "adapter=toy_metod")
    assert missing.returncode == 2 and "Did you mean 'toy_method'?" in missing.stderr
    wrong = call("plan", "model=tiny", "data=toy", f"extensions={folder}", "engine.name=toy_engin")
    assert wrong.returncode == 2 and "Did you mean 'toy_engine'?" in wrong.stderr
    listed = call("methods", "--model", "mini", "--json", SCALEPEFT_EXTENSIONS=str(folder))
    assert '"toy_method"' in listed.stdout, listed.stderr


def test_a_submission_keeps_a_copy(folder: Path, tmp_path: Path) -> None:
    words = [*WORDS, "engine=toy_engine", f"run_dir={tmp_path}/run", "train.max_steps=4"]
    job = tmp_path / "job.sh"
    job.write_text(
        "#!/bin/bash\n#SBATCH --nodes=1 --ntasks-per-node=2\n"
        f"SETTINGS=({' '.join(words)} extensions={folder})\n"
        'source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"\n'
    )
    (tmp_path / "bin").mkdir()
    for name in ("bash", "git", "env"):  # a machine without Slurm
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    done = call("submit", str(job), PATH=str(tmp_path / "bin"))
    assert done.returncode == 2 and "no sbatch on this machine" in done.stderr, done.stderr
    assert "plan: toy_method: " in done.stderr
    kept = tmp_path / "run/submissions/001"
    config = yaml.safe_load((kept / "configs/0.yaml").read_text())
    assert config["extensions"] == str(kept / "code/extensions")
    for file in ("adapters/toy_method.py", "engines/toy_engine.py", "tasks/toy_task.py"):
        assert (kept / "code/extensions" / file).read_text() == (folder / file).read_text()


def test_an_entry_needs_no_yaml(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").symlink_to(folder / "adapters")
    done = call("plan", "model=tiny", "data=toy", f"extensions={tmp_path}", "adapter=toy_method",
                "--json")  # fmt: skip
    assert json.loads(done.stdout)["config"]["adapter"]["start"] == 0.0, done.stderr


@pytest.mark.parametrize(
    ("file", "code", "words", "text"),
    [
        (None, "", [], "no folder with adapters, engines, tasks in it"),
        ("adapters/lora.py", "", [], "the name 'lora' is taken"),
        ("adapters/mine.py", "import nonsense", ["adapter=mine"], "No module named 'nonsense'"),
        ("adapters/mine.py", "x = 1", ["adapter=mine"], "defines no subclass of Adapter"),
    ],
)
def test_a_broken_extension_is_one_line(
    file: str | None, code: str, words: list[str], text: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(code)
    done = call("plan", "model=tiny", "data=toy", f"extensions={tmp_path}", *words)
    assert done.returncode == 2 and text in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_an_installed_package_brings_its_own(tmp_path: Path) -> None:
    package = tmp_path / "theirs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[scalepeft.adapters]\ntoy_method = theirs\n")
    (tmp_path / "theirs.py").write_text(METHOD)
    done = subprocess.run(
        [sys.executable, "-m", "scalepeft", "plan", "model=tiny", "data=toy", "adapter=toy_method",
         "--json"],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["adapter"]["name"] == "toy_method"
