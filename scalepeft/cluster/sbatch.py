"""Job files: reading their ``#SBATCH`` lines, rendering those of a submission."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from scalepeft.cluster.plan import gpus
from scalepeft.core.errors import UserError, refuse
from scalepeft.core.text import one_line, plain

SIGNAL_SECONDS = 60  # Slurm's, where --signal names none
GPU_OPTIONS = {"--gres": "gpu:", "--gpus": "", "--gpus-per-node": "", "--gpus-per-task": ""}
ALONE = {"--nodes": "1", "--ntasks": "1", "--ntasks-per-node": "1"}
NOT_ALONE = (*GPU_OPTIONS, *ALONE, "--mem", "--exclusive", "--ntasks-per-gpu", "--cpus-per-gpu")
SOURCES = re.compile(r"^\s*(?:source|\.)\s.*slurm/train\.sh", re.M)
LONG = {
    "-N": "--nodes", "-n": "--ntasks", "-D": "--chdir", "-a": "--array", "-o": "--output",
    "-J": "--job-name", "-t": "--time", "-p": "--partition", "-G": "--gpus", "-A": "--account",
    "-c": "--cpus-per-task", "-C": "--constraint", "-q": "--qos", "-w": "--nodelist",
    "-x": "--exclude", "-e": "--error", "-d": "--dependency", "-M": "--clusters",
}  # fmt: skip
TAIL = """
# By launch/submit: code and resolved configs as they were when this was queued.
SCALEPEFT_ROOT={code}
SCALEPEFT_JOBS={jobs}
PYTHON=${{PYTHON:-{python}}}
SCALEPEFT_COMMAND={command}
targets=({targets})
CONFIG=${{targets[${{SLURM_ARRAY_TASK_ID:-0}}]}}
SETTINGS=({flags})
source "$SCALEPEFT_ROOT/slurm/train.sh" "$@"
"""

call = partial(subprocess.run, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Options:
    """What ``launch/submit`` was asked for.

    Attributes:
        job_file: a file of slurm/, or a copy of one, e.g. slurm/hoft_llama70b.sh
        settings: KEY=VALUE: over the job file's
        sweep: KEY=A,B,C: a job array, a run each in its own folder; several give their product
        throttle: runs of a sweep at a time; 0 for all
        then: a second job, once the first has succeeded
        pipeline: a chain of jobs, one for each stage of scalepeft pipeline
        cpu_sbatch: OPTION=VALUE: for the stages that need no GPU, e.g. partition=cpu
        compare: OPTION=VALUE: scalepeft compare in run_dir as job arrays, e.g. methods=hoft,lora
        sbatch: OPTION=VALUE: over the #SBATCH lines of the job file
        resume_with_changes: continue although harmless keys differ from the run's config
        dry_run: print what would be queued; queue and write nothing
        site: NAME: or a file, whose GPUs a node, account and the like are laid over the job file's
            (default: $SCALEPEFT_SITE; scalepeft init --list)
        gpu: as for plan, where the job file does not name its GPUs
        plan: do not look whether the run fits, and saves in time for the time limit
    """

    job_file: str
    settings: list[str]
    sweep: list[str]
    sbatch: list[str]
    throttle: int = 0
    then: Literal["evaluate"] | None = None
    resume_with_changes: bool = False
    dry_run: bool = False
    site: str | None = None
    gpu: str | None = None
    plan: bool = True
    pipeline: bool = False
    cpu_sbatch: tuple[str, ...] = ()
    compare: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UserError if one option has no effect beside another."""
        refuse({
            f"--then {self.then} has no effect with --pipeline, which evaluates":
                self.then and self.pipeline,
            "--cpu-sbatch is for the CPU stages of --pipeline and --compare":
                self.cpu_sbatch and not (self.pipeline or self.compare),
            "--compare goes without --then, --pipeline and --sweep; it sweeps itself":
                self.compare and (self.then or self.pipeline or self.sweep),
            "--resume-with-changes: a pipeline or comparison runs again what a change asks for":
                self.resume_with_changes and (self.pipeline or self.compare),
            f"--gpu {self.gpu} has no effect with --no-plan; give one of them":
                self.gpu and not self.plan,
            f"--throttle {self.throttle}: how many runs of a --sweep or --compare go at a time":
                self.throttle < 0 or (self.throttle and not (self.sweep or self.compare)),
        })  # fmt: skip
        for word in (self.job_file, *self.sbatch, *self.cpu_sbatch, *self.sweep):
            if not plain(word):
                raise UserError(f"{one_line(word, 100)}: has control characters, or is not UTF-8")


@dataclass(frozen=True)
class Job:
    """A job of the submission: ``scalepeft COMMAND TARGET FLAGS``, a target for each run."""

    command: str
    targets: list[str]
    flags: list[str]
    gpus: bool = True


def read(job_file: str) -> list[str]:
    """The lines of a job file before the one that sources train.sh."""
    try:
        text = Path(job_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{job_file}: {reason}; name a job file, e.g. slurm/hoft_llama70b.sh"
        ) from None
    source = SOURCES.search(text)
    if not text.startswith("#!") or not source:
        raise UserError(
            f"{job_file}: not a job file: it must begin with #! and end with"
            ' source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"'
        )
    lines, command = text[: source.start()].splitlines(), False
    for number, line in enumerate(lines, 1):
        command = command or bool(line.strip() and not line.startswith("#"))
        if command and line.startswith("#SBATCH"):
            raise UserError(
                f"{job_file}, line {number}: Slurm does not read an #SBATCH line below the first"
                " command; move it up"
            )
    return lines


def words_of(options: Iterable[str]) -> dict[str, str]:
    """sbatch options by their long names: ``--nodes=2``, ``--nodes 2``, ``-N 2`` and ``-N2``."""
    words: dict[str, str] = {}
    last = ""
    for word in options:
        if option := re.match(r"(--[^=]+|-.)=?\s*(.*)", word):
            last = LONG.get(option[1], option[1])
            words[last] = option[2].rstrip()
        elif last:
            words[last] = word
    return words


def over(options: Iterable[str]) -> dict[str, str]:
    """The same of a ``--sbatch``, which takes ``time=1:00`` too."""
    return words_of(o if o.startswith("-") else f"--{o}" for o in options)


def header_of(lines: list[str]) -> dict[str, str]:
    """Options of the ``#SBATCH`` lines."""
    words: dict[str, str] = {}
    for line in lines:
        if line.startswith("#SBATCH"):
            try:
                words |= words_of(shlex.split(line.removeprefix("#SBATCH"), comments=True))
            except ValueError as error:
                raise UserError(f"{line}: {error}") from None
    return words


def arguments(options: dict[str, str]) -> list[str]:
    """Options as words of sbatch's command line, where no text of a user is read as another."""
    return [
        f"{key}={value}" if value and key.startswith("--") else f"{key}{value}"
        for key, value in options.items()
    ]


def gpu_of(header: dict[str, str]) -> tuple[gpus.Gpu | None, str]:
    """The known GPU that ``--gres=gpu:h100:8`` or the like names, and the options with a type."""
    typed = {}
    for key, prefix in GPU_OPTIONS.items():
        for item in header.get(key, "").split(","):
            kind = item.removeprefix(prefix).partition(":")[0]
            if item.startswith(prefix) and kind and not kind.isdecimal():
                typed[f"{key}={item}"] = gpus.named(kind)
    models = set(typed.values())
    return models.pop() if len(models) == 1 else None, ", ".join(typed)


def nodes_of(header: dict[str, str]) -> int | None:
    """Of ``--nodes``; the fewest of a range such as 2-4."""
    fewest = re.match(r"\d+(?=$|[-,:])", header.get("--nodes", ""))
    return int(fewest[0]) if fewest else None


def ranks_of(header: dict[str, str]) -> int | None:
    """Number of tasks, None where it is Slurm's; UserError for several nodes without it."""
    total, per_node = header.get("--ntasks", ""), header.get("--ntasks-per-node", "")
    nodes = nodes_of(header) or 1
    if total:
        return int(total) if total.isdecimal() else None
    if per_node.isdecimal():
        return nodes * int(per_node)
    if nodes > 1:
        raise UserError(
            f"--nodes={header['--nodes']} without --ntasks-per-node: set it, one task a GPU"
        )
    return None


def warning_seconds(header: dict[str, str]) -> int | None:
    """Seconds before the time limit at which ``--signal`` comes; None without it."""
    if "--signal" not in header:
        return None
    seconds = header["--signal"].partition("@")[2]
    return int(seconds) if seconds.isdecimal() else SIGNAL_SECONDS


def render(lines: list[str], job: Job, folder: Path) -> str:
    """The job file (without its ``#SBATCH`` lines for a job without GPUs), its last line replaced
    by what is resolved: the job's targets, and the code in the submission's ``folder``.
    """
    kept = [line for line in lines if job.gpus or not line.startswith("#SBATCH")]
    tail = TAIL.format(
        code=shlex.quote(str(folder / "code")), jobs=shlex.quote(str(folder / "jobs")),
        python=shlex.quote(sys.executable), command=job.command,
        targets=shlex.join(job.targets), flags=shlex.join(job.flags),
    )  # fmt: skip
    script = "\n".join([*kept, tail])
    done = call(["bash", "-n"], input=script)
    if done.returncode:
        raise UserError(
            "the job file ends within an if, a loop or a quote where it sources train.sh"
            f" ({last_line(done.stderr)}); the source line must stand by itself at the end"
        )
    return script


def last_line(text: str) -> str:
    """Of what a program printed."""
    return (text.strip().splitlines() or ["no reason given"])[-1]
