"""slurm/train.sh, launch/submit and launch/status on a real Slurm of four nodes on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, adapter_bytes, losses, rows, train
from slurm_cluster import Cluster, missing

pytestmark = pytest.mark.slow

SETTINGS = [*TINY, "engine=fsdp2", "engine.device=cpu", "model.quant=nf4", "train.save_every=5"]
SETTINGS += ["train.max_steps=50"]
JOB = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node={ranks}
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output={folder}/%j.log
#SBATCH --chdir={folder}
SETTINGS=({settings})
source "${{SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}}/slurm/train.sh" "$@"
exit 2
"""
# A slow disk: every fsync takes a moment, so that a power cut can be in the middle of a save.
SLOW_DISK = """\
import os, time
fsync = os.fsync
def slow(fd):
    time.sleep(0.15)
    fsync(fd)
os.fsync = slow
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if lacking := missing():
        if os.environ.get("CI"):
            pytest.fail(f"no Slurm cluster: {lacking}")
        pytest.skip(f"no Slurm cluster: {lacking}")
    cluster = Cluster()
    yield cluster
    cluster.stop()


class Runs:
    """Jobs of one test: submitted from its folder, cancelled at its end."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.jobs: list[str] = []
        self.env = {
            "SCALEPEFT_ROOT": str(ROOT),
            "SCALEPEFT_CACHE": os.environ["SCALEPEFT_CACHE"],
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def job_file(self, *settings: str, ranks: int = 1) -> Path:
        file = self.folder / "job.sh"
        words = " ".join([*SETTINGS, f"run_dir={self.folder}/run", *settings])
        file.write_text(JOB.format(folder=self.folder, ranks=ranks, settings=words))
        return file

    def submit(self, *words: str) -> str:
        job = self.cluster.run("sbatch", "--parsable", *words, env=self.env).strip()
        self.jobs.append(job)
        return job

    def log(self, job: str) -> str:
        return (self.folder / f"{job}.log").read_text()

    def wait_step(self, step: int, timeout: float = 90) -> None:
        file = self.folder / "run" / "metrics.jsonl"
        deadline = time.monotonic() + timeout
        while not file.exists() or file.read_text().count("\n") < step:
            log = "".join(f.read_text() for f in self.folder.glob("*.log"))
            newest = log.rpartition(": start ")[2]
            over = "no requeue" in newest or "finished" in newest or time.monotonic() > deadline
            assert not over, f"never came to step {step}\n{log}"
            time.sleep(0.05)

    def steps(self) -> int:
        return len(rows(self.folder / "run"))


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(cluster, tmp_path)
    yield runs
    for job in runs.jobs:
        cluster.run("scancel", job, check=False)
    deadline = time.monotonic() + 60
    while cluster.idle() < cluster.nodes and time.monotonic() < deadline:
        time.sleep(0.1)


def preempt(runs: Runs, node: str, seconds: int = 0) -> None:
    """A job of a higher partition takes all of a node."""
    command = f"sleep {seconds}"
    runs.submit("-p", "high", "-N1", "-n4", "-w", node, "-o", "/dev/null", "--wrap", command)


def nodes_of(job: dict[str, str], cluster: Cluster) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", job["NodeList"]).split()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(2, folder, *SETTINGS)
    return folder


def starts_of(runs: Runs) -> list[dict[str, Any]]:
    return [e for e in rows(runs.folder / "run", "events.jsonl") if e["event"] == "start"]


def test_two_nodes_of_two_ranks(runs: Runs) -> None:
    job = runs.submit(str(runs.job_file(ranks=2)), "train.max_steps=8")
    done = runs.cluster.wait(job, "COMPLETED")
    (start,) = starts_of(runs)
    assert start["host"] == nodes_of(done, runs.cluster)[0] == "node1"
    assert (start["world_size"], start["engine"], start["job"]) == (4, "fsdp2", job)
    log = runs.log(job)
    assert "start 1 (restarts: 0)" in log and "4 ranks on 2 nodes: node[1-2]" in log
    assert "node node2: no GPU that nvidia-smi sees; python 3" in log


def test_five_preemptions_of_every_kind_change_nothing(runs: Runs, undisturbed: Path) -> None:
    cluster = runs.cluster
    job = runs.submit(str(runs.job_file()))
    kinds = ["TERM with grace", "warning", "requeue", "USR1 with grace", "TERM with grace"]
    for count, kind in enumerate(kinds, 1):
        runs.wait_step(runs.steps() + 3 if count > 1 else 3)
        saw = runs.steps()
        if kind == "warning":  # as the time limit's, which Slurm looks for every 30 s only
            cluster.run("scancel", "-b", "-s", "USR1", job)
        elif kind == "requeue":
            cluster.run("scontrol", "requeue", job)
        else:
            option = "SlurmctldParameters=preempt_send_user_signal"
            cluster.reconfigure(option if kind.startswith("USR1") else "")
            preempt(runs, nodes_of(cluster.job(job), cluster)[1])
        cluster.restart(job, count)
        resumed = [
            e["step"] for e in rows(runs.folder / "run", "events.jsonl") if e["event"] == "saved"
        ]
        assert resumed[-1] >= saw, f"{kind}: steps were lost"
    cluster.reconfigure("")
    done = cluster.wait(job, "COMPLETED")
    assert done["Restarts"] == "5"
    starts = starts_of(runs)
    assert [e.get("restarts") for e in starts] == [None, "1", "2", "3", "4", "5"]
    assert all(e.get("recomputed_steps", 0) == 0 for e in starts), "an orderly stop loses no step"
    assert losses(runs.folder / "run") == losses(undisturbed)
    assert adapter_bytes(runs.folder / "run") == adapter_bytes(undisturbed)
    assert "start 6 (restarts: 5)" in runs.log(job)

    report = subprocess.run(
        [sys.executable, "-m", "scalepeft", "report", str(runs.folder / "run")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    assert "goodput" in report and "waiting" in report and "starts 6" in report


def test_power_cuts_and_a_frozen_node(runs: Runs, undisturbed: Path) -> None:
    cluster = runs.cluster
    (runs.folder / "slow").mkdir()
    (runs.folder / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    runs.env["PYTHONPATH"] = str(runs.folder / "slow")
    job = runs.submit(str(runs.job_file()))

    runs.wait_step(8)  # in mid-step, of the node with rank 1
    node = int(nodes_of(cluster.job(job), cluster)[1].removeprefix("node"))
    cluster.crash(node, notice=False)  # Slurm finds out by itself
    cluster.restart(job, 1)
    assert "does not answer" in runs.log(job)
    cluster.start(node)

    runs.wait_step(12)
    first = int(nodes_of(cluster.job(job), cluster)[0].removeprefix("node"))
    checkpoints = runs.folder / "run" / "checkpoints"
    deadline = time.monotonic() + 60
    while not any(checkpoints.glob("*.tmp-*")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    cluster.crash(first)  # in mid-save, of the node with rank 0
    assert any(checkpoints.glob("*.tmp-*")), "the save was not cut"
    cluster.restart(job, 2)
    cluster.start(first)

    runs.wait_step(22)
    first = int(nodes_of(cluster.job(job), cluster)[0].removeprefix("node"))
    frozen = cluster.freeze(first)
    cluster.run("scontrol", "update", f"nodename=node{first}", "state=down", "reason=frozen")
    try:
        cluster.restart(job, 3)
        runs.wait_step(27)
    finally:
        cluster.thaw(frozen)  # its old rank 0 wakes up beside the new run
    cluster.wait(job, "COMPLETED")
    starts = starts_of(runs)
    assert len(starts) == 4
    assert all(0 <= e.get("recomputed_steps", 0) <= 5 for e in starts), "at most a save interval"
    assert losses(runs.folder / "run") == losses(undisturbed)
    assert adapter_bytes(runs.folder / "run") == adapter_bytes(undisturbed)


def test_scancel_is_the_end(runs: Runs) -> None:
    job = runs.submit(str(runs.job_file()), "train.max_steps=5000")
    runs.wait_step(3)
    runs.cluster.run("scancel", job)
    done = runs.cluster.wait(job, "CANCELLED")
    time.sleep(2)
    assert runs.cluster.job(job)["JobState"] == "CANCELLED" and done["Restarts"] == "0"
    assert "requeues itself" not in runs.log(job)


def test_a_rank_that_dies_ends_the_job(runs: Runs) -> None:
    job = runs.submit(str(runs.job_file()), "train.max_steps=5000")
    runs.wait_step(3)
    node = int(nodes_of(runs.cluster.job(job), runs.cluster)[1].removeprefix("node"))
    begin = time.monotonic()
    runs.cluster.on_node(node, "pkill -SEGV -f '^[^ ]*python.* -m scalepeft'")
    done = runs.cluster.wait(job, "FAILED", timeout=60)
    assert time.monotonic() - begin < 60 and done["Restarts"] == "0"
    log = runs.log(job)
    assert "Segmentation fault" in log and "scalepeft/train.py" in log, "no traceback"
    assert "no requeue" in log


def test_a_job_that_gains_nothing_gives_up(runs: Runs) -> None:
    runs.env["SCALEPEFT_MAX_RESTARTS"] = "1"
    job = runs.submit(str(runs.job_file()), "train.max_steps=5000", "model.pretrain_steps=4000")
    deadline = time.monotonic() + 60
    while not (runs.folder / f"{job}.log").exists() or "node node" not in runs.log(job):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    runs.cluster.run("scancel", "-b", "-s", "USR1", job)
    runs.cluster.restart(job, 1)
    runs.cluster.wait(job, "FAILED")
    assert "gives up: the last 2 starts all found the same progress (nothing)" in runs.log(job)


def test_a_restart_on_fewer_nodes_keeps_the_global_batch(runs: Runs, undisturbed: Path) -> None:
    job = runs.submit("--nodes=2-4", str(runs.job_file()))
    runs.wait_step(4)
    for node in ("node3", "node4"):
        preempt(runs, node, seconds=300)
    runs.cluster.restart(job, 1)
    runs.cluster.wait(job, "COMPLETED")
    starts = starts_of(runs)
    assert [e["world_size"] for e in starts] == [4, 2]
    assert losses(runs.folder / "run") == pytest.approx(losses(undisturbed), rel=1e-5)
    samples = [[r["sample_index"] for r in rows(f)] for f in (runs.folder / "run", undisturbed)]
    assert samples[0] == samples[1]
