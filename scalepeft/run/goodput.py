"""Where the wall time of a run went: useful steps, and the losses by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.core.files import read_lines
from scalepeft.core.slurm import slurm_job
from scalepeft.core.text import duration

PARTS = ("startup", "load", "save", "held_out", "recomputed", "waiting")
NAMES = {"startup": "start-up", "held_out": "held-out", "recomputed": "recomputed steps"}


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run over all its starts; ``wall`` is the sum of all others."""

    wall: float  # from the first launch to the last sign of life, less that after a planned end
    steps: float  # training steps that count
    startup: float  # from a process's begin to where its ranks have met
    load: float  # data, base model, checkpoint
    save: float  # gathering and committing checkpoints; training waits meanwhile
    held_out: float  # held-out losses
    recomputed: float  # steps that came after the newest checkpoint of a start that died
    waiting: float  # from a sign of life to the next launch: queue, job script, failed starts

    @property
    def other(self) -> float:
        """Between steps (logs, agreements, writing the adapter); a dying start's last moments."""
        return max(0.0, self.wall - self.steps - sum(getattr(self, key) for key in PARTS))

    @property
    def share(self) -> float:
        """Goodput: useful step time over wall time, in [0, 1]."""
        return min(1.0, self.steps / self.wall)

    def losses(self) -> str:
        """The losses in one line, the largest first."""
        found = {NAMES.get(key, key): getattr(self, key) for key in (*PARTS, "other")}
        ordered = sorted(found.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {duration(seconds)}" for name, seconds in ordered)


def starts_of(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The starts of a run, and its last event; empty without one."""
    starts, last = [], {}
    for last in read_lines(folder / "events.jsonl", "event", "time"):
        starts += [last] if last["event"] == "start" else []
    return starts, last


def lost_since(run_dir: Path, step: int, launched: float) -> dict[str, float]:
    """Seconds ``waited`` before a launch (``idle``: its end was planned), and steps to do again."""
    starts, last = starts_of(run_dir)
    if not last:
        return {}
    alive, steps, seconds = last["time"], 0, 0.0
    keys = ("step", "seconds", "time")
    for row in read_lines(run_dir / "metrics.jsonl", *keys, newest_first=True):
        alive = max(alive, row["time"])
        if row["step"] <= step:
            break  # so are those before it
        steps, seconds = steps + 1, seconds + row["seconds"]
    # A run that was finished, stopped as planned, or whose job was over, waited for its user.
    job = starts[-1].get("job") if starts else None
    ended = last["event"] == "finished" or last.get("planned") or (job and job != slurm_job())
    gap = {"idle" if ended else "waited": max(0.0, launched - alive)}
    return {**gap, "recomputed_steps": steps, "recomputed": seconds}


def goodput(run_dir: Path) -> Goodput | None:
    """Adds up what the run's records say; None where the run is older than these figures."""
    files = [run_dir / f"{name}.jsonl" for name in ("events", "metrics", "validation")]
    starts, _ = starts_of(run_dir)
    if not starts or any("launched" not in e for e in starts):
        return None
    first = starts[0]["launched"]  # the first that can be read: nothing from before it counts
    last, steps, save = first, 0.0, 0.0
    for row in read_lines(files[1], "seconds", "time"):
        if row["time"] >= first:
            last, steps = max(last, row["time"]), steps + row["seconds"]
    for event in read_lines(files[0], "event", "time"):
        if event["time"] >= first:
            last = max(last, event["time"])
            save += event.get("seconds", 0.0) if event["event"] == "saved" else 0.0
    if not steps:  # none yet, or damaged: a start that is later than all that followed it
        return None

    def total(key: str, since: int = 1) -> float:
        return float(sum(e.get(key, 0.0) for e in starts[since:]))

    return Goodput(
        wall=last - first - total("idle"),
        steps=steps,
        startup=total("startup", 0),
        load=total("load", 0),
        save=save,
        held_out=sum(row["seconds"] for row in read_lines(files[2], "seconds")),
        recomputed=total("recomputed"),
        waiting=total("waited"),
    )
