"""Job files: reading their ``#SBATCH`` lines, rendering those of a submission."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scalepeft.cluster.plan import gpus
from scalepeft.core.errors import UserError

SIGNAL_SECONDS = 60  # Slurm's, where --signal names none
GPU_OPTIONS = ("--gres", "--gpus", "--gpus-per-node", "--gpus-per-task")
ALONE = {"--nodes": "1", "--ntasks": "1", "--ntasks-per-node": "1"}
NOT_ALONE = (*GPU_OPTIONS, *ALONE, "--mem", "--exclusive", "--ntasks-per-gpu", "--cpus-per-gpu")
SOURCES = re.compile(r"^\s*(?:source|\.)\s.*slurm/train\.sh", re.M)


@dataclass(frozen=True)
class Job:
    """A job of the submission: ``scalepeft COMMAND TARGET FLAGS``, a target for each run."""

    command: str
    targets: list[str]
    flags: list[str]
    gpus: bool = True
    array: bool = False


def long_options(options: Iterable[str]) -> list[str]:
    """``time=1:00`` as sbatch takes it."""
    return [o if o.startswith("-") else f"--{o}" for o in options]


def _without(lines: list[str], keys: Iterable[str]) -> list[str]:
    """Job file lines without these options in the ``#SBATCH`` ones."""
    kept = []
    for line in lines:
        if line.startswith("#SBATCH"):
            words = words_of(shlex.split(line.removeprefix("#SBATCH"), comments=True))
            left = [_option(k, v) for k, v in words.items() if k not in keys]
            line = "#SBATCH " + " ".join(left) if left else "#"
        kept.append(line)
    return kept


def _option(key: str, value: str) -> str:
    if not value:
        return key
    return f'{key}="{value}"' if key.startswith("--") else f'{key} "{value}"'


def read(job_file: str) -> list[str]:
    """The lines of a job file before the one that sources train.sh."""
    try:
        text = Path(job_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{job_file}: {reason}; name a job file, e.g. slurm/hoft_llama70b.sh"
        ) from None
    found = SOURCES.search(text)
    if not text.startswith("#!") or not found:
        raise UserError(
            f"{job_file}: not a job file: it must begin with #! and end with"
            ' source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"'
        )
    lines = text[: found.start()].splitlines()
    for number, line in enumerate(lines[first_command(lines) :], first_command(lines) + 1):
        if line.startswith("#SBATCH"):
            raise UserError(
                f"{job_file}, line {number}: Slurm does not read an #SBATCH line below the first"
                " command; move it up"
            )
    return lines


def first_command(lines: list[str]) -> int:
    """Index of the first line that is neither empty nor a comment."""
    return next(
        (i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines)
    )


def words_of(options: list[str]) -> dict[str, str]:
    """sbatch options by their long names: ``--nodes=2``, ``--nodes 2``, ``-N 2`` and ``-N2``."""
    long = {"-N": "--nodes", "-n": "--ntasks", "-D": "--chdir", "-a": "--array"}
    long |= {"-o": "--output", "-J": "--job-name", "-t": "--time", "-p": "--partition"}
    long |= {"-G": "--gpus"}
    found: dict[str, str] = {}
    last = ""
    for word in options:
        if word.startswith("--"):
            last, _, found[last] = word.partition("=")
        elif word.startswith("-"):
            last = long.get(word[:2], word[:2])
            found[last] = word[2:].removeprefix("=").strip()
        elif last:
            found[last] = word
    return found


def header_of(lines: list[str]) -> dict[str, str]:
    """Options of the ``#SBATCH`` lines."""
    words = []
    for line in lines:
        if line.startswith("#SBATCH"):
            try:
                words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError as error:
                raise UserError(f"{line}: {error}") from None
    return words_of(words)


def gpu_of(header: dict[str, str]) -> tuple[gpus.Gpu | None, str]:
    """The GPU that the type in ``--gpus-per-node=h100:8`` or ``--gres=gpu:h100:8`` names, if it is
    one that is known; and the options that have a type.
    """
    models, typed = set(), []
    for key in GPU_OPTIONS:
        for item in header.get(key, "").split(","):
            kind, *_ = item.removeprefix("gpu:" if key == "--gres" else "").split(":")
            if kind and not kind.isdecimal() and (key != "--gres" or item.startswith("gpu:")):
                models.add(gpus.named(kind))
                typed.append(f"{key}={item}")
    return models.pop() if len(models) == 1 else None, ", ".join(typed)


def nodes_of(header: dict[str, str]) -> int | None:
    """Of ``--nodes``; the fewest of a range such as 2-4."""
    fewest = re.match(r"\d+(?=$|[-,:])", header.get("--nodes", ""))
    return int(fewest[0]) if fewest else None


def warning_seconds(header: dict[str, str]) -> int | None:
    """Seconds before the time limit at which ``--signal`` comes; None without it."""
    if "--signal" not in header:
        return None
    seconds = header["--signal"].partition("@")[2]
    return int(seconds) if seconds.isdecimal() else SIGNAL_SECONDS


def tasks_per_node(header: dict[str, str]) -> int:
    """Of ``--ntasks-per-node``, or of ``--ntasks`` over the nodes; 1 without both."""
    per_node, total = header.get("--ntasks-per-node", ""), header.get("--ntasks", "")
    if per_node.isdecimal():
        return int(per_node)
    return max(1, int(total) // (nodes_of(header) or 1)) if total.isdecimal() else 1


def ranks_of(header: dict[str, str]) -> int | None:
    """Number of tasks; None where the header leaves it to Slurm.

    Raises:
        UserError: several nodes without a number of tasks on each.
    """
    total, nodes = header.get("--ntasks", ""), nodes_of(header)
    if total:
        return int(total) if total.isdecimal() else None
    if nodes and header.get("--ntasks-per-node", "").isdecimal():
        return nodes * int(header["--ntasks-per-node"])
    if nodes and nodes > 1:
        raise UserError(
            f"--nodes={header['--nodes']} without --ntasks-per-node: set it, one task a GPU"
        )
    return None


def render(lines: list[str], job: Job, options: dict[str, str], folder: Path) -> str:
    """The job file with more ``#SBATCH`` lines, its last line replaced by what is resolved.

    Args:
        lines: of the job file.
        job: which one of the submission.
        options: laid over those of the job file.
        folder: of the submission.
    """
    lines = lines if job.gpus else _without(lines, NOT_ALONE)
    first = first_command(lines)
    last = max((i for i, x in enumerate(lines[:first]) if x.startswith("#SBATCH")), default=0) + 1
    tail = [
        "",
        "# By launch/submit: code and resolved configs as they were when this was queued.",
        f"SCALEPEFT_ROOT={shlex.quote(str(folder / 'code'))}",
        f"SCALEPEFT_JOBS={shlex.quote(str(folder / 'jobs'))}",
        f"PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}",
        f"SCALEPEFT_COMMAND={job.command}",
        f"targets=({' '.join(shlex.quote(target) for target in job.targets)})",
        "CONFIG=${targets[${SLURM_ARRAY_TASK_ID:-0}]}",
        f"SETTINGS=({' '.join(job.flags)})",
        'source "$SCALEPEFT_ROOT/slurm/train.sh" "$@"',
    ]
    added = [f"#SBATCH {_option(key, value)}" for key, value in options.items()]
    script = "\n".join([*lines[:last], *added, *lines[last:], *tail]) + "\n"
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            "the job file ends within an if, a loop or a quote where it sources train.sh"
            f" ({last_line(done.stderr)}); the source line must stand by itself at the end"
        )
    return script


def last_line(text: str) -> str:
    """Of what a program printed."""
    return (text.strip().splitlines() or ["no reason given"])[-1]
