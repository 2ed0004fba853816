"""scalepeft init and sites: what is written for whom, and all of it from an installed wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT

from scalepeft.cluster import init, sbatch, sites
from scalepeft.cluster.plan import gpus, planning
from scalepeft.config import files
from scalepeft.core.errors import UserError

RECIPES = sorted(p.stem for p in (ROOT / "configs/recipes").glob("*.yaml"))
SITES = sorted(p.stem for p in (ROOT / "slurm/sites").glob("*.yaml"))


def site(**values: Any) -> sites.Site:
    Path("site.yaml").write_text(yaml.safe_dump({"gpus_per_node": 4, **values}))
    return sites.find("site.yaml")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def header(text: str) -> dict[str, str]:
    return sbatch.header_of(text.splitlines())


def test_a_site_answers_for_gpus_once() -> None:
    job = {"--nodes": "2", "--ntasks-per-node": "8", "--gpus-per-node": "8", "--time": "1:00"}
    job |= {"--gpus": "16", "--cpus-per-task": "8", "--partition": "old"}
    a100 = site(request="gres", gres_type="a100", sbatch={"partition": "x", "qos": 3})
    assert a100.header(job) == {
        "--nodes": "2", "--ntasks-per-node": "4", "--time": "1:00", "--cpus-per-task": "8",
        "--gres": "gpu:a100:4", "--partition": "x", "--qos": "3",
    }  # fmt: skip
    assert site(request="none", cpus_per_gpu=7).header(job) == {
        "--nodes": "2", "--ntasks-per-node": "4", "--time": "1:00", "--cpus-per-task": "7",
        "--partition": "old",
    }  # fmt: skip


def test_a_site_loses_no_rank_and_adds_none() -> None:
    a100 = site(gres_type="a100")
    many = {"--nodes": "4", "--ntasks-per-node": "4", "--gpus-per-node": "a100:4"}
    assert a100.header({"--ntasks": "16"}) == many == a100.header({"--gpus": "h100:16"})
    one = {"--nodes": "1", "--ntasks-per-node": "1", "--gpus-per-node": "a100:1"}
    assert a100.header(one | {"--gpus-per-node": "1"}) == one == a100.header({"--ntasks": "1"})
    assert a100.header(one | {"--gres": "gpu:1,tmpfs:9g"}) == one | {"--gres": "tmpfs:9g"}
    both = site(request="gres").header({"--nodes": "1", "--gres": "tmpfs:9g,gpu:8"})
    assert both == {"--nodes": "1", "--ntasks-per-node": "4", "--gres": "gpu:4,tmpfs:9g"}
    whole = {"--ntasks-per-node": "4", "--gpus-per-node": "a100:4"}
    assert a100.header({}) == {"--nodes": "1", **whole}
    assert a100.header({"--nodes": "2", "--gpus": "16"}) == {"--nodes": "2", **whole}


def test_values_of_a_site_are_text() -> None:
    Path("site.yaml").write_text(
        "{gpus_per_node: 4, internet: no, modules: , gpu: null, environment: {A: no, B: 007},"
        " sbatch: {time: 12:00:00, account: 2024_1, exclusive: , nice: 010}}"
    )
    found = sites.find("site.yaml")
    assert found.environment == {"A": "no", "B": "007"} and not found.internet
    assert found.gpu is None and found.modules == []
    ends = ["--time=12:00:00", "--account=2024_1", "--exclusive", "--nice=010"]
    assert sbatch.arguments(found.header({}))[-4:] == ends


def test_what_a_site_says_to_the_shell_is_text_with_variables() -> None:
    made = site(
        scratch="$ROOM/a b", network="ib0", internet=False, node_local="$TMPDIR",
        modules=["m/1", "n"], environment={"ODD": 'q"`touch no`"\\', "COUNT": 3},
        container="apptainer exec x.sif", srun="--cpu-bind=cores",
    ).shell()  # fmt: skip
    asked = 'set -uo pipefail; module() { echo "$@"; : "$UNSET"; }; at_site; env'
    done = subprocess.run(
        ["bash", "-c", f"{made}\n{asked}"], env={"ROOM": "/r", "TMPDIR": "/t", "HF_HOME": "mine",
        "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, *rest = done.stdout.splitlines()
    found = dict(line.split("=", 1) for line in rest)
    assert first == "load m/1 n"
    assert found["HF_HOME"] == "mine", "what was exported stays"
    assert found["SCALEPEFT_CACHE"] == "/r/a b/scalepeft" and found["SCALEPEFT_STAGE"] == "/t"
    assert found["ODD"] == 'q"`touch no`"\\' and found["COUNT"] == "3"
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ib0"
    assert found["HF_HUB_OFFLINE"] == found["HF_DATASETS_OFFLINE"] == "1"
    assert found["SCALEPEFT_CONTAINER"] == "apptainer exec x.sif"
    assert found["SCALEPEFT_SRUN"] == "--cpu-bind=cores" and not Path("no").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus_per_node: 0", "site.gpus_per_node='0'"),
        ("gpus: 4", "gpus=4: no such key"),
        ("gpus_per_node: 4\nrequest: gpu", "'gpus-per-node', 'gres' or 'none'"),
        (
            "gpus_per_node: 4\nrequest: none\ngres_type: a100",
            "gres_type=a100: request: none asks for none",
        ),
        ("[]", "expected"),
        ("{", "site.yaml"),
    ],
)
def test_a_wrong_site_is_one_line(text: str, said: str) -> None:
    Path("site.yaml").write_text(text)
    with pytest.raises(UserError) as found:
        sites.find("site.yaml")
    assert said in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("name", SITES)
def test_a_shipped_site_names_its_source_and_a_known_gpu(name: str) -> None:
    found, text = sites.find(name), (ROOT / f"slurm/sites/{name}.yaml").read_text()
    assert name.startswith("generic") or re.search(r"# From https?://\S+", text)
    assert found.gpu is None or gpus.find(found.gpu)
    subprocess.run(["bash", "-n"], input=found.shell(), text=True, check=True)


def test_sites_that_exist_are_named() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'perlmutter'.*leonardo"):
        sites.find("perlmuter")
    with pytest.raises(UserError, match=r"no recipe 'toys'. Did you mean 'toy'"):
        init.run(".", "toys", None, False)


@pytest.mark.parametrize("place", [None, "juwels-booster"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_written_and_says_what_it_needs(recipe: str, place: str | None) -> None:
    init.run("new/folder", recipe, place, False)
    file, job = Path(f"new/folder/{recipe}.yaml"), Path(f"new/folder/{recipe}.sh")
    text = file.read_text()
    assert text == (ROOT / f"configs/recipes/{recipe}.yaml").read_text()
    assert "# You need: " in text and (recipe == "toy" or "# Trade-offs: " in text)
    config, notes = files.load(str(file), [])
    wanted = files.values_of(str(file), [], [])["recipe"]["gpus"]
    found = header(job.read_text())
    nodes, tasks = sbatch.nodes_of(found), int(found["--ntasks-per-node"])
    assert nodes and nodes * tasks == wanted and notes == []
    kind, asked = ("--gres", f"gpu:{tasks}") if place else ("--gpus-per-node", str(tasks))
    assert found[kind] == asked and len({"--gres", "--gpus-per-node"} & found.keys()) == 1
    assert found["--job-name"] == recipe and ("--signal" in found and "--requeue" in found)
    if recipe != "toy":
        assert config.run_dir == f"runs/{recipe}" and config.model.quant == "nf4"
    subprocess.run(["bash", "-n", str(job)], check=True)


def test_where_to_fetch_to_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    init.run("new", "math_shoft_llama-3.1-8b", "jean-zay", False)
    line = "  scalepeft fetch math_shoft_llama-3.1-8b.yaml --out $SCRATCH/huggingface\n"
    assert line in capsys.readouterr().out
    init.run("new", "toy", "jean-zay", False)
    assert "fetch" not in capsys.readouterr().out, "which is made on the spot"
    job = Path("new/math_shoft_llama-3.1-8b.sh").read_text()
    assert 'export HF_HOME="${HF_HOME:-$SCRATCH/huggingface}"' in job


def test_a_run_on_one_device_gets_one() -> None:
    for recipe, ranks in (("toy", 1), ("gsm8k_hoft", 1), ("demo", 8)):
        init.run("new", recipe, "generic-4", False)
        assert sbatch.ranks_of(header(Path(f"new/{recipe}.sh").read_text())) == ranks


FEW = ("toy", "commonsense_hoft_llama-3.1-70b")  # the experts of a 30B are planned for minutes


@pytest.mark.parametrize(
    "recipe", [r if r in FEW else pytest.param(r, marks=pytest.mark.full) for r in RECIPES]
)
def test_a_recipe_fits_what_it_asks_for(recipe: str) -> None:
    config, _ = files.load(recipe, [])
    count = files.values_of(recipe, [], [])["recipe"]["gpus"]
    where = gpus.Options(max(1, count // 8), min(count, 8), "H100", network=False)
    plan = planning.plan(config, where)
    assert plan.fits, f"{plan.need / 2**30:.0f} GiB"


def test_a_second_init_overwrites_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    init.run(".", "toy", None, False)
    init.run(".", "toy", None, False)
    Path("toy.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"toy.yaml: is there and holds something else"):
        init.run(".", "toy", None, False)
    with pytest.raises(UserError, match=r"toy.sh: is there|toy.yaml: is there"):
        init.run(".", "toy", "generic-4", False)
    assert Path("toy.yaml").read_text() == "mine"
    Path("file").touch()
    with pytest.raises((UserError, OSError)):
        init.run("file", "toy", None, False)
    capsys.readouterr()
    init.run(".", "toy", None, True)
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", listed, re.M) for name in (*RECIPES, *SITES, "math_hra"))


WHEEL = """\
import subprocess, sys
def call(*words, **more):
    words, pipes = [sys.executable, "-P", "-m", "scalepeft", *words], {"stdout": -1, "stderr": -1}
    done = subprocess.run(words, text=True, **pipes)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    print(done.stdout, done.stderr)
call("init")
call("train", "toy.yaml", "model.pretrain_steps=0", "train.max_steps=6", "train.save_every=3")
call("submit", "toy.sh", "run_dir=runs/other", "engine.device=cpu", "--dry-run")
call("status", "runs/toy")
call("generate", "runs/toy", "--prompt", "What is red?", "evaluate.max_new_tokens=2")
"""


@pytest.mark.slow
def test_from_the_wheel_alone(tmp_path: Path) -> None:
    """A venv that sees this one's libraries and not this checkout."""
    words = [
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True
    )
    python = tmp_path / "venv/bin/python"
    home = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    # A line of a .pth file is a folder whose own .pth files, so the checkout's, are not read.
    Path(home, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/bash").symlink_to(shutil.which("bash") or "bash")  # no sbatch, no checkout
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = str(tmp_path / "bin")
    run: dict[str, Any] = {"cwd": work, "env": env, "capture_output": True, "text": True}
    where = subprocess.run([python, "-c", "import scalepeft; print(scalepeft.__file__)"], **run)
    assert where.stdout.startswith(str(tmp_path / "venv")), where.stdout + where.stderr
    done = subprocess.run([python, "-c", WHEEL], **run)
    assert done.returncode == 0, done.stderr
    assert "toy.yaml, toy.sh: yours to edit" in done.stdout
    assert (
        "scalepeft/slurm/train.sh" in (work / "toy.sh").read_text()
        or "SCALEPEFT_ROOT" in (work / "toy.sh").read_text()
    )
    assert "dry run: nothing was written or queued" in done.stdout + done.stderr
    records = [
        json.loads(line) for line in (work / "runs/toy/metrics.jsonl").read_text().splitlines()
    ]
    assert len(records) == 6
