"""One job on a real Slurm: power cuts, frozen nodes, requeues, preemptions, warnings, TERM."""

import shutil
import subprocess
from pathlib import Path

import runs
from processes import adapter_bytes, losses, train
from slurm_cluster import ENDS, Cluster, missing
from tally import Tally
from test_slurm import SETTINGS, Runs, nodes_of, preempt

DISTURBANCES = ["power cut", "freeze", "requeue", "preempt", "warning", "preempt"]
STEPS = ["train.max_steps=120"]


def _disturb(jobs: Runs, job: str, kind: str, tally: Tally) -> None:
    cluster = jobs.cluster
    nodes = nodes_of(cluster.job(job), cluster)
    node = tally.rng.choice(nodes)
    number = int(node.removeprefix("node"))
    if kind == "power cut":
        cluster.crash(number)
        cluster.start(number)
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    elif kind == "freeze":
        pids = cluster.freeze(number)
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=frozen")
        cluster.thaw(pids)
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    elif kind == "requeue":
        cluster.run("scontrol", "requeue", job)
    elif kind == "preempt":
        preempt(jobs, node)
    else:
        cluster.run("scancel", "-b", "-s", "USR1", job)


def campaign(work: Path, tally: Tally) -> None:
    """Each job is disturbed until the time is over or it has finished, and compared then."""
    if lacking := missing():
        raise SystemExit(f"campaign: no Slurm cluster: {lacking}")
    train(2, work / "reference", *SETTINGS, *STEPS, timeout=900)
    cluster, number = Cluster(), 0
    try:
        while tally.goes_on():
            folder, number = work / f"job-{number}", number + 1
            folder.mkdir()
            _one_job(Runs(cluster, folder), work, tally)
            shutil.rmtree(folder)
    finally:
        cluster.stop()


def _one_job(jobs: Runs, work: Path, tally: Tally) -> None:
    jobs.env["SCALEPEFT_MAX_RESTARTS"] = "50"
    job, run = jobs.submit(str(jobs.job_file()), *STEPS), jobs.folder / "run"
    count, history = 0, list[str]()
    while tally.goes_on() and (begun := runs.steps(run)) < 100:
        jobs.wait_step(begun + tally.rng.randint(1, 12))
        if (state := jobs.cluster.job(job)["JobState"]) != "RUNNING":
            assert state not in ENDS, jobs.log(job)
            continue
        kind, seen = tally.rng.choice(DISTURBANCES), runs.steps(run)
        _disturb(jobs, job, kind, tally)
        history.append(kind)
        count += 1
        try:
            jobs.cluster.restart(job, count, timeout=180)
        except AssertionError as error:
            tally.count(False, f"{kind} after {history}", str(error))
            return
        known = len(runs.starts(run))
        tally.count(True, kind)
        jobs.wait_step(1)
        while len(runs.starts(run)) <= known and jobs.cluster.job(job)["JobState"] == "RUNNING":
            subprocess.run(["sleep", "0.1"], check=True)
        tally.lost = max(tally.lost, seen - (runs.starts(run) or [0])[-1])
    jobs.cluster.wait(job, "COMPLETED", timeout=600)
    for seen_of in (adapter_bytes, losses):
        tally.compare(seen_of(run) == seen_of(work / "reference"), f"{job}: {history}")
