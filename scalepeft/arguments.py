"""Arguments of the command line: what each command takes, and its help."""

import argparse
import sys
from typing import Any, NoReturn

from scalepeft import __version__
from scalepeft.core.preemption import USER_ERROR

EPILOG = """\
exit codes: 0 finished; 75 stopped by SIGTERM, SIGINT or SIGUSR1 and saved, run again to continue;
            2 a mistake in the call, config or data (one line says which); 1 a bug, a broken machine
            merge, export, methods and bench end with 130 when they are interrupted
"""
TRAIN = """\
Trains an adapter. On a folder that holds a run it resumes at the newest checkpoint that verifies.

  scalepeft train configs/runs/commonsense_hoft.yaml model.path=DIR_OR_HUB_ID data.train=FILES
  scalepeft train model=tiny data=toy adapter.rank=8 train.max_steps=50 run_dir=runs/try
  torchrun --nproc-per-node 8 -m scalepeft train CONFIG engine.name=fsdp2

SECTION=NAME takes a whole file of configs/, SECTION.KEY=VALUE sets one key; the last one wins.
"""


REPORT = """\
Prints a table and writes report.html (one file, no network), report.md and its plots in report/:
into RUN_DIR, for several runs into ./report, or where --out says. Of one run RUN_DIR/loss.png too.

  scalepeft report runs/commonsense_hoft
  scalepeft report runs/hoft runs/lora runs/dora --out comparison
"""
MERGE = """\
Writes OUT, tensor by tensor: no more memory than the largest tensor needs. A method that adds a
bias gives the model one where its architecture has a switch for it. Prints the error of the merged
model's logits against the adapted model's.

  scalepeft merge runs/commonsense_hoft merged --base original
"""
STAGES = ("prepare", "train", "merge", "evaluate", "report")
PIPELINE = """\
Does the stages prepare, train, merge, evaluate and report of a run in RUN_DIR. What is done for the
same inputs is passed over, what was stopped or killed goes on where it was, what depends on a
changed input is done again (the old results are moved to RUN_DIR/replaced-N).

  scalepeft pipeline configs/runs/commonsense_hoft.yaml data.train=FILES data.test=FILES
  launch/local.sh 8 pipeline CONFIG engine=fsdp2 ...        on the GPUs of one machine
  launch/submit slurm/hoft_llama70b.sh ... --pipeline       a chain of jobs, a stage each
"""
SCORE = """\
Scores predictions with the code that evaluate uses: line by line, or by id where objects have one.

  scalepeft score --task commonsense --predictions out.jsonl --references ARC-Easy/test.json
  scalepeft score --task math --predictions out.txt --references gsm8k/test.jsonl
  scalepeft score --task translation --predictions system.en --references ref.en \\
      data.source_language=de data.target_language=en
"""
EXPORT = """\
--format peft   the same method in HF PEFT's layout, for the methods that PEFT has
--format lora   a LoRA that is exactly the adapter (hoft: of rank 2r), for any LoRA server
"""
BENCH = """\
Times forward, backward and optimiser of every method, of HF PEFT's and of the frozen base alone,
taking turns in one process, and counts bytes saved for backward and peak memory.

  scalepeft bench model --shape small --tokens 2048 --out bench
  scalepeft bench layer --shape llama-8b-block --precision bf16 --quant nf4 --methods hoft,goft

bench gpu tries a machine with one GPU: exact bytes and gradients, training of an 8B shape against
the plan, kills and resumes. It takes --out (gpu-bench), --seconds, --only and --tiny alone, writes
gpu.json after each section and gpu.md, and ends with 1 if something is a fault.

  scalepeft bench gpu --seconds 500 --out gpu-bench
"""
BENCH_FLAGS = "shape methods rank tokens precision quant device repeats".split()
GPU_FLAGS = "seconds only tiny".split()
COMPARE = """\
Trains every method on the same rows, batches and budget: a sweep of rates of equal size under one
seed, then fresh seeds at each method's best rate. Writes compare.json, .md and .png into OUT: mean
held-out loss with 95 % intervals, difference to the reference under the same seeds, parameters,
time, memory. Each cell is an ordinary run in OUT/cells; what is done is never run again.

  scalepeft compare CONFIG model.path=DIR data.train=FILES --methods hoft,shoft,lora --out OUT
  scalepeft compare CONFIG ... --budget steps --lrs 1e-4,3e-4,1e-3 --seeds 5 --out OUT
  scalepeft compare --out OUT            goes on with what is there, or prints it again
"""
DOCTOR = """\
Tries what a run needs, in one process or on every rank of a job, and exits with 0, or with 1 and
the list of what to fix: versions, devices, links between the ranks, bytes through an all-gather,
the base, and the file system of the run folder. Trains nothing and leaves nothing behind.

  scalepeft doctor configs/runs/commonsense_hoft.yaml model.path=DIR run_dir=runs/x
  srun python -m scalepeft doctor CONFIG engine=fsdp2 KEY=VALUE ...
  SCALEPEFT_COMMAND=doctor sbatch slurm/hoft_llama70b.sh        the job's own nodes and settings
"""
PLAN = """\
What a training needs, from its config alone: memory of a rank by kind, bytes read, collectives,
checkpoint, and the grace period for Slurm's --signal; the smallest number of GPUs that fits, and
what to change if it does not. CONFIG and settings are those of scalepeft train.

  scalepeft plan configs/runs/commonsense_hoft.yaml model=llama-3.1-70b engine=fsdp2 \\
      --nodes 2 --gpus-per-node 8 --gpu H100 --plot plan.png
"""
SUBMIT = """\
Checks config, data and run folder, plans the run (does it fit, does --signal leave time to save),
keeps the code and the resolved config in RUN_DIR/submissions, and queues JOB_FILE with sbatch. What
follows JOB_FILE is laid over its settings.

  launch/submit slurm/hoft_llama70b.sh model.path=DIR --sbatch time=12:00:00
  launch/submit slurm/hoft_llama70b.sh --sweep train.lr=1e-4,3e-4 --throttle 1 --dry-run
  launch/submit slurm/hoft_llama70b.sh data.test=FILES --then evaluate
  launch/submit slurm/hoft_llama70b.sh data.test=FILES --pipeline --cpu-sbatch partition=cpu
  launch/submit slurm/hoft_llama70b.sh run_dir=runs/all --compare methods=hoft,lora,goft

JOB_FILE itself is run as far as slurm/train.sh, to learn its settings: keep slow lines out of it.
"""


class Parser(argparse.ArgumentParser):
    """One line for a mistake in the call, and no usage text."""

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        print(f"scalepeft: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(USER_ERROR)


def _command(
    commands: Any, name: str, help: str, description: str | None = None, epilog: str | None = None
) -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, epilog=epilog, formatter_class=shape
    )
    command.add_argument(
        "--debug", action="store_true", help="show the traceback of a user error too"
    )
    return command


def _training(commands: Any) -> None:
    train = _command(commands, "train", "train an adapter, or resume", TRAIN, epilog=EPILOG)
    train.add_argument(
        "settings", nargs="*", metavar="[CONFIG] KEY=VALUE", help="a YAML file, then settings"
    )
    train.add_argument(
        "--resume-with-changes",
        action="store_true",
        help="continue although harmless keys differ from the run's config",
    )
    evaluate = _command(
        commands, "evaluate", "generate answers for data.test and score them", epilog=EPILOG
    )
    evaluate.add_argument("run_dir", help="folder of a finished run")
    evaluate.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="e.g. data.test=FILES evaluate.limit=100"
    )
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument(
        "--base", action="store_true", help="score the base model without the adapter"
    )
    which.add_argument(
        "--merged", action="store_true", help="score the checkpoint in RUN_DIR/merged"
    )
    pipeline = _command(
        commands,
        "pipeline",
        "prepare, train, merge, evaluate, report: each once, resumable",
        PIPELINE,
        epilog=EPILOG,
    )
    pipeline.add_argument("settings", nargs="*", metavar="[CONFIG] KEY=VALUE", help="as for train")
    which = pipeline.add_mutually_exclusive_group()
    which.add_argument("--stage", choices=STAGES, help="this one alone; those before it are done")
    which.add_argument("--until", choices=STAGES, help="end after this one")
    pipeline.add_argument(
        "--from", dest="first", choices=STAGES, help="do this one and those after it again"
    )


def _compare(commands: Any) -> None:
    compare = _command(
        commands,
        "compare",
        "train methods against each other, over rates and seeds",
        COMPARE,
        epilog=EPILOG,
    )
    compare.add_argument(
        "settings", nargs="*", metavar="[CONFIG] KEY=VALUE", help="as for train, without an adapter"
    )
    compare.add_argument("--out", required=True, metavar="FOLDER", help="for runs and results")
    compare.add_argument(
        "--methods", metavar="A,B,C", help="files of configs/adapters by name, or YAML files"
    )
    compare.add_argument(
        "--lrs",
        default="x0.3,x1,x3",
        help="rates for all (1e-4,3e-4), or factors on each method's usual one (%(default)s)",
    )
    compare.add_argument("--seeds", type=int, default=3, help="reported runs of each method")
    compare.add_argument(
        "--budget",
        default="parameters",
        help="what is equal: steps, or parameters too (each method at the size nearest to these)",
    )
    compare.add_argument("--reference", default="lora", help="that others are held against")
    compare.add_argument("--rank", type=int, help="of the reference, whose size is the budget (16)")
    compare.add_argument("--parameters", type=int, metavar="N", help="the budget as a number")
    compare.add_argument(
        "--evaluate", action="store_true", help="score data.test too, in the reported runs"
    )
    compare.add_argument("--cell", type=int, metavar="N", help="run this one cell of OUT alone")
    compare.add_argument("--table", action="store_true", help="run nothing; print what there is")


def _results(commands: Any) -> None:
    score = _command(commands, "score", "score any system's output files; needs no model", SCORE)
    score.add_argument("settings", nargs="*", metavar="data.KEY=VALUE", help="e.g. data.protocol=")
    score.add_argument("--task", required=True, help="commonsense, math or translation")
    score.add_argument("--predictions", required=True, metavar="FILE", help="text or json (lines)")
    score.add_argument("--references", required=True, metavar="FILE", help="rows, or text lines")
    score.add_argument("--sources", metavar="FILE", help="source text of a translation")
    score.add_argument("--key", help="of the predictions' objects that holds the text")
    score.add_argument("--out", metavar="FOLDER", help="for scores.json and scored.jsonl")
    score.add_argument("--json", action="store_true", help="print scores.json, not a table")
    report = _command(
        commands, "report", "scores, curves and examples of one run, or of several compared", REPORT
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run")
    report.add_argument("--out", metavar="FOLDER", help="where the report goes")
    merge = _command(
        commands,
        "merge",
        "write base and adapter as one checkpoint that stock transformers loads",
        MERGE,
    )
    export = _command(
        commands, "export", "write the adapter for HF PEFT, or as a plain LoRA", EXPORT
    )
    for command in (merge, export):
        command.add_argument("run_dir", help="folder of a finished run")
        command.add_argument("out", help="folder to write; must not exist")
        command.add_argument(
            "settings", nargs="*", metavar="model.path=FOLDER", help="where the base is now"
        )
    merge.add_argument(
        "--base-weights",
        "--base",
        dest="base",
        choices=("original", "dequantized"),
        default="original",
        help="merge into the weights of the files, or into what the adapter saw in training",
    )
    merge.add_argument(
        "--dtype", choices=("base", "fp32", "bf16"), default="base", help="of the merged weights"
    )
    export.add_argument("--format", choices=("peft", "lora"), required=True)


def _methods(commands: Any) -> None:
    methods = _command(commands, "methods", "all methods: size, cost, exports, papers")
    methods.add_argument(
        "--model", default="llama-3.1-8b", help="a shape by name, or a model folder"
    )
    methods.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    bench = _command(commands, "bench", "methods against HF PEFT in one run", BENCH)
    bench.add_argument("what", choices=("layer", "model", "gpu"))
    bench.add_argument("--shape", help="a shape by name, or a model folder (small)")
    bench.add_argument("--methods", help="names by comma; 'all', the default, for every one")
    bench.add_argument("--rank", type=int, help="of LoRA (16); the others follow its size")
    bench.add_argument("--tokens", type=int, help="a step (2048), in rows of 512 at most")
    bench.add_argument("--precision", choices=("fp32", "bf16"))
    bench.add_argument("--quant", choices=("none", "nf4", "int8"))
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"))
    bench.add_argument("--repeats", type=int, help="timed steps of every method (5)")
    bench.add_argument("--out", help="folder for bench.json and bench.png, or gpu.json and gpu.md")
    bench.add_argument("--seconds", type=float, help="gpu: for all sections together (500)")
    bench.add_argument("--only", metavar="A,B", help="gpu: these sections alone, e.g. env,quant")
    bench.add_argument("--tiny", action="store_const", const=True, help="gpu: seconds, on any CPU")


def _before(commands: Any) -> None:
    config = _command(commands, "config", "print the resolved settings, or every key")
    config.add_argument("settings", nargs="*", metavar="[CONFIG] KEY=VALUE", help="as for train")
    config.add_argument(
        "--reference", nargs="?", const="", metavar="SECTION", help="every key, of a section or all"
    )
    doctor = _command(commands, "doctor", "try what a run needs, here or on every rank", DOCTOR)
    doctor.add_argument(
        "settings", nargs="*", metavar="[CONFIG] KEY=VALUE", help="of the run, as for train"
    )
    doctor.add_argument("--run-dir", help="folder to look at (default: the config's, or this one)")
    doctor.add_argument(
        "--timeout", type=float, default=120, metavar="SECONDS", help="for ranks and each check"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    plan = _command(
        commands,
        "plan",
        "memory, traffic, times and grace period of a training, before it queues",
        PLAN,
    )
    plan.add_argument("settings", nargs="*", metavar="[CONFIG] KEY=VALUE", help="as for train")
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--gpus-per-node", type=int, default=1, help="one rank each")
    plan.add_argument(
        "--gpu", help="A100-40, A100-80, L40S, H100, H200, B200, or nvidia-smi's name of one"
    )
    plan.add_argument("--memory", type=float, metavar="GIB", help="of a GPU, in place of its name")
    plan.add_argument(
        "--disk-gbps", type=float, default=1.0, metavar="GB/S", help="of the run folder's disk"
    )
    plan.add_argument(
        "--step-seconds", type=float, metavar="S", help="measured, in place of the estimate"
    )
    plan.add_argument("--json", action="store_true", help="bytes and seconds, not a table")
    plan.add_argument("--plot", metavar="FILE.png", help="a bar chart of memory by kind")


def _slurm(commands: Any) -> None:
    submit = _command(commands, "submit", "queue a job file of slurm/ (launch/submit)", SUBMIT)
    submit.add_argument("job_file", help="e.g. slurm/hoft_llama70b.sh")
    submit.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="over the job file's")
    submit.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B,C", help="a job array, a run each"
    )
    submit.add_argument("--throttle", type=int, default=0, help="runs of a sweep at a time")
    submit.add_argument(
        "--pipeline", action="store_true", help="a chain of jobs, one for each stage of pipeline"
    )
    submit.add_argument(
        "--cpu-sbatch", action="append", default=[], metavar="OPTION=VALUE",
        help="for the stages of --pipeline that need no GPU, e.g. partition=cpu",
    )  # fmt: skip
    submit.add_argument("--then", choices=("evaluate",), help="a second job, after a success")
    submit.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="over #SBATCH lines"
    )
    submit.add_argument(
        "--compare", action="append", default=[], metavar="OPTION=VALUE",
        help="scalepeft compare in run_dir as job arrays, e.g. methods=hoft,lora",
    )  # fmt: skip
    submit.add_argument("--resume-with-changes", action="store_true", help="as for scalepeft train")
    submit.add_argument("--dry-run", action="store_true", help="print, queue and write nothing")
    submit.add_argument("--gpu", help="as for plan, where the job file does not name its GPUs")
    submit.add_argument(
        "--no-plan", dest="plan", action="store_false", help="do not look whether the run fits"
    )
    status = _command(commands, "status", "how runs stand (launch/status)")
    status.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a run, or a sweep's folder")
    status.add_argument("--json", action="store_true", help="one JSON list")


def parser(doc: str | None) -> Parser:
    """Return the parser of all commands; ``doc`` is the text above them."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser("scalepeft", description=doc, epilog=EPILOG, formatter_class=shape)
    parser.add_argument("--version", action="version", version=f"scalepeft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _training(commands)
    _compare(commands)
    _results(commands)
    _methods(commands)
    _before(commands)
    _slurm(commands)
    return parser


def parse(argv: list[str] | None, doc: str | None) -> argparse.Namespace:
    """Parses; flags may stand anywhere between settings, which argparse alone does not allow."""
    made = parser(doc)
    args, left = made.parse_known_args(argv)
    settings = [a for a in left if "=" in a and not a.startswith("-")]
    if len(settings) != len(left) or (settings and not hasattr(args, "settings")):
        made.error(f"unrecognized arguments: {' '.join(left)}")
    if settings:
        args.settings = [*args.settings, *settings]
    if args.command in ("merge", "export"):
        for name in ("run_dir", "out"):
            if "=" in getattr(args, name):
                made.error(f"{name.upper()}={getattr(args, name)}: RUN_DIR and OUT come first")
    if args.command == "bench":
        for name in GPU_FLAGS if args.what != "gpu" else BENCH_FLAGS:
            if getattr(args, name) is not None:
                made.error(f"--{name} is not an option of bench {args.what}")
    return args
