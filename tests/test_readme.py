"""Every command of the README is run, and its Python too; the demo shows what the README says it
shows.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, zygote

README = (ROOT / "README.md").read_text()


COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
]


# What keeps a README command short here; the user's words stay as they are.
SHORT = [
    "train.epochs=null",
    "train.max_steps=2",
    "train.warmup_steps=0",
    "train.eval_every=2",
    "data.valid_size=2",
    "train.precision=fp32",
    "model.double_quant=false",
]


def run(words: list[str], cwd: Path) -> str:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    if words[0] == "scalepeft" and "evaluate" not in words:  # that one proves the installed command
        done = zygote().run(("-m", "scalepeft"), words[1:], env, timeout=400, cwd=cwd)
    else:
        done = subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, timeout=400, check=False, env=env
        )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_a_real_run(tmp_path: Path) -> None:
    from scalepeft.models import tiny

    rows = [
        {
            "instruction": f"Is {i} even?",
            "input": "",
            "output": f"the correct answer is {str(i % 2 == 0).lower()}",
            "answer": str(i % 2 == 0).lower(),
        }
        for i in range(40)
    ]
    for name in ("TRAIN", "TEST"):
        (tmp_path / name).write_text(json.dumps(rows))
    (tmp_path / "OUTPUTS").write_text("".join(row["output"] + "\n" for row in rows))
    shutil.copytree(tiny.make(0), tmp_path / "MODEL")
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    seen = []
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] in ("bash", "sbatch", "launch/submit"):  # test_slurm.py runs those of Slurm
            continue
        if {"train", "pipeline", "compare"} & set(words) and "model=tiny" not in words:
            words += SHORT
        if "compare" in words:
            words = [{"x0.3,x1,x3": "x1", "3": "1"}.get(word, word) for word in words]
        if words[0] == "torchrun":
            words[1:1] = ["--standalone"]
        run(words, tmp_path)
        seen.append(words[0])
    assert seen == [
        "scalepeft",
        "scalepeft",
        "scalepeft",
        "torchrun",
        "launch/local.sh",
        "scalepeft",  # pipeline
        "scalepeft",  # report
        "scalepeft",  # score
        "scalepeft",  # compare
        "scalepeft",  # doctor
        "scalepeft",  # plan
        "launch/status",
        "scalepeft",  # merge
        "scalepeft",  # export
        "scalepeft",  # a method by name
        "scalepeft",  # methods
        "scalepeft",  # bench
    ]
    assert (tmp_path / "runs/whole/report.html").is_file()
    assert (tmp_path / "compared-methods/compare.png").is_file()
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert (tmp_path / "bench/bench.png").stat().st_size > 10_000
    assert (tmp_path / "runs/commonsense_hoft/loss.png").stat().st_size > 10_000
    assert (
        json.loads((tmp_path / "runs/two/eval/commonsense/scores.json").read_text())["count"] == 40
    )


def test_the_python_of_the_readme() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, object] = {}
    exec(block, names)
    assert tuple(names["weight"].shape) == (128, 64)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    assert "bash launch/demo.sh" in COMMANDS and "bash launch/test.sh" in COMMANDS
    text = run(["bash", str(ROOT / "launch/demo.sh"), str(tmp_path / "demo")], tmp_path)
    scores = {
        which: json.loads((tmp_path / "demo" / folder / "toy/scores.json").read_text())["metrics"][
            "accuracy"
        ]
        for which, folder in (("base", "eval-base"), ("tuned", "eval"))
    }
    assert scores["base"]["ci95"][0] <= 0.25 <= scores["base"]["ci95"][1], (
        "the base must score chance"
    )
    assert scores["tuned"]["value"] > 0.9
    for which in scores:
        assert re.search(rf"{which} +\S+ +toy +200 +{scores[which]['value']:.1%}", text)
    assert "starts 2 (at step 0, " in text
    assert (tmp_path / "demo/loss.png").stat().st_size > 10_000
