"""Disks that fill up, run out of inodes or become read-only under a run, and are mended."""

import contextlib
import shutil
import signal
import subprocess
import time
from pathlib import Path

import runs
from disks import small_disk
from processes import ROOT, Job
from tally import Tally

FILLING = str(ROOT / "tests" / "run" / "filling.py")
USR1 = str(int(signal.SIGUSR1))
TROUBLES = ["full", "full, no room", "full and USR1", "inodes", "read-only", "read-only and USR1"]


def _disturbed(kind: str, trouble: str, disk: Path, tally: Tally) -> tuple[Job, str]:
    """A run under way, in trouble; the log of every other is on the same disk."""
    run, at = disk / "run", tally.rng.randint(1, 40)
    if trouble.startswith("full"):
        env = {"PROGRAM": FILLING, "FILL": f"{disk}/others", "FILL_AT": str(at)}
        env |= {"FILL_ROOM": ""} if trouble != "full" and at > runs.SAVE_EVERY else {}
        env |= {"FILL_SIGNAL": USR1} if "USR1" in trouble else {}
        return runs.start(kind, run, **env), f"{trouble} at step {at}"
    job = runs.start(kind, run, PROGRAM=FILLING, FILL_AT="0")
    while runs.steps(run) < at and job.ranks[0].poll() is None:
        time.sleep(0.002)
    if trouble == "inodes":
        with contextlib.suppress(OSError):
            for number in range(10_000):
                (disk / f"others-{number}").touch()
    else:
        remount = ["mount", "-o", "remount,ro", str(disk)]
        for _ in range(400):  # busy while a file is being written
            if not subprocess.run(remount, capture_output=True, check=False).returncode:
                break
            time.sleep(0.003)
    if "USR1" in trouble:
        job.kill(signal.SIGUSR1)
    return job, f"{trouble} at step {at}"


def campaign(work: Path, tally: Tally) -> None:
    """The disk is mended once the run has ended or finished, and the same command goes on."""
    number = 0
    while tally.goes_on():
        kind, number = [*runs.KINDS][number % len(runs.KINDS)], number + 1
        options = f"size={tally.rng.choice(['2m', '3m'])},nr_inodes=200"
        with small_disk(work / "disk", options) as disk:
            trouble = tally.rng.choice(TROUBLES)
            job, what = _disturbed(kind, trouble, disk, tally)
            codes, text = tally.ended(job)
            seen = runs.steps(disk / "run")
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            for file in disk.glob("others*"):
                file.unlink()
            saved = sorted((disk / "run" / "checkpoints").glob("step-??????"))
            # Without an older checkpoint there is nothing to come back to: the user's to mend.
            allowed = {0, 75} if saved else {0, 2, 75}
            tally.count(set(codes) <= allowed, f"{kind}, {what}: exit codes {codes}", text)
            if set(codes) != {0}:
                codes, text = tally.ended(runs.start(kind, disk / "run"))
                if set(codes) != {0}:
                    tally.fault(f"{kind} after {what}: exit codes {codes}\n{text[-3000:]}")
                    continue
                tally.lost = max(tally.lost, seen - runs.starts(disk / "run")[-1])
            runs.compare(tally, kind, disk / "run", work, what)
        shutil.rmtree(work / "disk", ignore_errors=True)
