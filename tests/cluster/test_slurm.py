"""slurm/train.sh, launch/submit and launch/status on a real Slurm of four nodes on this machine."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import FULL, ROOT, TINY, Job, adapter_bytes, call, losses, rows, train
from slurm_cluster import ENDS, PATH, Cluster, missing
from test_docs import COMMANDS

from scalepeft.cluster import init
from scalepeft.config import files as config_files
from scalepeft.models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.multiprocess]


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
    time.sleep(0.06)
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
            # What an old start says last may come after Slurm has begun the next one.
            said = "no requeue" in newest or "finished" in newest
            over = said and self.cluster.job(self.jobs[-1])["JobState"] in ENDS
            over = over or time.monotonic() > deadline
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


def test_two_nodes_of_two_ranks_then_zero_3_on_two(runs: Runs) -> None:
    steps = ["train.max_steps=8", "engine=hsdp"]
    job = runs.submit(str(runs.job_file(ranks=2)), *steps, "train.stop_at=4")
    done = runs.cluster.wait(job, "FAILED")  # with 75, and no requeue: a planned stop
    (start,) = starts_of(runs)
    held = [rank["bytes_held"] for rank in start["per_rank"]]
    assert held[:2] == held[2:], "a copy of the base on each node"
    assert start["host"] == nodes_of(done, runs.cluster)[0] == "node1"
    assert (start["world_size"], start["engine"], start["job"]) == (4, "fsdp2", job)
    log = runs.log(job)
    assert "start 1 (restarts: 0)" in log and "4 ranks on 2 nodes: node[1-2]" in log
    assert "node node2: no GPU that nvidia-smi sees; python 3" in log
    assert "file locks" not in log and "open to whoever" not in log, "the ranks met at a port"
    steps[1:] = ["engine=zero", "engine.whole_below=0", "--resume-with-changes"]
    job = runs.submit(str(runs.job_file(ranks=1)), *steps)
    runs.cluster.wait(job, "COMPLETED")
    _, second = starts_of(runs)
    assert (second["step"], second["world_size"], second["engine"]) == (4, 2, "zero")
    assert sum(held) == 2 * sum(rank["bytes_held"] for rank in second["per_rank"])
    assert len(losses(runs.folder / "run")) == 8


def test_preemptions_of_every_kind_change_nothing(runs: Runs, undisturbed: Path) -> None:
    cluster = runs.cluster
    job = runs.submit(str(runs.job_file()))
    kinds = [
        "TERM with grace",
        "warning",
        "requeue",
        "USR1 with grace",
        *["TERM with grace"] * FULL,
    ]
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
    done = cluster.wait(job, "COMPLETED")
    cluster.reconfigure("")  # not while the job starts: a slurmd that reads it again starts nothing
    assert done["Restarts"] == str(len(kinds))
    starts = starts_of(runs)
    assert [e["restarts"] for e in starts] == list(range(len(kinds) + 1))
    assert all(e.get("recomputed_steps", 0) == 0 for e in starts), "an orderly stop loses no step"
    assert losses(runs.folder / "run") == losses(undisturbed)
    assert adapter_bytes(runs.folder / "run") == adapter_bytes(undisturbed)
    assert f"start {len(kinds) + 1} (restarts: {len(kinds)})" in runs.log(job)

    report = call("report", str(runs.folder / "run")).stdout
    assert "goodput" in report and "waiting" in report and f"starts {len(kinds) + 1}" in report


@pytest.mark.full
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


def test_a_slurmd_that_starts_nothing_is_asked_again(runs: Runs) -> None:
    cluster = runs.cluster
    cluster.on_node(2, "pkill -KILL slurmd")
    job = runs.submit("-w", "node[1-2]", str(runs.job_file()), "train.max_steps=2")
    log, deadline = runs.folder / f"{job}.log", time.monotonic() + 60
    while not log.exists() or "asks again" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.on_node(2, f"SLURM_CONF={cluster.folder}/slurm.conf PATH={PATH} slurmd -N node2")
    cluster.wait(job, "COMPLETED")


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
    # So many rows take seconds to make: the signal comes before the first step.
    job = runs.submit(str(runs.job_file()), "train.max_steps=5000", "data.train_size=30000")
    deadline = time.monotonic() + 60
    while not (runs.folder / f"{job}.log").exists() or "node node" not in runs.log(job):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    runs.cluster.run("scancel", "-b", "-s", "USR1", job)
    runs.cluster.restart(job, 1)
    runs.cluster.wait(job, "FAILED")
    assert "gives up: the last 2 starts all found the same progress (nothing)" in runs.log(job)


@pytest.mark.full
def test_a_node_that_lost_its_staged_base_brings_it_again(runs: Runs, undisturbed: Path) -> None:
    cluster, disk = runs.cluster, runs.folder / "nvme"
    disk.mkdir()
    for node in range(1, cluster.nodes + 1):
        cluster.on_node(node, f"mount -t tmpfs none {disk}")  # a disk of its own
    try:
        runs.env["SCALEPEFT_STAGE"] = str(disk)
        job = runs.submit("-w", "node[1-2]", str(runs.job_file()))
        runs.wait_step(5)
        cluster.on_node(2, f"rm -r {disk}/*")
        cluster.run("scontrol", "requeue", job)
        cluster.restart(job, 1)
        cluster.wait(job, "COMPLETED")
        first, second = runs.log(job).split(": start 2 ")
        for node in ("node1", "node2"):
            assert re.search(f"{disk}/[0-9a-f]{{24}}: .* of the base staged on {node} in ", first)
        assert "of the base read there on node1, from an earlier start" in second, second
        assert re.search("of the base staged on node2 in ", second), second
    finally:
        for node in range(1, cluster.nodes + 1):
            cluster.on_node(node, f"umount --lazy {disk}")
    assert losses(runs.folder / "run") == losses(undisturbed)


@pytest.mark.full
def test_a_restart_on_fewer_nodes_keeps_the_global_batch(runs: Runs, undisturbed: Path) -> None:
    cluster = runs.cluster
    job = runs.submit("--nodes=4", str(runs.job_file()))
    runs.wait_step(4)
    preempt(runs, "node3", seconds=300)
    preempt(runs, "node4", seconds=300)
    cluster.wait(job, "PENDING")
    cluster.run("scontrol", "update", f"jobid={job}", "NumNodes=2", "NumTasks=2")
    cluster.restart(job, 1)
    cluster.wait(job, "COMPLETED")
    assert [e["world_size"] for e in starts_of(runs)] == [4, 2]
    assert losses(runs.folder / "run") == pytest.approx(losses(undisturbed), rel=1e-5)
    samples = [[r["sample_index"] for r in rows(f)] for f in (runs.folder / "run", undisturbed)]
    assert samples[0] == samples[1]


def test_a_folder_that_is_full_or_not_on_all_nodes_ends_the_job_before_training(
    runs: Runs,
) -> None:
    cluster, small = runs.cluster, runs.cluster.small_disk
    pair = ("-w", "node[1-2]")
    with contextlib.suppress(OSError):
        (small / "filler").write_bytes(bytes(1 << 20))
    full = runs.submit(*pair, str(runs.job_file()), f"run_dir={small}/run")
    cluster.wait(full, "FAILED")
    assert f"run_dir={small}/run: cannot be written on node1: No space left" in runs.log(full)
    runs.env["SCALEPEFT_JOBS"] = str(small / "jobs")
    state = runs.submit(*pair, str(runs.job_file()))
    cluster.wait(state, "FAILED")
    assert f"error: cannot write {small}/jobs/{state} on node1: full, read-only" in runs.log(state)

    private, locked = runs.folder / "private", runs.folder / "locked"
    private.mkdir()
    locked.mkdir()
    cluster.on_node(2, f"mount -t tmpfs none {private}")
    cluster.on_node(2, f"mount --bind {locked} {locked}; mount -o remount,bind,ro {locked}")
    try:
        runs.env["SCALEPEFT_JOBS"] = str(private)
        state = runs.submit(*pair, str(runs.job_file()))
        cluster.wait(state, "FAILED")
        assert f"error: node node2: {private}/{state} is not there" in runs.log(state)
        assert "nothing was started" in runs.log(state)
        del runs.env["SCALEPEFT_JOBS"]
        for folder, text in (
            (private, "is another folder on node2 than on rank 0's node"),
            (locked, "cannot be written on node2: Read-only file system"),
        ):
            job = runs.submit(*pair, str(runs.job_file()), f"run_dir={folder}")
            cluster.wait(job, "FAILED")
            errors = [x for x in runs.log(job).splitlines() if x.startswith("scalepeft: error")]
            assert len(errors) == 1 and f"run_dir={folder}: {text}" in errors[0], runs.log(job)
            assert not (folder / "metrics.jsonl").exists()
    finally:
        cluster.on_node(2, f"umount {private}; umount {locked}")


def submit(runs: Runs, *words: str, expect: int = 0, plan: bool = False) -> str:
    """Calls launch/submit; returns what it printed."""
    words = (*words, *(() if plan else ("--no-plan",)))
    done = subprocess.run(
        [str(ROOT / "launch/submit"), *words], cwd=runs.folder, capture_output=True, text=True,
        env={**runs.cluster.env, **runs.env}, check=False,
    )  # fmt: skip
    found = re.findall(r"^\w+: job (\d+)", done.stdout, re.M)
    runs.jobs += found
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.full
def test_submit_queues_the_stages_as_a_chain(runs: Runs, undisturbed: Path) -> None:
    cluster, file = runs.cluster, str(runs.job_file("data.test_size=20"))
    words = ("evaluate.max_new_tokens=4", "pipeline.evaluate=adapter,merged")
    command = (file, *words, "--pipeline", "--sbatch=--time=30", "--sbatch=gpus-per-node=1",
               "--cpu-sbatch=mem=500M")  # fmt: skip
    assert "plan: " in submit(runs, *command, plan=True)
    prepare, job, merge, evaluation, report = runs.jobs
    folder = runs.folder / "run" / "submissions" / "001"
    assert {p.name for p in folder.iterdir()} >= {"code", "configs", "train.sh", "evaluate.sh"}
    assert cluster.job(job)["TimeLimit"] == "00:30:00", "over the job file's"
    for one, nodes, gpus in ((prepare, "1", 0), (job, "2", 1), (merge, "1", 0), (report, "1", 0)):
        described = cluster.job(one)
        assert described["NumNodes"].partition("-")[0] == nodes
        assert ("gpu" in described.get("TresPerNode", "")) == bool(gpus)
    runs.wait_step(3, timeout=240)  # the preparation comes first
    env = {**cluster.env, **runs.env}
    text = call("status", str(runs.folder / "run"), **env).stdout
    assert "RUNNING, last sign of life" in text and f"Slurm job {job} on node" in text
    assert "of 50 (" in text and "restarts  0" in text and "ETA" in text
    assert "stages    prepare done, train begun" in text
    assert cluster.job(evaluation)["Reason"] == "Dependency"
    refused = submit(runs, *command, expect=2)
    assert re.search(r"active Slurm job of the run: \d+ \((RUNNING|PENDING)\)", refused), refused
    cluster.run("scancel", "-b", "-s", "USR1", job)  # the others wait through the requeue
    cluster.restart(job, 1)
    cluster.wait(report, "COMPLETED")
    assert adapter_bytes(runs.folder / "run") == adapter_bytes(undisturbed)
    for sub in ("eval", "eval-merged"):
        assert json.loads((runs.folder / f"run/{sub}/toy/scores.json").read_text())["count"] == 20
    assert (runs.folder / "run/report.html").is_file()
    again = submit(runs, file, "train.lr=1", expect=2)
    assert "holds a run with another config" in again and "train.lr: 0.003 there, 1" in again
    assert "sbatch refuses" in submit(runs, file, "--sbatch", "partition=nope", expect=2)


def test_no_text_of_a_user_runs_in_a_job(runs: Runs) -> None:
    """A name with a newline is refused, and any other reaches Slurm as it is."""
    file, ran = str(runs.job_file()), runs.folder / "ran"
    for setting in (
        f'run_dir={runs.folder}/a"\nid > {ran}\n#',
        "model.path=a\x1bb",
        "data.cache=\x7f",
    ):
        refused = submit(runs, file, setting, expect=2)
        assert "has control characters" in refused and setting.partition("=")[0] in refused
        assert len(refused.splitlines()) == 1
    assert "has control characters" in submit(runs, file, "--sbatch=job-name=a\nb", expect=2)
    name = f"""a "b' $(touch {ran}) `id` \\ %j; #"""
    run_dir = runs.folder / """it's "$(touch ran)" --hold"""
    submit(runs, file, f"run_dir={run_dir}", f"--sbatch=job-name={name}", "--sbatch=hold")
    (job,) = runs.jobs
    assert runs.cluster.run("squeue", "-h", "-j", job, "-o", "%j").rstrip("\n") == name
    shown = runs.cluster.run("scontrol", "show", "job", job)
    assert f"JobName={name}\n" in shown and "Reason=JobHeldUser" in shown
    assert f"StdOut={run_dir}/submissions/001/" in shown
    script = (run_dir / "submissions/001/train.sh").read_text()
    assert script.count(runs.folder.name) and name not in script
    assert not ran.exists() and not (runs.folder / "run").exists()


@pytest.mark.full
def test_a_failed_training_cancels_its_evaluation(runs: Runs) -> None:
    """And a submission beside a queued job of the run, or with another config, is refused."""
    model = runs.folder / "model"
    shutil.copytree(tiny.make(0), model)
    command = (str(runs.job_file()), f"model.path={model}", "--then", "evaluate", "--sbatch=hold")
    submit(runs, *command)
    assert f"job of the run: {runs.jobs[0]} (PENDING)" in submit(runs, *command, expect=2)
    (model / "config.json").write_text("{")
    runs.cluster.run("scontrol", "release", runs.jobs[0])
    runs.cluster.wait(runs.jobs[0], "FAILED")
    runs.cluster.run("scontrol", "release", runs.jobs[1], check=False)
    runs.cluster.wait(runs.jobs[1], "CANCELLED")


def test_a_sweep_is_an_array_with_a_throttle(runs: Runs) -> None:
    file = runs.job_file("train.max_steps=3", "engine=single")
    one = ("--sbatch=--nodes=1", "--sweep", "train.lr=1e-3,2e-3", "--throttle", "1")
    dry = submit(runs, str(file), *one, "--dry-run")
    assert "--array=0-1%1" in dry and "lr: 0.002" in dry and not runs.jobs
    assert not (runs.folder / "run").exists()
    submit(runs, str(file), *one)
    (job,) = runs.jobs
    most, deadline = 0, time.monotonic() + 90
    while "2e-3" not in str(list((runs.folder / "run").glob("*/adapter/scalepeft.json"))):
        running = runs.cluster.run("squeue", "-h", "-r", "-j", job, "-t", "R", "-o", "%A")
        most = max(most, len(running.split()))
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert most == 1, "the throttle"
    lrs = [
        yaml.safe_load(p.read_text())["train"]["lr"]
        for p in (runs.folder / "run").glob("*/config.yaml")
    ]
    assert sorted(lrs) == [1e-3, 2e-3]


@pytest.mark.full
def test_a_preempted_array_task_comes_back_alone(runs: Runs) -> None:
    """SLURM_JOB_ID of the last task is the whole array's: its siblings must not come along."""
    cluster = runs.cluster
    file = runs.job_file("engine=single")
    file.write_text(file.read_text().replace("/run ", "/run/$SLURM_ARRAY_TASK_ID "))
    array = runs.submit("--array=0-1", "--nodes=1", str(file), "train.max_steps=3000")

    def steps(task: int) -> int:
        log = runs.folder / f"run/{task}/metrics.jsonl"
        return len(rows(log.parent)) if log.exists() else 0

    deadline = time.monotonic() + 60
    while min(steps(0), steps(1)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.run("scancel", f"{array}_0")
    cluster.wait(f"{array}_0", "CANCELLED")
    cluster.run("scancel", "-b", "-s", "USR1", f"{array}_1")
    cluster.restart(f"{array}_1", 1)
    assert cluster.job(f"{array}_0")["JobState"] == "CANCELLED", "scancel is the end"
    event = rows(runs.folder / "run/1", "events.jsonl")[0]
    assert event["job"] == f"{array}_1"


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param((4, 8), marks=pytest.mark.full)])
def test_one_job_file_on_two_sites(
    tmp_path: Path, cluster: Cluster, sizes: tuple[int, int]
) -> None:
    """The job of the 70B, of 8 GPUs a node, by --site alone."""
    own = None if max(sizes) <= 2 else Cluster(nodes=2, cpus=16, gpus=max(sizes))
    for gpus, request in zip(sizes, ("gpus-per-node", "gres"), strict=True):
        runs = Runs(own or cluster, tmp_path / request)
        runs.folder.mkdir()
        site = {"gpus_per_node": gpus, "request": request, "cpus_per_gpu": 1}
        site |= {"scratch": str(runs.folder / "scratch"), "environment": {"SEEN": "here"}}
        (runs.folder / "site.yaml").write_text(yaml.safe_dump(site))
        words = [str(ROOT / "slurm/hoft_llama70b.sh"), *TINY, "engine=fsdp2", "engine.device=cpu"]
        words += [
            "train.global_batch=16",
            "train.micro_batch=1",
            "train.max_steps=2",
            "run_dir=run",
        ]
        try:
            submit(runs, *words, "--site", "site.yaml", "--sbatch", "time=10")
            (job,) = runs.jobs
            described = runs.cluster.job(job)
            assert described["NumNodes"] == "2" and described["TimeLimit"] == "00:10:00"
            assert described["TresPerNode"].endswith(f"gpu:{gpus}")
            runs.cluster.wait(job, "COMPLETED", timeout=300)
        finally:
            runs.cluster.run("scancel", "--state=RUNNING", "--me", check=False)
        start = rows(runs.folder / "run", "events.jsonl")[0]
        assert start["world_size"] == 2 * gpus
        script = (runs.folder / "run/submissions/001/train.sh").read_text()
        assert "#SBATCH" not in script and 'SEEN="${SEEN:-here}"' in script
    if own:
        own.stop()


@pytest.mark.full
def test_the_70b_job_as_it_stands(tmp_path: Path, cluster: Cluster) -> None:
    big = Cluster(nodes=2, cpus=64, gpus=8)
    try:
        runs = Runs(big, tmp_path)
        row = {"input": "", "output": "true", "answer": "true"}
        rows_made = [{**row, "instruction": f"Is it {i}?"} for i in range(200)]
        (tmp_path / "data").mkdir()
        for name in ("data/commonsense_170k.json", "TRAIN", "TEST"):
            (tmp_path / name).write_text(json.dumps(rows_made))
        shutil.copytree(tiny.make(0), tmp_path / "MODEL")
        for name in ("slurm", "launch"):
            (tmp_path / name).symlink_to(ROOT / name)
        file = str(ROOT / "slurm/hoft_llama70b.sh")
        environment = {**big.env, **runs.env}
        test = ["sbatch", "--test-only", file]
        done = subprocess.run(
            test, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "128 processors on nodes node[1-2]" in done.stderr
        for recipe in sorted((ROOT / "configs/recipes").glob("*.yaml")):
            init.run(str(tmp_path / "recipes"), recipe.stem, None, False)
            test[-1] = str(tmp_path / f"recipes/{recipe.stem}.sh")
            subprocess.run(test, env=environment, cwd=tmp_path, check=True)
        test[-1] = str(ROOT / "slurm/zero3_llama70b.sh")
        subprocess.run(test, env=environment, cwd=tmp_path, check=True)
        job = subprocess.run(
            ["sbatch", "--parsable", file, "model=tiny", "engine.device=cpu", "train.max_steps=2"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        big.wait(job, "COMPLETED", timeout=200)
        start = rows(tmp_path / "runs/hoft_llama70b", "events.jsonl")[0]
        assert start["event"] == "start" and start["world_size"] == 16
        held = [rank["bytes_held"] for rank in start["per_rank"]]
        assert held[:8] == held[8:] and held[0] < sum(held[:8]) / 6, "HSDP: a copy on each node"
        log = (tmp_path / f"hoft_llama70b-{job}.log").read_text()
        assert "train.max_steps=2 replaces train.epochs" in log
        shutil.rmtree(tmp_path / "runs")
        slurm = [w for c in COMMANDS if (w := shlex.split(c))[0] in ("sbatch", "launch/submit")]
        assert len(slurm) == 6, "those of README and docs"
        for words in slurm:
            words.insert(1, "--test-only" if words[0] == "sbatch" else "--dry-run")
            done = subprocess.run(
                words, env=environment, cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    finally:
        big.stop()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("hoft_llama70b", ("fsdp2", "hoft", "meta-llama/Llama-3.1-70B", "runs/hoft_llama70b")),
        ("zero3_llama70b", ("zero", "hoft", "meta-llama/Llama-3.1-70B", "runs/zero3_llama70b")),
        ("llama8b", ("ddp", "shoft", "meta-llama/Llama-3.1-8B", "runs/math_shoft_llama-3.1-8b")),
    ],
)
def test_every_job_file_builds_its_config(file: str, expected: tuple[str, ...]) -> None:
    env = {**os.environ, "SCALEPEFT_DESCRIBE": "1", "SCALEPEFT_ROOT": str(ROOT)}
    env |= {"CONFIG": "math_shoft_llama-3.1-8b"}  # which the files of 70B do not take
    words = subprocess.run(
        ["bash", str(ROOT / f"slurm/{file}.sh")],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    command, path, *settings = words.stdout.split("\0")[1:-1]
    built, _ = config_files.load(path, settings)
    assert command == "train" and built.model.quant == "nf4"
    found = (built.engine.name, built.adapter.name, built.model.path, built.run_dir)
    assert found == expected


def test_shell_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "no shellcheck (Debian: shellcheck)"
        pytest.skip("no shellcheck")
    files = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("launch/*.sh")]
    files += [ROOT / "launch/submit", ROOT / "launch/status", ROOT / ".ci/run"]
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_local_requeue_comes_back_like_a_job(tmp_path: Path) -> None:
    words = [str(ROOT / "launch/local.sh"), "--requeue", "1", "train", *SETTINGS, "engine=single"]
    job = subprocess.Popen(
        [*words, f"run_dir={tmp_path}/run", "train.max_steps=400"],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    events = tmp_path / "run/events.jsonl"

    def wait(starts: int) -> None:
        deadline = time.monotonic() + 60
        while not events.exists() or events.read_text().count('"start"') < starts:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)

    wait(1)
    job.send_signal(signal.SIGUSR1)  # a preemption
    wait(2)
    job.send_signal(signal.SIGTERM)  # the user
    text = job.communicate(timeout=60)[0]
    assert job.returncode == 75, text
    assert text.count("comes back") == 1 and "resuming" in text


@pytest.mark.full
def test_a_comparison_runs_as_arrays_and_ends_in_a_table(runs: Runs) -> None:
    """A cell that its job is warned in saves, comes back with the job and goes on."""
    settings = ("data.valid_size=20", "train.max_steps=30", "model.quant=none")
    file = str(runs.job_file(*settings, ranks=1))
    words = ("--compare=methods=lora", "--compare=lrs=1e-3,3e-3", "--compare=seeds=1")
    submit(runs, file, *words, "--compare=budget=steps", "--throttle=1", "--cpu-sbatch=mem=500M")
    sweep, seeds, table = runs.jobs
    assert runs.cluster.job(table)["Reason"] == "Dependency"
    warned = runs.folder / "run/cells/lora/lr=0.001,seed=0"
    deadline = time.monotonic() + 120
    while not (warned / "metrics.jsonl").is_file() or len(rows(warned)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    runs.cluster.run("scancel", "-b", "-s", "USR1", f"{sweep}_0")
    runs.cluster.restart(f"{sweep}_0", 1)
    runs.cluster.wait(table, "COMPLETED", timeout=300)
    begun = [e["step"] for e in rows(warned, "events.jsonl") if e["event"] == "start"]
    assert len(begun) == 2 and begun[1] >= 3 and len(losses(warned)) == 30
    found = json.loads((runs.folder / "run" / "compare.json").read_text())
    held_out = {c["lr"]: c["loss"] for c in found["sweep"]}
    (cell,) = found["cells"]
    assert cell["lr"] == min(held_out, key=held_out.__getitem__) and cell["ranks"] == 2
    start = rows(runs.folder / f"run/cells/lora/lr={cell['lr']:g},seed=1", "events.jsonl")[0]
    assert start["job"] == f"{seeds}_0" and len({r["host"] for r in start["per_rank"]}) == 2


@pytest.mark.full
def test_a_script_with_trainer_is_preempted_and_comes_back(runs: Runs, tmp_path: Path) -> None:
    """With PreemptionCallback, a rank on each of two nodes; ends as if nothing had happened."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    program = str(ROOT / "tests/integrations/trainer_runs.py")
    run = {"folder": str(tiny.make(0)), "per_device_train_batch_size": 1, "max_steps": 12}
    alone = Job(2, [json.dumps([{**run, "out": str(whole)}])], {}, (program,))
    assert alone.wait()[0] == [0, 0]
    config = str(ROOT / "configs/accelerate/ddp.yaml")
    words = ["--config_file", config, "--mixed_precision", "no", program]
    words.append(json.dumps([{**run, "out": str(out), "slow": 0.5}]))
    file = tmp_path / "job.sh"
    text = JOB.format(folder=tmp_path, ranks=1, settings=shlex.join(words))
    file.write_text(text.replace("SETTINGS=", "SCALEPEFT_COMMAND=accelerate\nSETTINGS="))
    job = runs.submit(str(file))
    for count, begun in enumerate((3, 7), 1):
        deadline = time.monotonic() + 120
        while not (out / f"rank-1-step-{begun}").exists():
            assert time.monotonic() < deadline, runs.log(job)
            time.sleep(0.05)
        if count == 1:
            runs.cluster.run("scancel", "-b", "-s", "USR1", job)  # as the time limit's warning
        else:
            preempt(runs, "node2")
        runs.cluster.restart(job, count)
    runs.cluster.wait(job, "COMPLETED")
    assert runs.log(job).count("requeues itself") == 2
    found = [json.loads((folder / "losses.json").read_text()) for folder in (whole, out)]
    assert found[0] == found[1] and len(found[0]) == 12
