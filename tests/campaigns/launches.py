"""Many launches of one run at once: one trains, the others leave with 2 and one line."""

import shutil
import time
from pathlib import Path

import runs
from tally import Tally

MANY = (20, 100)


def campaign(work: Path, tally: Tally) -> None:
    """Rounds of launches within a fraction of a second; on one rank each."""
    number, kind = 0, "single"
    while tally.goes_on():
        run, number = work / f"run-{number}", number + 1
        jobs, many = [], min(tally.rng.choice(MANY), tally.limit - tally.tried)
        apart = tally.rng.choice([0.0, 0.02, 0.1])
        for _ in range(many):
            jobs.append(runs.start(kind, run))
            time.sleep(tally.rng.random() * apart)
        for (code,), text in [tally.ended(job) for job in jobs]:
            # One that comes when all is done finds it done.
            tally.count(code in (0, 2), f"{many} launches: exit code {code}", text)
        if len(runs.starts(run)) != 1:
            tally.survived -= 1
            tally.fault(f"{many} launches: began at steps {runs.starts(run)}")
        runs.compare(tally, kind, run, work, f"{many} launches")
        shutil.rmtree(run)
