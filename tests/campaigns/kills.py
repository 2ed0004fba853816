"""Signals at random moments of training, on every engine and way to save."""

import shutil
import signal
import time
from pathlib import Path

import runs
from processes import Job
from tally import Tally

ORDERLY = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "INT": signal.SIGINT}
DISTURBANCES = ["KILL", "KILL", "KILL one", *ORDERLY, "STOP+CONT", "burst"]
LATE = {128 + number for number in ORDERLY.values()}  # a second signal leaves at once


def _wait_for_moment(job: Job, run: Path, tally: Tally) -> None:
    """Some steps further, then a few ms: amid a step, a save, a commit; or at the start."""
    wanted = runs.steps(run) + tally.rng.randint(1, 9)
    early = time.monotonic() + tally.rng.random() * 3 if tally.rng.random() < 0.1 else None
    while runs.steps(run) < wanted and all(p.poll() is None for p in job.ranks):
        if early and time.monotonic() > early:
            return
        time.sleep(0.002)
    time.sleep(tally.rng.random() * 0.06)


def _disturb(job: Job, kind: str, tally: Tally) -> None:
    if kind == "KILL one":
        tally.rng.choice(job.ranks).send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(p.poll() is None for p in job.ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        job.kill()  # as launch/local.sh and srun do with the others
    elif kind == "STOP+CONT":
        job.kill(signal.SIGSTOP)
        time.sleep(tally.rng.random() * 0.5)
        job.kill(signal.SIGCONT)
    elif kind == "burst":
        for number in tally.rng.choices([*ORDERLY.values()], k=3):
            job.kill(number)
            time.sleep(tally.rng.random() * 0.4)
        if tally.rng.random() < 0.5:
            job.kill()
    else:
        job.kill(ORDERLY.get(kind, signal.SIGKILL))


def campaign(work: Path, tally: Tally) -> None:
    """Each run is disturbed until it is finished, and compared then."""
    number = 0
    while tally.goes_on():
        kind, number = [*runs.KINDS][number % len(runs.KINDS)], number + 1
        run, history, before = work / f"run-{number}", list[str](), 0
        while True:
            known = len(runs.starts(run))
            job = runs.start(kind, run)
            what = tally.rng.choice(DISTURBANCES) if tally.goes_on() else ""
            if what:
                job.wait_for_handlers()
                _wait_for_moment(job, run, tally)
                seen = runs.steps(run)
                _disturb(job, what, tally)
                history.append(what)
            codes, text = tally.ended(job)
            allowed = {0, 75} | (LATE if what == "burst" else set())
            if "KILL" in what or what == "burst":  # gloo ends a survivor with 1
                allowed |= {-signal.SIGKILL, 1}
            ok = set(codes) <= allowed
            if what:
                tally.count(ok, f"{kind}, {what}: exit codes {codes}", text)
            elif not ok:
                tally.fault(f"{kind} after {history}: exit codes {codes}\n{text[-3000:]}")
                break
            if new := runs.starts(run)[known:]:
                tally.lost, before = max(tally.lost, before - new[0]), 0
            before = max(before, seen) if what else 0
            if set(codes) == {0}:
                runs.compare(tally, kind, run, work, f"after {history}")
                break
        shutil.rmtree(run, ignore_errors=True)
