"""Reading job files and rendering sbatch options."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from scalepeft.cluster.plan import gpus
from scalepeft.core.errors import UserError

SIGNAL_SECONDS = 60  # Slurm's, where --signal names none
GPU_OPTIONS = ("--gres", "--gpus", "--gpus-per-node", "--gpus-per-task")
ALONE = {"--nodes": "1", "--ntasks": "1", "--ntasks-per-node": "1"}
NOT_ALONE = (*GPU_OPTIONS, *ALONE, "--mem", "--exclusive", "--ntasks-per-gpu", "--cpus-per-gpu")
SOURCES = re.compile(r"^\s*(?:source|\.)\s.*slurm/train\.sh", re.M)


def _long(options: Iterable[str]) -> list[str]:
    """``time=1:00`` as sbatch takes it."""
    return [o if o.startswith("-") else f"--{o}" for o in options]


def _without(lines: list[str], keys: Iterable[str]) -> list[str]:
    """Job file lines without these options in the ``#SBATCH`` ones."""
    kept = []
    for line in lines:
        if line.startswith("#SBATCH"):
            words = _words(shlex.split(line.removeprefix("#SBATCH"), comments=True))
            left = [_option(k, v) for k, v in words.items() if k not in keys]
            line = "#SBATCH " + " ".join(left) if left else "#"
        kept.append(line)
    return kept


def _option(key: str, value: str) -> str:
    if not value:
        return key
    return f'{key}="{value}"' if key.startswith("--") else f'{key} "{value}"'


def _read(job_file: str) -> list[str]:
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
            f"{job_file}: is no job file: it must begin with #! and end with"
            ' source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"'
        )
    lines = text[: found.start()].splitlines()
    for number, line in enumerate(lines[_commands(lines) :], _commands(lines) + 1):
        if line.startswith("#SBATCH"):
            raise UserError(
                f"{job_file}, line {number}: Slurm does not read an #SBATCH line below the first"
                " command; move it up"
            )
    return lines


def _commands(lines: list[str]) -> int:
    """Index of the first line that is neither empty nor a comment."""
    return next(
        (i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines)
    )


def _words(options: list[str]) -> dict[str, str]:
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


def _header(lines: list[str], given: list[str]) -> dict[str, str]:
    """Options of the ``#SBATCH`` lines, and those laid over them."""
    words = []
    for line in lines:
        if line.startswith("#SBATCH"):
            try:
                words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError as error:
                raise UserError(f"{line}: {error}") from None
    return {**_words(words), **_words(given)}


def _gpu_of(header: dict[str, str]) -> tuple[gpus.Gpu | None, str]:
    """The GPU that the type in ``--gpus-per-node=h100:8`` or ``--gres=gpu:h100:8`` names, if it is
    one that is known; and the options that have a type.
    """
    found, said = set(), []
    for key in GPU_OPTIONS:
        for item in header.get(key, "").split(","):
            kind, *_ = item.removeprefix("gpu:" if key == "--gres" else "").split(":")
            if kind and not kind.isdecimal() and (key != "--gres" or item.startswith("gpu:")):
                found.add(gpus.named(kind))
                said.append(f"{key}={item}")
    return found.pop() if len(found) == 1 else None, ", ".join(said)


def _nodes(header: dict[str, str]) -> int | None:
    """Of ``--nodes``; the fewest of a range such as 2-4."""
    fewest = re.match(r"\d+(?=$|[-,:])", header.get("--nodes", ""))
    return int(fewest[0]) if fewest else None


def _warning(header: dict[str, str]) -> int | None:
    """Seconds before the time limit at which ``--signal`` comes; None without it."""
    if "--signal" not in header:
        return None
    seconds = header["--signal"].partition("@")[2]
    return int(seconds) if seconds.isdecimal() else SIGNAL_SECONDS
