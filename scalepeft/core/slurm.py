"""What Slurm says: the job of this process, and answers of its commands."""

import os
import re
import shutil
import subprocess
from contextlib import suppress


def slurm_job() -> str | None:
    """The Slurm job of this process as ``scontrol`` calls it: ``12``, ``12_3`` in an array."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def slurm_start() -> tuple[str | None, int]:
    """The Slurm job, if any, and how often it was restarted."""
    return slurm_job(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "CONFIGURING")


def state_word(task: dict[str, str]) -> str:
    """Slurm's state of a job with its reason."""
    reason = task.get("Reason", "None")
    return task["JobState"] + (f" ({reason})" if reason not in ("None", "") else "")


def ask_all(job: str) -> list[dict[str, str]]:
    """JobState, Reason, Restarts, NodeList of each of a job's tasks; none if no Slurm knows it."""
    text = output_of("scontrol", "-o", "show", "job", job)
    if tasks := [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines()]:
        return [task for task in tasks if "JobState" in task]
    # scontrol forgets a job minutes after its end
    text = output_of("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList")
    rows = [line.partition("|") for line in reversed(text.strip().splitlines())]
    return [{"JobState": state.split()[0], "NodeList": nodes} for state, _, nodes in rows]


def output_of(*command: str) -> str:
    """What a command prints; nothing where it fails, hangs for a minute or is not installed."""
    if not shutil.which(command[0]):
        return ""
    with suppress(subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=60)
    return ""
