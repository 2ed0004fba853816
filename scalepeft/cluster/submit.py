"""``launch/submit``: code and resolved config into the run folder, then sbatch. What a look at
config, data and run folder can refuse is refused here and not after hours in the queue.
"""

import itertools
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import scalepeft
from scalepeft import pipeline
from scalepeft.analysis.compare import command as compare
from scalepeft.build import check_batch, engine_class, task_of
from scalepeft.cluster import sbatch, sites
from scalepeft.cluster.plan import gpus, planning
from scalepeft.cluster.sbatch import Job, Options
from scalepeft.config import changes
from scalepeft.config import files as config_files
from scalepeft.config.schema import RunConfig, dump
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides
from scalepeft.core.files import shipped, write_atomically, writing
from scalepeft.core.log import say
from scalepeft.data.tasks.base import Split
from scalepeft.models import dimensions
from scalepeft.models import hub as models
from scalepeft.run.folder import check_same_run
from scalepeft.run.status import job_of

DATA = ("configs", "slurm", "launch")  # of the package, which a snapshot has beside it
EXTENSIONS = "extensions"  # in the snapshot
# Variables that Slurm sets in a job: in a setting they would be empty when it is resolved here.
ON_A_NODE = "@only-in-the-job@"
NODE_VARIABLES = [
    f"SLURM_{name}"
    for name in """JOB_ID JOBID JOB_NAME JOB_NODELIST JOB_NUM_NODES NNODES NTASKS NODELIST NODEID
    ARRAY_JOB_ID ARRAY_TASK_ID ARRAY_TASK_COUNT RESTART_COUNT TMPDIR""".split()
]


def run(options: Options) -> None:
    """Check, snapshot, render, queue, print the job ids. Raises UserError: a mistake, or sbatch."""
    options = replace(options, site=options.site or os.environ.get("SCALEPEFT_SITE"))
    options.check()
    lines, over = sbatch.read(options.job_file), sbatch.over(options.sbatch)
    in_file = sbatch.header_of(lines)
    site = sites.find(options.site) if options.site else None
    if site:  # what it says of a line of the file is to be said by the command line alone
        ours = {f"--{key}": value for key, value in site.sbatch.items()}
        if lost := [f"{k}={v}" for k, v in in_file.items() if ours.get(k, v) != v]:
            say(f"site {options.site}: its own in the place of the job file's {', '.join(lost)}")
        in_file = site.header(in_file)
        lines = [*(line for line in lines if not line.startswith("#SBATCH")), site.shell()]
    header = {**in_file, **over}
    if "--array" in header:
        raise UserError("--array: launch/submit makes the array itself: --sweep KEY=A,B,C")
    job_file = str(Path(options.job_file).resolve())
    try:
        os.chdir(header.get("--chdir") or ".")  # where the job will run, and find its files
    except OSError as error:
        raise UserError(f"--chdir={header['--chdir']}: {error.strerror}") from None
    path, settings = _describe(job_file)
    configs, base_dir = _configs(path, settings, options)
    _check(configs, header, options)
    design = _design(path, settings, options, base_dir) if options.compare else None
    if options.plan:
        planned = configs
        if design is not None:  # each method at its usual rate
            tried = [m for m in design.methods if not m.refused]
            planned = [design.config(m, m.usual_lr, design.seeds[0]) for m in tried]
        _check_plans(planned, header, options.gpu or (site.gpu if site else None))
    numbers = [int(p.name) for p in base_dir.glob("submissions/[0-9]*") if p.name.isdecimal()]
    folder = (base_dir / "submissions" / f"{max(numbers, default=0) + 1:03}").absolute()
    jobs = _jobs(options, configs, folder, design)
    texts, calls = {}, {}
    for name, job in jobs.items():
        calls[name] = sbatch.arguments(_laid_over(name, job, in_file, over, folder, options))
        texts[f"{name}.sh"] = sbatch.render(lines, job, folder)
        texts[f"{name}.args"] = f"{shlex.join(calls[name])}\n"  # for who wonders later
    if options.dry_run:
        resolved = {compare.FILE: design.text()} if design else _texts(configs, folder)
        _show({**texts, **resolved}, calls)
        return
    with writing(folder):
        _snapshot(folder, configs[0].extensions)
        for name, text in {**_texts(configs, folder), **texts}.items():
            write_atomically(folder / name, text)
        if design is not None:
            compare.keep(base_dir, design)  # the jobs read it there
        # A cell that failed is a row of the table and no reason to leave it out.
        after = "afterany" if design else "aftercorr" if options.sweep else "afterok"
        _queue(folder, calls, after)


def _jobs(
    options: Options, configs: list[RunConfig], folder: Path, design: compare.Design | None
) -> dict[str, Job]:
    """The jobs by name, in order; each waits for the one before."""
    files = [str(folder / "configs" / f"{i}.yaml") for i in range(len(configs))]
    if options.pipeline:
        stages, on_ranks = pipeline.STAGES, pipeline.ON_RANKS
        return {s: Job("pipeline", files, ["--stage", s], s in on_ranks) for s in stages}
    if design is not None:
        out = ["--out", str(folder.parent.parent)]
        steps = compare.arguments(design).items()
        return {step: Job("compare", words, out, step != "table") for step, words in steps}
    flags = ["--resume-with-changes"] if options.resume_with_changes else []
    jobs = {"train": Job("train", files, flags)}
    if options.then:
        runs = [str(Path(c.run_dir).absolute()) for c in configs]
        jobs[options.then] = Job(options.then, runs, [])
    return jobs


def _laid_over(
    name: str, job: Job, in_file: sites.Words, over: sites.Words, folder: Path, options: Options
) -> dict[str, str]:
    """Options over those of the job file: the command line's, then ours."""
    ours = {"--chdir": str(Path.cwd())}
    if array := bool(options.sweep or (options.compare and job.gpus)):
        throttle = f"%{options.throttle}" if options.throttle else ""
        ours["--array"] = f"0-{len(job.targets) - 1}{throttle}"
    run_name = folder.parent.parent.name + ("" if name == "train" else f"-{name}")
    log = str(folder / f"%x-{'%A_%a' if array else '%j'}.log")
    words = in_file if options.site or not job.gpus else {}
    words = {**words, "--output": log, "--job-name": run_name, **over}
    if not job.gpus:
        words = {k: v for k, v in words.items() if k not in sbatch.NOT_ALONE}
        words |= sbatch.ALONE | sbatch.over(options.cpu_sbatch)
    return words | ours


def _describe(job_file: str) -> tuple[str | None, list[str]]:
    """Run the job file as far as train.sh, which then says which config and settings it got."""
    environment = dict.fromkeys(NODE_VARIABLES, ON_A_NODE)
    environment |= {"SCALEPEFT_DESCRIBE": "1", "SCALEPEFT_ROOT": str(shipped("slurm").parent)}
    done = sbatch.call(["bash", job_file], env={**os.environ, **environment})
    _, reached, words = done.stdout.partition("\0")
    if done.returncode or not reached:
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
    return config_files.config_first(settings)


def _configs(
    path: str | None, settings: list[str], options: Options
) -> tuple[list[RunConfig], Path]:
    """Resolve every run of the submission; returns them and the folder that holds all."""
    axes: dict[str, list[str]] = {}
    for axis in options.sweep:
        key, _, values = axis.partition("=")
        parts = values.split(",")
        if not all(parts) or key == "run_dir" or "[" in values:
            raise UserError(f"--sweep {axis}: expected KEY=A,B,C, e.g. train.lr=1e-4,3e-4")
        if key in axes or len(set(parts)) < len(parts):
            raise UserError(f"--sweep {axis}: the same run appears twice")
        axes[key] = [f"{key}={value}" for value in parts]
    configs, notes, base_dir = [], set(), Path()
    for chosen in itertools.product(*axes.values()):
        # A whole section goes first: keys of the command line are laid over it in every run.
        sections = [c for c in chosen if "." not in c.partition("=")[0]]
        keys = [c for c in chosen if c not in sections]
        one, said = config_files.load(path, [*settings, *sections, *options.settings, *keys])
        notes |= set(said)
        base_dir = Path(one.run_dir)
        run_dir = base_dir / ",".join(chosen).replace("/", "_")
        configs.append(replace(one, run_dir=str(run_dir)))
    for note in sorted(notes):
        say(note)
    return configs, base_dir


def _design(
    path: str | None, settings: list[str], options: Options, base_dir: Path
) -> compare.Design:
    """The comparison in ``run_dir``, without what the job file says of an adapter of its own."""
    adapter = [s for s in settings if s.startswith(("adapter=", "adapter.", "train.lr="))]
    if adapter:
        say(f"{options.job_file}: {', '.join(adapter)}: left out, each method brings its own")
    kept = [s for s in settings if s not in adapter] + options.settings
    rest = [*([path] if path else []), *(s for s in kept if not s.startswith("run_dir="))]
    return compare.prepare(compare.Options.parse(list(options.compare), rest, str(base_dir)))


def _check(configs: list[RunConfig], header: dict[str, str], options: Options) -> None:
    ranks = sbatch.ranks_of(header)
    splits: list[Split] = ["train", "test"] if options.then or options.pipeline else ["train"]
    read: set[str] = set()
    for config in configs:
        if job := job_of(Path(config.run_dir)):
            raise UserError(
                f"run_dir={config.run_dir}: active Slurm job of the run: {job[0]} ({job[1]});"
                " scancel it first, or choose another run_dir"
            )
        check_same_run(config, options.resume_with_changes)
        models.check_place(config.model.path)
        if ranks is not None:
            engine_class(config).check(ranks)
            check_batch(config, ranks)
        if options.pipeline:
            pipeline.check(config)
        for split in splits:
            sources = getattr(config.data, split)
            key = f"{split} {sources or config.data}"
            if key not in read and not any(s.startswith("hf://") for s in sources):
                task_of(config).examples(split)
            read.add(key)


def _check_plans(configs: list[RunConfig], header: dict[str, str], name: str | None) -> None:
    """Plan each kind of run once, for the GPU ``name`` or ``header``'s; raises as below."""
    gpu, by = (gpus.find(name), "--gpu") if name else sbatch.gpu_of(header)
    fix = "whether the run fits is not looked at; add --gpu NAME"
    absent = f"{by or 'the job file'} names no GPU that is known here: {fix}"
    say(f"plan: for GPU {gpu.name}, by {by}" if gpu else f"plan: {absent}")
    nodes, gpu_name = sbatch.nodes_of(header) or 1, gpu.name if gpu else None
    per_node = max(1, (sbatch.ranks_of(header) or 1) // nodes)
    where = gpus.Options(nodes, per_node, gpu_name, network=False)
    kinds = {f"{c.model} {c.adapter} {changes.deciding(c, Decides.SPEED)}": c for c in configs}
    for config in kinds.values():
        try:
            dimensions.find(config.model, network=False)
        except UserError as error:
            say(f"not planned: {error}")
            continue
        _check_plan(planning.plan(config, where), header)


def _check_plan(plan: planning.Plan, header: dict[str, str]) -> None:
    """Raise UserError for what fails whatever is assumed; what depends on that is only said."""
    gpu, warning = plan.options.target, sbatch.warning_seconds(header)
    tensors, need = plan.step.peak_bytes / planning.GIB, plan.need / planning.GIB
    stop, signal = f"{plan.stop_seconds:.1f} s", f"--signal=B:USR1@{plan.grace}"
    rows = f"rows of data.cutoff={plan.config.data.cutoff} tokens"
    if gpu and tensors > gpu.gib:
        raise UserError(
            f"the run's tensors alone, with {rows}, need {tensors:.1f} GiB a GPU, {gpu.name} has"
            f" {gpu.gib:g}: see scalepeft plan ... --gpu {gpu.name} for what to change, or add"
            " --no-plan"
        )
    late = f"--signal={header.get('--signal')} comes {warning} s before the time limit"
    if warning is not None and warning < plan.stop_seconds:
        what = f"{late}, a step and a save alone take {stop} ({plan.basis}, {rows})"
        raise UserError(f"{what}; write {signal}, or add --no-plan")
    times = f"{stop} for a step and a save, grace period {plan.grace} s"
    room = f"{plan.config.adapter.name}: {need:.1f} GiB a GPU at the peak"
    say(f"plan: {room}, {times} ({plan.basis}; see scalepeft plan)")
    if gpu and not plan.fits:
        say(
            f"plan: tight: {tensors:.1f} GiB of tensors fit {gpu.name} ({gpu.gib:g} GiB), with"
            f" CUDA, NCCL and the allocator {need:.1f} GiB do not (scalepeft plan)"
        )
    if warning is not None and warning < plan.grace:
        say(f"plan: {late}; {signal} leaves {planning.SAFETY:g} times what is assumed")


def _texts(configs: list[RunConfig], folder: Path) -> dict[str, str]:
    """The configs as the jobs read them: with the snapshot's extensions."""
    kept = str(folder / "code" / EXTENSIONS)
    return {
        f"configs/{i}.yaml": dump(replace(c, extensions=kept) if c.extensions else c)
        for i, c in enumerate(configs)
    }


def _show(texts: dict[str, str], calls: dict[str, list[str]]) -> None:
    for name, text in texts.items():
        print(f"# ---- {name}\n{text}")
    name, words = next(iter(calls.items()))
    if shutil.which("sbatch"):
        done = sbatch.call(["sbatch", "--test-only", *words], input=texts[f"{name}.sh"])
        last = sbatch.last_line(done.stderr)
        if done.returncode:
            raise UserError(f"sbatch --test-only refuses {name}: {last}")
        say(last)
    else:
        say("no sbatch here, so Slurm has not been asked whether it takes the job")
    say("dry run: nothing was written or queued")


def _snapshot(folder: Path, extensions: str | None) -> None:
    """Copy the code, and the extensions' beside it, into the submission's folder."""
    package = Path(scalepeft.__file__).parent
    copies = {"scalepeft": package} | {name: shipped(name) for name in DATA}
    if extensions:
        parts = (*registry.KINDS.values(), "configs")
        copies |= {f"{EXTENSIONS}/{part}": Path(extensions, part) for part in parts}
    (folder / "configs").mkdir(parents=True)
    for name, source in copies.items():
        if source.is_dir():
            installed = DATA if source == package else ()
            ignored = shutil.ignore_patterns("__pycache__", *installed)
            shutil.copytree(source, folder / "code" / name, ignore=ignored)
    asked = (["rev-parse", "--verify", "HEAD"], ["status", "--short"])  # empty without git
    commit = [sbatch.call(["git", "-C", str(package.parent), *words]).stdout for words in asked]
    write_atomically(folder / "code" / "COMMIT", "".join(commit))


def _queue(folder: Path, calls: dict[str, list[str]], after: str) -> None:
    parent = ""
    for name, options in calls.items():
        chain = [f"--dependency={after}:{parent}", "--kill-on-invalid-dep=yes"] if parent else []
        words = ["sbatch", "--parsable", *options, *chain, f"{folder}/{name}.sh"]
        try:
            done = sbatch.call(words)
        except FileNotFoundError:
            raise UserError(f"no sbatch on this machine; {words[-1]} is ready") from None
        if done.returncode:
            raise UserError(
                f"sbatch refuses {words[-1]}: {sbatch.last_line(done.stderr)}"
                + (f"; job {parent} is queued (scancel {parent} takes it back)" if parent else "")
            )
        parent = done.stdout.strip().split(";")[0]
        print(f"{name}: job {parent}  {shlex.join(words)}", flush=True)
        write_atomically(folder / f"{name}.job", f"{parent}\n")
    print(f"log and job files: {folder}\nscalepeft status {folder.parent.parent}")
