"""``launch/submit``: code and resolved config into the run folder, then sbatch.

What a look at config, data and run folder can refuse is refused here and not after hours in the
queue.
"""

import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from scalepeft.analysis.compare import command as compare
from scalepeft.build import check_batch, engine_class, task_of
from scalepeft.cluster import jobplan, sbatch
from scalepeft.cluster.sbatch import Job
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say
from scalepeft.core.slurm import ACTIVE
from scalepeft.models import hub as models
from scalepeft.pipeline import ON_RANKS, STAGES
from scalepeft.pipeline import check as check_pipeline
from scalepeft.run.folder import check_same_run
from scalepeft.run.status import job_of

SNAPSHOT = ("scalepeft", "configs", "slurm", "launch")
EXTENSIONS = "extensions"  # in the snapshot
# Variables that Slurm sets in a job: in a setting they would be empty when it is resolved here.
ON_A_NODE = "@only-in-the-job@"
NODE_VARIABLES = [
    f"SLURM_{name}"
    for name in """JOB_ID JOBID JOB_NAME JOB_NODELIST JOB_NUM_NODES NNODES NTASKS NODELIST NODEID
    ARRAY_JOB_ID ARRAY_TASK_ID ARRAY_TASK_COUNT RESTART_COUNT TMPDIR""".split()
]


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
    gpu: str | None = None
    plan: bool = True
    pipeline: bool = False
    cpu_sbatch: tuple[str, ...] = ()
    compare: tuple[str, ...] = ()


def run(options: Options) -> None:
    """Check, snapshot, render and queue; print the job ids.

    Raises:
        UserError: a mistake in job file, config or data, or sbatch refuses.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "slurm" / "train.sh").is_file():
        raise UserError(f"{root} is not a checkout: launch/submit takes slurm/train.sh from there")
    _check_options(options)
    lines = sbatch.read(options.job_file)
    over = sbatch.words_of(sbatch.long_options(options.sbatch))
    header = {**sbatch.header_of(lines), **over}
    if "--array" in header:
        raise UserError("--array: launch/submit makes the array itself: --sweep KEY=A,B,C")
    job_file = str(Path(options.job_file).resolve())
    try:
        os.chdir(header.get("--chdir") or ".")  # where the job will run, and find its files
    except OSError as error:
        raise UserError(f"--chdir={header['--chdir']}: {error.strerror}") from None
    path, settings = _describe(job_file, root)
    configs, base_dir = _configs(path, settings, options)
    _check(configs, header, options)
    design = _design(path, settings, options, base_dir) if options.compare else None
    if options.plan:
        planned = configs if design is None else _competitors(design)
        jobplan.check(planned, header, options.gpu)
    folder = _next(base_dir / "submissions")
    texts = {f"configs/{i}.yaml": _text(config, folder) for i, config in enumerate(configs)}
    scripts = {
        name: sbatch.render(lines, job, _sbatch_options(name, job, over, base_dir, options), folder)
        for name, job in _jobs(options, configs, folder, design).items()
    }
    if options.dry_run:
        _show(scripts, texts if design is None else {compare.FILE: design.text()})
        return
    try:
        _snapshot(root, folder, configs[0].extensions)
        for name, text in {**texts, **{f"{n}.sh": s for n, s in scripts.items()}}.items():
            write_atomically(folder / name, text)
        if design is not None:
            compare.keep(base_dir, design)  # the jobs read it there
        # A cell that failed is a row of the table and no reason to leave it out.
        after = "afterany" if design else "aftercorr" if options.sweep else "afterok"
        _queue(folder, scripts, after)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _check_options(options: Options) -> None:
    """Raise UserError if one option has no effect beside another."""
    if options.then and options.pipeline:
        raise UserError(f"--then {options.then} has no effect with --pipeline, which evaluates")
    if options.cpu_sbatch and not (options.pipeline or options.compare):
        raise UserError("--cpu-sbatch is for the CPU stages of --pipeline and --compare")
    if options.compare and (options.then or options.pipeline or options.sweep):
        raise UserError("--compare goes without --then, --pipeline and --sweep; it sweeps itself")
    if options.resume_with_changes and options.pipeline:
        raise UserError("--resume-with-changes: a pipeline does again what a change asks for")
    if options.resume_with_changes and options.compare:
        raise UserError("--resume-with-changes: a comparison runs again what a change asks for")
    if options.gpu and not options.plan:
        raise UserError(f"--gpu {options.gpu} has no effect with --no-plan; give one of them")


def _jobs(
    options: Options, configs: list[RunConfig], folder: Path, design: compare.Design | None
) -> dict[str, Job]:
    """The jobs by name, in order; each waits for the one before."""
    files = [str(folder / "configs" / f"{i}.yaml") for i in range(len(configs))]
    array = bool(options.sweep)
    if options.pipeline:
        return {
            stage: Job("pipeline", files, ["--stage", stage], stage in ON_RANKS, array)
            for stage in STAGES
        }
    if design is not None:
        out = ["--out", shlex.quote(str(folder.parent.parent))]
        return {
            step: Job("compare", words, out, gpus=step != "table", array=step != "table")
            for step, words in compare.arguments(design).items()
        }
    flags = ["--resume-with-changes"] if options.resume_with_changes else []
    jobs = {"train": Job("train", files, flags, array=array)}
    if options.then:
        runs = [str(Path(c.run_dir).absolute()) for c in configs]
        jobs[options.then] = Job(options.then, runs, [], array=array)
    return jobs


def _sbatch_options(
    name: str, job: Job, over: dict[str, str], base_dir: Path, options: Options
) -> dict[str, str]:
    """Options over those of the job file: the command line's, then ours."""
    found = {k: v for k, v in over.items() if job.gpus or k not in sbatch.NOT_ALONE}
    if not job.gpus:
        found |= sbatch.ALONE | sbatch.words_of(sbatch.long_options(options.cpu_sbatch))
    if job.array:
        throttle = f"%{options.throttle}" if options.throttle else ""
        found["--array"] = f"0-{len(job.targets) - 1}{throttle}"
    if "--output" not in over:
        log = f"%x-{'%A_%a' if job.array else '%j'}.log"
        found["--output"] = str(_next(base_dir / "submissions") / log)
    if "--job-name" not in over:
        found["--job-name"] = base_dir.name + ("" if name == "train" else f"-{name}")
    return {**found, "--chdir": str(Path.cwd())}


def _describe(job_file: str, root: Path) -> tuple[str | None, list[str]]:
    """Run the job file as far as train.sh, which then says which config and settings it got."""
    known_on_a_node = dict.fromkeys(NODE_VARIABLES, ON_A_NODE)
    environment = {"SCALEPEFT_DESCRIBE": "1", "SCALEPEFT_ROOT": str(root), **known_on_a_node}
    done = subprocess.run(
        ["bash", job_file], capture_output=True, text=True, env={**os.environ, **environment},
        check=False,
    )  # fmt: skip
    _, found, words = done.stdout.partition("\0")
    if done.returncode or not found:
        raise UserError(f"{job_file}: {done.stderr.strip() or 'did not reach slurm/train.sh'}")
    command_name, *settings = words.split("\0")[:-1]
    for word in settings:
        if ON_A_NODE in word:
            raise UserError(
                f"{job_file}: a setting takes a variable that only the job knows"
                f" ({word.replace(ON_A_NODE, '$SLURM_...')}); launch/submit resolves settings"
                " before queueing: use sbatch itself, or --sweep"
            )
    if command_name != "train":
        raise UserError(f"{job_file}: runs {command_name}; launch/submit is for training jobs")
    if settings and "=" not in settings[0]:
        return settings[0], settings[1:]
    return None, settings


def _configs(
    path: str | None, settings: list[str], options: Options
) -> tuple[list[RunConfig], Path]:
    """Resolve every run of the submission; returns them and the folder that holds all."""
    axes: dict[str, list[str]] = {}
    for axis in options.sweep:
        key, equals, values = axis.partition("=")
        parts = values.split(",")
        if not equals or not all(parts) or key == "run_dir" or "[" in values:
            raise UserError(f"--sweep {axis}: expected KEY=A,B,C, e.g. train.lr=1e-4,3e-4")
        if key in axes or len(set(parts)) < len(parts):
            raise UserError(f"--sweep {axis}: the same run appears twice")
        axes[key] = [f"{key}={value}" for value in parts]
    if options.throttle < 0 or (options.throttle and not (axes or options.compare)):
        raise UserError(
            f"--throttle {options.throttle}: how many runs of a --sweep or --compare may run at a"
            " time"
        )
    found, notes, base_dir = [], set(), Path()
    for chosen in itertools.product(*axes.values()):
        # A whole section goes first: keys of the command line are laid over it in every run.
        sections = [c for c in chosen if "." not in c.partition("=")[0]]
        keys = [c for c in chosen if c not in sections]
        one, said = config_files.load(path, [*settings, *sections, *options.settings, *keys])
        notes |= set(said)
        base_dir = Path(one.run_dir)
        name = ",".join(chosen).replace("/", "_")
        found.append(replace(one, run_dir=str(base_dir / name)) if axes else one)
    for note in sorted(notes):
        say(note)
    return found, base_dir


def _design(
    path: str | None, settings: list[str], options: Options, base_dir: Path
) -> compare.Design:
    """The comparison in ``run_dir``, without what the job file says of an adapter of its own."""
    own = [s for s in settings if s.startswith(("adapter=", "adapter.", "train.lr=", "run_dir="))]
    if left := [s for s in own if not s.startswith("run_dir=")]:
        say(f"{options.job_file}: {', '.join(left)}: left out, each method brings its own")
    given = [s for s in options.settings if not s.startswith("run_dir=")]
    rest = [*([path] if path else []), *(s for s in settings if s not in own), *given]
    return compare.prepare(compare.Options.parse(list(options.compare), rest, str(base_dir)))


def _competitors(design: compare.Design) -> list[RunConfig]:
    """A config of each method, at its usual rate."""
    return [design.config(m, m.usual_lr, design.seeds[0]) for m in design.methods if not m.refused]


def _check(configs: list[RunConfig], header: dict[str, str], options: Options) -> None:
    ranks = sbatch.ranks_of(header)
    read: set[str] = set()
    for config in configs:
        number, state = job_of(Path(config.run_dir)) or ("", "")
        if state in ACTIVE:
            raise UserError(
                f"run_dir={config.run_dir}: active Slurm job of the run: {number} ({state});"
                " scancel it first, or choose another run_dir"
            )
        check_same_run(config, options.resume_with_changes)
        models.check_place(config.model.path)
        if ranks is not None:
            engine_class(config).check(ranks)
            check_batch(config, ranks)
        task = task_of(config)
        if options.pipeline:
            check_pipeline(config)
        for split in ("train", "test") if options.then or options.pipeline else ("train",):
            sources = getattr(config.data, split)
            key = f"{config.data}" if not sources else f"{split} {sources}"
            if key not in read and not any(s.startswith("hf://") for s in sources):
                task.examples(split)
            read.add(key)


def _next(submissions: Path) -> Path:
    numbers = [int(p.name) for p in submissions.glob("[0-9]*") if p.name.isdecimal()]
    return (submissions / f"{max(numbers, default=0) + 1:03}").absolute()


def _show(rendered: dict[str, str], texts: dict[str, str]) -> None:
    for command, script in rendered.items():
        print(f"# ---- {command}.sh\n{script}")
    for name, text in texts.items():
        print(f"# ---- {name}\n{text}")
    first = next(iter(rendered))
    if shutil.which("sbatch"):
        done = subprocess.run(
            ["sbatch", "--test-only"], input=rendered[first], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(
                f"sbatch --test-only refuses {first}.sh: {sbatch.last_line(done.stderr)}"
            )
        say(sbatch.last_line(done.stderr))
    else:
        say("no sbatch here, so Slurm has not been asked whether it takes the job")
    say("dry run: nothing was written or queued")


def _text(config: RunConfig, folder: Path) -> str:
    """The config as the job reads it: with the snapshot's extensions."""
    if config.extensions:
        config = replace(config, extensions=str(folder / "code" / EXTENSIONS))
    return cfg.dump(config)


def _snapshot(root: Path, folder: Path, extensions: str | None) -> None:
    """Copy the code, and the extensions' beside it, into the submission's folder."""
    copies = {name: root / name for name in SNAPSHOT}
    if extensions:
        parts = (*registry.KINDS.values(), "configs")
        copies |= {f"{EXTENSIONS}/{part}": Path(extensions, part) for part in parts}
    (folder / "configs").mkdir(parents=True)
    for name, source in copies.items():
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / "code" / name, ignore=ignored)
    write_atomically(folder / "code" / "COMMIT", "\n".join(_commit(root)) + "\n")


def _commit(root: Path) -> Iterator[str]:
    """The commit that the snapshot is of, and the names of files that differ from it."""
    for words in (["rev-parse", "HEAD"], ["status", "--short"]):
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        yield done.stdout.strip() if done.returncode == 0 else "no git"


def _queue(folder: Path, rendered: dict[str, str], after: str) -> None:
    parent = ""
    for command in rendered:
        words = ["sbatch", "--parsable"]
        if parent:
            words += [f"--dependency={after}:{parent}", "--kill-on-invalid-dep=yes"]
        words.append(str(folder / f"{command}.sh"))
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(f"no sbatch on this machine; {folder}/{command}.sh is ready") from None
        if done.returncode:
            raise UserError(
                f"sbatch refuses {folder}/{command}.sh: {sbatch.last_line(done.stderr)}"
                + (f"; job {parent} is queued (scancel {parent} takes it back)" if parent else "")
            )
        parent = done.stdout.strip().split(";")[0]
        print(f"{command}: job {parent}  {' '.join(words)}", flush=True)
        write_atomically(folder / f"{command}.job", f"{parent}\n")
    print(f"log and job files: {folder}\nlaunch/status {folder.parent.parent}")
