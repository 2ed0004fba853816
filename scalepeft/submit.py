"""``launch/submit``: code and resolved config into the run folder, then sbatch.

What a look at config, data and run folder can refuse is refused here and not after hours in the
queue.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from scalepeft import config as cfg
from scalepeft import models
from scalepeft.build import engine_class, task_of
from scalepeft.checkpoint import write_atomically
from scalepeft.config import RunConfig
from scalepeft.lookup import UserError
from scalepeft.progress import say
from scalepeft.records import check_same_run
from scalepeft.train import check_batch

SNAPSHOT = ("scalepeft", "configs", "slurm", "launch")
SOURCES = re.compile(r"^\s*(?:source|\.)\s.*slurm/train\.sh", re.M)


@dataclass(frozen=True)
class Options:
    """What ``launch/submit`` was asked for.

    Attributes:
        job_file: a file of ``slurm/``, or a copy of one.
        settings: ``key=value``, over those of the job file.
        sweep: ``key=a,b,c``; several give their product. Each run has its own folder.
        throttle: runs of a sweep at a time; 0 for all.
        then: ``evaluate``: a second job once the first has succeeded.
        sbatch: options over the ``#SBATCH`` lines of the job file.
        dry_run: print what would be queued, write nothing.
    """

    job_file: str
    settings: list[str]
    sweep: list[str]
    throttle: int
    then: str | None
    sbatch: list[str]
    dry_run: bool


def run(options: Options) -> None:
    """Checks, snapshots, renders and queues; prints the job ids.

    Raises:
        UserError: a mistake in job file, config or data, or sbatch refuses.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "slurm" / "train.sh").is_file():
        raise UserError(f"{root} is no checkout: launch/submit takes slurm/train.sh from there")
    text = _read(options.job_file)
    header = _header(text, options.sbatch)
    job_file = str(Path(options.job_file).resolve())
    if header.get("--chdir"):  # where the job will run, and find its files
        try:
            os.chdir(header["--chdir"])
        except OSError as error:
            raise UserError(f"--chdir={header['--chdir']}: {error.strerror}") from None
    path, settings = _describe(job_file, root)
    configs, base_dir = _configs(path, [*settings, *options.settings], options.sweep)
    _check(configs, header, options.then)
    folder = _next(base_dir / "submissions")
    jobs = {"train": [str(folder / "configs" / f"{i}.yaml") for i in range(len(configs))]}
    if options.then:
        jobs[options.then] = [str(Path(c.run_dir).absolute()) for c in configs]
    array = _array(len(configs), options.throttle) if options.sweep else []
    logs = [f'--chdir="{Path.cwd()}"', f'--output="{folder}/%x-{"%A_%a" if array else "%j"}.log"']
    body = text[: SOURCES.search(text).start()]  # type: ignore[union-attr]  # _describe ran it
    rendered = {
        command: _render(body, [*logs, *array, *options.sbatch], folder, command, targets)
        for command, targets in jobs.items()
    }
    if options.dry_run:
        _show(rendered, configs)
        return
    _snapshot(root, folder, configs)
    for command, script in rendered.items():
        write_atomically(folder / f"{command}.sh", script)
    _queue(folder, rendered, bool(array))


def _read(job_file: str) -> str:
    try:
        text = Path(job_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{job_file}: {reason}; name a job file, e.g. slurm/hoft_llama70b.sh"
        ) from None
    if not text.startswith("#!") or not SOURCES.search(text):
        raise UserError(
            f"{job_file}: is no job file: it must begin with #! and end with"
            ' source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"'
        )
    return text


def _describe(job_file: str, root: Path) -> tuple[str | None, list[str]]:
    """Runs the job file as far as train.sh, which then says which config and settings it got."""
    environment = {"SCALEPEFT_DESCRIBE": "1", "SCALEPEFT_ROOT": str(root)}
    command = ["env", *(f"{k}={v}" for k, v in environment.items()), "bash", job_file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _, found, words = done.stdout.partition("\0")
    if done.returncode or not found:
        raise UserError(f"{job_file}: {done.stderr.strip() or 'did not come to slurm/train.sh'}")
    command_name, *settings = words.split("\0")[:-1]
    if command_name != "train":
        raise UserError(f"{job_file}: runs {command_name}; launch/submit is for training jobs")
    if settings and "=" not in settings[0]:
        return settings[0], settings[1:]
    return None, settings


def _configs(
    path: str | None, settings: list[str], sweep: list[str]
) -> tuple[list[RunConfig], Path]:
    """Resolves every run of the submission; returns them and the folder that holds all."""
    config, notes = cfg.load(path, settings)
    for note in notes:
        say(note)
    if not sweep:
        return [config], Path(config.run_dir)
    axes: list[list[str]] = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not values or "run_dir" in key:
            raise UserError(f"--sweep {axis}: expected KEY=A,B,C, e.g. train.lr=1e-4,3e-4")
        axes.append([f"{key}={value}" for value in values.split(",")])
    found = []
    for chosen in itertools.product(*axes):
        one, _ = cfg.load(path, [*settings, *chosen])
        name = ",".join(chosen).replace("/", "_")
        found.append(replace(one, run_dir=str(Path(config.run_dir) / name)))
    if len({c.run_dir for c in found}) < len(found):
        raise UserError(f"--sweep {' --sweep '.join(sweep)}: the same run stands there twice")
    return found, Path(config.run_dir)


def _header(text: str, options: list[str]) -> dict[str, str]:
    """Options of the ``#SBATCH`` lines and those laid over them, by their long names."""
    long = {"-N": "--nodes", "-n": "--ntasks", "-D": "--chdir"}
    words = [
        w for line in re.findall(r"^#SBATCH\s+(.*)", text, re.M) for w in shlex.split(line, True)
    ]
    found = {}
    for word in [*words, *options]:
        key, _, value = word.partition("=")
        found[long.get(key, key)] = value
    return found


def _check(configs: list[RunConfig], header: dict[str, str], then: str | None) -> None:
    nodes, each = header.get("--nodes", ""), header.get("--ntasks-per-node", "")
    ranks = header.get("--ntasks", "")
    if not ranks and nodes.isdecimal() and each.isdecimal():
        ranks = str(int(nodes) * int(each))
    for config in configs:
        check_same_run(config, allow_changes=False)
        models.check_place(config.model.path)
        if ranks.isdecimal():
            engine_class(config).check(int(ranks))
            check_batch(config, int(ranks))
    task = task_of(configs[0])
    for split in ("train", "test") if then == "evaluate" else ("train",):
        if not any(s.startswith("hf://") for s in getattr(configs[0].data, split)):
            task.examples(split)


def _next(submissions: Path) -> Path:
    numbers = [int(p.name) for p in submissions.glob("[0-9]*") if p.name.isdecimal()]
    return (submissions / f"{max(numbers, default=0) + 1:03}").absolute()


def _array(count: int, throttle: int) -> list[str]:
    return [f"--array=0-{count - 1}" + (f"%{throttle}" if throttle else "")]


def _render(body: str, options: list[str], folder: Path, command: str, targets: list[str]) -> str:
    """The job file with more ``#SBATCH`` lines, its last line replaced by what is resolved."""
    lines = body.splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith("#SBATCH")), default=0)
    name = f"{Path(folder).parent.parent.name}" + ("" if command == "train" else f"-{command}")
    added = [f"#SBATCH {option}" for option in (f'--job-name="{name}"', *options)]
    quoted = " ".join(shlex.quote(t) for t in targets)
    own = [
        "",
        "# By launch/submit: code and resolved configs as they were when this was queued.",
        f"SCALEPEFT_ROOT={shlex.quote(str(folder / 'code'))}",
        f"SCALEPEFT_JOBS={shlex.quote(str(folder / 'jobs'))}",
        f"PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}",
        f"SCALEPEFT_COMMAND={command}",
        f"targets=({quoted})",
        "CONFIG=${targets[${SLURM_ARRAY_TASK_ID:-0}]}",
        "SETTINGS=()",
        'source "$SCALEPEFT_ROOT/slurm/train.sh" "$@"',
    ]
    return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :], *own]) + "\n"


def _show(rendered: dict[str, str], configs: list[RunConfig]) -> None:
    for command, script in rendered.items():
        print(f"# ---- {command}.sh\n{script}")
    for i, config in enumerate(configs):
        print(f"# ---- configs/{i}.yaml\n{cfg.dump(config)}")
    if shutil.which("sbatch"):
        done = subprocess.run(
            ["sbatch", "--test-only"], input=rendered["train"], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"sbatch --test-only refuses train.sh: {_last(done.stderr)}")
        say(_last(done.stderr))
    else:
        say("no sbatch here, so Slurm has not been asked whether it takes the job")
    say("dry run: nothing was written or queued")


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _snapshot(root: Path, folder: Path, configs: list[RunConfig]) -> None:
    try:
        (folder / "configs").mkdir(parents=True)
        for name in SNAPSHOT:
            shutil.copytree(
                root / name, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        write_atomically(folder / "code" / "COMMIT", "\n".join(_commit(root)) + "\n")
        for i, config in enumerate(configs):
            write_atomically(folder / "configs" / f"{i}.yaml", cfg.dump(config))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _commit(root: Path) -> Iterator[str]:
    """The commit that the snapshot is of, and the names of files that differ from it."""
    for words in (["rev-parse", "HEAD"], ["status", "--short"]):
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        yield done.stdout.strip() if done.returncode == 0 else "no git"


def _queue(folder: Path, rendered: dict[str, str], array: bool) -> None:
    parent = ""
    for command in rendered:
        words = ["sbatch", "--parsable"]
        if parent:
            kind = "aftercorr" if array else "afterok"
            words += [f"--dependency={kind}:{parent}", "--kill-on-invalid-dep=yes"]
        words.append(str(folder / f"{command}.sh"))
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(f"no sbatch on this machine; {folder}/{command}.sh is ready") from None
        if done.returncode:
            raise UserError(
                f"sbatch refuses {folder}/{command}.sh: {_last(done.stderr)}"
                + (f"; job {parent} is queued (scancel {parent} takes it back)" if parent else "")
            )
        parent = done.stdout.strip().split(";")[0]
        write_atomically(folder / f"{command}.job", f"{parent}\n")
        print(f"{command}: job {parent}  {' '.join(words)}")
    print(f"log and job files: {folder}\nlaunch/status {folder.parent.parent}")
