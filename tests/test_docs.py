"""Every command of README and docs is run, and their Python too; the demo shows what README shows.

``bash`` blocks are run line by line in a folder of the page's own, with MODEL, TRAIN, TEST and the
like at hand; ``sh`` blocks are not (they install). Slurm's own lines are run by test_slurm.py.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import FULL, ROOT, zygote

README = ROOT / "README.md"
PAGES = [
    README,
    *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/integrations").glob("*.md")]),
]
SERVING = ("vllm", "llama-cpp")  # test_vllm.py runs these pages, where it has what they need
SLURM = ("sbatch", "srun", "launch/submit")  # test_slurm.py runs these
DONE_ELSEWHERE = ("bash launch/demo.sh", "bash launch/test.sh", ".venv/bin/python -m pytest")

# What keeps a command short here; the user's words stay as they are.
SHORT = [
    "train.epochs=null", "train.max_steps=2", "train.warmup_steps=0", "train.eval_every=2",
    "data.valid_size=2", "train.precision=fp32", "model.double_quant=false",
]  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands(page: Path) -> list[str]:
    """Its command lines; one that ends with a backslash goes on in the next."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


COMMANDS = [line for page in PAGES for line in commands(page)]


def run(words: list[str], cwd: Path, expect: int = 0) -> str:
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
    assert done.returncode == expect, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with what the pages' capital words stand for."""
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
    pairs = [{"prompt": row["instruction"] + "\n", "completion": row["output"]} for row in rows]
    (tmp_path / "PAIRS").write_text(json.dumps(pairs))
    shutil.copytree(tiny.make(0), tmp_path / "MODEL")
    task = {
        "task": "choose_local", "output_type": "multiple_choice", "dataset_path": "json",
        "doc_to_text": "{{instruction}}", "doc_to_target": "answer",
        "doc_to_choice": ["true", "false"],
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "TEST")}}, "test_split": "test",
    }  # fmt: skip
    (tmp_path / "TASKS").mkdir()
    (tmp_path / "TASKS/choose_local.yaml").write_text(json.dumps(task))  # JSON is YAML
    for name in ("configs", "examples", "launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def page_cases() -> list[Any]:
    """Every page with commands; with ``--full`` alone those that other tests run much of too."""
    always = ("README", "config", "checkpoints")
    return [
        pytest.param(page, id=page.stem, marks=[] if page.stem in always else [pytest.mark.full])
        for page in PAGES
        if commands(page) and page.stem not in SERVING
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", page_cases())
def test_the_commands_of_a_page(page: Path, desk: Path) -> None:
    if page.stem == "slurm":  # a run that its launch/status can look at
        shutil.copytree(ROOT / "tests/data/run-2026-11-21/finished", desk / "runs/commonsense_hoft")
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if words[0] in SLURM or command.startswith(DONE_ELSEWHERE):
            continue
        if "||" in words:
            words = ["bash", "-c", command]
        if {"train", "pipeline", "compare"} & set(words) and "model.path=MODEL" in words:
            words += SHORT
        if "compare" in words:
            words = [{"x0.3,x1,x3": "x1", "3": "1"}.get(word, word) for word in words]
        if "plan" in words and not FULL:  # what is planned is simulated
            words += ["adapter.rank=2", "adapter.target_modules=[q_proj]"]
        if any(word.startswith("examples/") for word in words):
            words += ["--steps", "2", "--cpu"]
        if words[0] == "torchrun":
            words[1:1] = ["--standalone"]
        run(words, desk)
    if page == README:
        assert (desk / "merged/model.safetensors").is_file()
        assert (desk / "runs/commonsense_hoft/report.html").is_file()
        assert (desk / "runs/commonsense_hoft/loss.png").stat().st_size > 10_000
        scores = desk / "runs/commonsense_hoft/eval/commonsense/scores.json"
        assert json.loads(scores.read_text())["count"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_the_python_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(block, names)
    if page == README:
        assert tuple(names["weight"].shape) == (64, 64)  # type: ignore[attr-defined]


def test_readme_is_a_page_that_a_newcomer_finishes() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 160
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference.html").is_file()


def spoken() -> str:
    """What the sources can say, a line a text between two placeholders."""
    texts = []
    for file in (ROOT / "scalepeft").rglob("*.py"):
        tree = ast.parse(file.read_text())
        silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and type(node.value) is str and id(node) not in silent
        ]
    for file in [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "launch").glob("*.sh")]:
        code = re.sub(r"(?m)^ *#.*", "", file.read_text())
        joined = re.sub(r'" *\\?\n *"', " ", code)  # words of one message in two lines
        texts += re.split(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+|[\"\n]", joined)
    return "\n".join(" ".join(text.split()) for text in texts)


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"(?m)^\* `(.+)`:$", page)
    assert len(quoted) == page.count("\n* `") >= 35
    said = spoken()

    def words(text: str, between: str) -> list[str]:  # three at least: fewer stand anywhere
        parts = (part.strip(" :;,") for part in re.split(between, text))
        return [part for part in parts if len(part.split()) >= 3]

    for message in quoted:
        pieces = words(message, r"\.\.\.")
        assert pieces, f"{message}: too little of it to be looked for"
        for piece in (piece for piece in pieces if piece not in said):
            parts = words(piece, r"[:;,] | \(")  # where one text is put behind another
            lost = [part for part in parts if part not in said]
            assert parts and not lost, f"no source says {lost or piece} of {message!r}"


@pytest.mark.slow
@pytest.mark.full
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
