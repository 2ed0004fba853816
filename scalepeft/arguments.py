"""Arguments of the command line: what each command takes, and its help."""

import argparse
import importlib
import sys
from typing import Any, NoReturn

from scalepeft import __version__
from scalepeft.core import options
from scalepeft.core.log import say
from scalepeft.core.preemption import USER_ERROR
from scalepeft.core.text import one_line, plain

STAGES = ("prepare", "train", "merge", "evaluate", "report")
STOPPABLE = {"train", "evaluate", "pipeline", "compare"}
"""Commands that a signal stops in order: saved, exit code 75."""
EPILOG = """\
exit codes: 0 finished; 75 stopped by SIGTERM, SIGINT or SIGUSR1 and saved, run again to continue;
            2 a mistake in the call, config or data (one line says which); 1 a bug, a broken machine
            merge, export, methods and bench end with 130 when they are interrupted
"""
TRAIN = """\
Trains an adapter. On a folder that holds a run it resumes at the newest checkpoint that verifies.
SECTION=NAME takes a whole file of configs/, SECTION.KEY=VALUE sets one key; the last one wins.

  scalepeft train configs/runs/commonsense_hoft.yaml model.path=DIR_OR_HUB_ID data.train=FILES
  scalepeft train model=tiny data=toy adapter.rank=8 train.max_steps=50 run_dir=runs/try
"""
REPORT = """\
Prints a table and writes report.html (one file, no network), report.md and its plot in report/:
into RUN_DIR, for several runs into ./report, or where --out says. Of one run RUN_DIR/loss.png too.
"""
MERGE = """\
Writes OUT, tensor by tensor: no more memory than the largest tensor needs. A method that adds a
bias gives the model one where its architecture has a switch for it. Prints the error of the merged
model's logits against the adapted model's.
"""
PIPELINE = """\
Does the stages prepare, train, merge, evaluate and report of a run in RUN_DIR. What is done for the
same inputs is passed over, what was stopped or killed goes on where it was, what depends on a
changed input is done again (the old results are moved to RUN_DIR/replaced-N).

  scalepeft pipeline configs/runs/commonsense_hoft.yaml data.train=FILES data.test=FILES
"""
SCORE = """\
Scores predictions with the code that evaluate uses: line by line, or by id where objects have one.

  scalepeft score --task math --predictions out.txt --references gsm8k/test.jsonl
  scalepeft score --task translation --predictions system.en --references ref.en \\
      data.source_language=de data.target_language=en
"""
EXPORT = """\
--format peft   the same method in HF PEFT's layout, for the methods that PEFT has
--format lora   a LoRA that is exactly the adapter (hoft: of rank 2r), for any LoRA server
"""
PUSH = """\
Uploads the adapter in PEFT's layout with a model card of the run: base, method, settings, data,
steps, scores with intervals, versions. REPO is made where it is not there.

  scalepeft push runs/x ORG/NAME --private --license apache-2.0 --base-model ORG/BASE
"""
GENERATE = """\
Without --prompt and --file each line of standard input is a prompt. Ctrl-C ends an answer.

  scalepeft generate runs/x --prompt "Is 7 even?" evaluate.max_new_tokens=200
"""
BENCH = """\
Times forward, backward and optimizer of every method, of HF PEFT's and of the frozen base alone,
taking turns in one process.

  scalepeft bench model --shape small --tokens 2048 --out bench
  scalepeft bench model --shape llama-8b-block --quant nf4 --methods hoft,goft,peft-boft

bench gpu tries a machine with one GPU: exact bytes and gradients, training of an 8B shape against
the plan, kills and resumes. It takes --out (gpu-bench), --seconds, --only and --tiny alone, writes
gpu.json after each section and gpu.md, and ends with 1 if something is a fault.

bench train runs settings of train beside transformers' Trainer with PEFT and TRL's SFTTrainer, on
the same rows, each in a process of its own, in --repeats turns (3): tokens a second, start-up,
peak memory, losses. Speed, not learning: the rate is 1e-8. It ends with 1 if one failed, or did
other work.

  scalepeft bench train data=math data.train=FILE model.path=DIR adapter=lora train.max_steps=20
"""
COMPARE = """\
Trains every method on the same rows, batches and budget: a sweep of rates of equal size under one
seed, then fresh seeds at each method's best rate. Writes compare.json and .md into OUT: mean
held-out loss with 95 % intervals, difference to the reference under the same seeds, parameters,
time, memory. Each cell is an ordinary run in OUT/cells; what is done is never run again.
scalepeft compare --out OUT goes on with what is there, or prints it again.
"""
DATA = """\
Reads and tokenizes the rows of a run as its training does, prints their numbers (rows, tokens, what
is learned, lengths, what the cutoff and padding take), and the first rows as the model sees them.
Look at them before every new data set: the template, the control tokens, what is green.

  scalepeft data configs/runs/math_shoft.yaml model.path=DIR data.train=FILE --show 3
"""
DOCTOR = """\
Tries what a run needs, in one process or on every rank of a job, and exits with 0, or with 1 and
the list of what to fix: versions, devices, links between the ranks, bytes through an all-gather,
the base, and the file system of the run folder. Trains nothing and leaves nothing behind.

  scalepeft doctor configs/runs/commonsense_hoft.yaml model.path=DIR run_dir=runs/x
  SCALEPEFT_COMMAND=doctor sbatch slurm/hoft_llama70b.sh        the job's own nodes and settings

--against-transformers compares loss and logits of a base, loaded as a training does, with stock
transformers'; it needs model.path alone, and exits with 1 if they differ, with 2 if it is refused.
"""
FETCH = """\
Brings what a run takes from the hub (model, tokenizer, hf:// rows; not COMET's model) into a folder
that is its HF_HOME where there is no network, and lists each file with its sha256. Interrupted, the
same command goes on. --check FOLDER reads every byte again and ends with 1 if something is wrong.
"""
PLAN = """\
What a training needs, from its config alone: memory of a rank by kind, bytes read, collectives,
checkpoint, and the grace period for Slurm's --signal; the smallest number of GPUs that fits, and
what to change if it does not.

  scalepeft plan CONFIG model=llama-3.1-70b engine=fsdp2 --nodes 2 --gpus-per-node 8 --gpu H100
"""
SUBMIT = """\
Checks config, data and run folder, plans the run (does it fit, does --signal leave time to save),
keeps the code and the resolved config in RUN_DIR/submissions, and queues JOB_FILE with sbatch.
JOB_FILE itself is run as far as slurm/train.sh, to learn its settings: keep slow lines out of it.

  launch/submit slurm/hoft_llama70b.sh model.path=DIR --sbatch time=12:00:00
"""
INIT = """\
Copies a recipe into FOLDER (default: this one) as RECIPE.yaml and RECIPE.sh, its job on Slurm;
--site writes the job for a cluster: GPUs a node, network, caches. Overwrites nothing of yours.

  scalepeft init                                            the toy recipe, for any machine
  scalepeft init runs70b --recipe commonsense_hoft_llama-3.1-70b --site perlmutter
"""
VERIFY = """\
Reads every byte of a run's or a pipeline's folder (checkpoints, adapter, merged checkpoint, rows of
predictions, what each stage made), its cached tokens and its base where they are here, and prints a
line for each: whole, damaged, or stale (made from what has changed since). Changes nothing; ends
with 1 if something is damaged or stale. Resume, evaluate and pipeline judge by the same functions.
"""
BENCH_FLAGS = "shape methods rank tokens precision quant device repeats".split()
FLAGS_OF = {"model": BENCH_FLAGS, "gpu": "seconds only tiny".split(), "train": ["repeats"]}
# Command -> its line in the list of all, and the text above its own arguments.
COMMANDS: dict[str, tuple[str, str | None]] = {
    "init": ("a recipe's config and job file, to be edited", INIT),
    "train": ("train an adapter, or resume", TRAIN),
    "evaluate": ("generate answers for data.test and score them", None),
    "generate": ("try prompts on a run, with the template that it was trained with", GENERATE),
    "pipeline": ("prepare, train, merge, evaluate, report: each once, resumable", PIPELINE),
    "compare": ("train methods against each other, over rates and seeds", COMPARE),
    "score": ("score any system's output files; needs no model", SCORE),
    "report": ("scores, curves and examples of one run, or of several compared", REPORT),
    "merge": ("write base and adapter as one checkpoint that stock transformers loads", MERGE),
    "export": ("write the adapter for HF PEFT, or as a plain LoRA", EXPORT),
    "push": ("put a run's adapter and a model card on the hub", PUSH),
    "methods": ("all methods: size, cost, exports, papers", None),
    "bench": ("methods against HF PEFT, trainings against HF and TRL", BENCH),
    "config": ("print the resolved settings, or every key", None),
    "data": ("rows in numbers, and as the model sees them", DATA),
    "doctor": ("try what a run needs, here or on every rank", DOCTOR),
    "fetch": ("bring what a run takes from the hub, for nodes without a network", FETCH),
    "plan": ("memory, traffic, times and grace period of a training, before it queues", PLAN),
    "submit": ("queue a job file of slurm/ (launch/submit)", SUBMIT),
    "verify": ("whether a run's folder is whole, every byte of it", VERIFY),
    "status": ("how runs stand (launch/status)", None),
}


class Parser(argparse.ArgumentParser):
    """One line for a mistake in the call, and no usage text."""

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        say(f"error: {message}; see {self.prog} --help")
        sys.exit(USER_ERROR)


# Command -> (module of its ``Options``, positional ones, ones that are no argument).
DECLARED = {
    "compare": ("analysis.compare.options", [], []),
    "score": ("eval.score_options", [], []),
    "bench": ("analysis.bench.options", ["what"], []),
    "plan": ("cluster.plan.gpus", [], ["disk", "network"]),
    "submit": ("cluster.sbatch", ["job_file"], []),
}


def _written_here(commands: dict[str, Parser]) -> None:
    def add(names: str, flags: str, help: str, **words: Any) -> None:
        shown = [word for word in flags.split() if word.isupper()]  # in the help, for the value
        words |= {"metavar": shown[0]} if shown else {}
        given = [word for word in flags.split() if word not in shown]
        for name in names.split():
            commands[name].add_argument(*given, help=help, **words)

    flag: dict[str, Any] = {"action": "store_true"}
    add(" ".join(COMMANDS), "--debug", "show the traceback of a user error too", **flag)
    add("methods doctor plan verify status", "--json", "JSON in place of text", **flag)
    add("init", "folder FOLDER", "made where it is not there", nargs="?", default=".")
    add("init", "--recipe NAME", "by name (toy)", default="toy")
    add("init", "--site NAME", "by name, or a YAML of yours (docs/sites.md)")
    add("init", "--list", "the recipes and sites there are", dest="listed", **flag)
    add("report status", "run_dirs RUN_DIR", "a run, or (status) a sweep", nargs="+")
    add("evaluate generate merge export push", "run_dir", "a finished run, or an adapter of PEFT's")
    add("push", "repo", "ORG/NAME on the hub")
    add("push", "--private", "make it so that only you and ORG see it", **flag)
    add("push", "--license", "for the card, as the hub names it: apache-2.0, llama3.1")
    add("push", "--base-model", "the base on the hub, where the run's is a folder", dest="base")
    add("verify", "run_dir", "of a run or a pipeline")
    add("merge export", "out", "folder to write; must not exist")
    for names, metavar, help in (
        ("train pipeline config", "[CONFIG] KEY=VALUE", "a YAML file, then settings"),
        ("doctor plan data fetch", "[CONFIG] KEY=VALUE", "of the run, as for train"),
        ("bench", "[CONFIG] KEY=VALUE", "train: of the run, as for scalepeft train"),
        ("evaluate generate", "KEY=VALUE", "e.g. data.test=FILES evaluate.limit=100"),
        ("merge export", "model.path=FOLDER", "where the base is now"),
    ):
        add(names, "settings", help, nargs="*", metavar=metavar)
    add("data", "--show ROWS", "so many rows, what is learned in colour (3)", type=int, default=3)
    add("train", "--resume-with-changes", "continue although harmless keys differ", **flag)
    add("generate", "--raw", "without the template of the run's rows", **flag)
    add("pipeline", "--from", "do this one and those after it again", dest="first", choices=STAGES)
    add("fetch", "--out FOLDER", "fetch into FOLDER instead of HF_HOME")
    add("fetch", "--check FOLDER", "read what is in FOLDER (HF_HOME) again", nargs="?", const="")
    add("report", "--out FOLDER", "where the report goes")
    theirs = "one run's figures, as HF PEFT's method_comparison has them"
    add("report", "--peft-result FILE", theirs, dest="peft")
    weights: dict[str, Any] = {"dest": "base", "choices": ("original", "dequantized")}
    what = "merge into the weights of the files, or into what the adapter saw in training"
    add("merge", "--base-weights --base", what, default="original", **weights)
    dtypes = ("base", "fp32", "bf16")
    add("merge", "--dtype", "of the merged weights", choices=dtypes, default="base")
    add("export", "--format", "see above", choices=("peft", "lora"), required=True)
    add("methods", "--model", "a shape by name, or a model folder", default="llama-3.1-8b")
    add("bench", "--seconds", "gpu: for all sections together (500)", type=float)
    add("bench", "--only A,B", "gpu: these sections alone, e.g. env,quant")
    add("bench", "--tiny", "gpu: seconds, on any CPU", action="store_const", const=True)
    add("config", "--reference SECTION", "every key, of a section or all", nargs="?", const="")
    what = "our model of model.path against transformers' own: this alone, in one process"
    add("doctor", "--against-transformers", what, **flag)
    add("doctor", "--run-dir", "folder to look at (default: the config's, or this one)")
    add("doctor", "--timeout SECONDS", "for ranks and each check (120)", type=float)
    add("plan", "--disk-gbps GB/S", "of the run folder's disk (1.0)", type=float, default=1.0)
    kind: dict[str, Any] = {"dest": "kind", "action": "store_const", "default": "adapter"}
    for name in ("evaluate", "generate"):
        which = commands[name].add_mutually_exclusive_group()
        which.add_argument("--base", **kind, const="base", help="the base without the adapter")
        which.add_argument("--merged", **kind, const="merged", help="RUN_DIR/merged")
    which = commands["generate"].add_mutually_exclusive_group()
    which.add_argument("--prompt", help="a single prompt", metavar="TEXT")
    which.add_argument("--file", help="text with a prompt a line")
    which = commands["pipeline"].add_mutually_exclusive_group()
    which.add_argument("--stage", choices=STAGES, help="this one alone; those before it are done")
    which.add_argument("--until", choices=STAGES, help="end after this one")


def parse(argv: list[str], doc: str | None) -> argparse.Namespace:
    """Parse; flags may stand anywhere between settings, which argparse alone does not allow."""
    look: dict[str, Any] = {
        "epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter,
    }  # fmt: skip
    made = Parser("scalepeft", description=doc, **look)
    made.add_argument("--version", action="version", version=f"scalepeft {__version__}")
    adding = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {
        name: adding.add_parser(name, help=help, description=text, **look)
        for name, (help, text) in COMMANDS.items()
    }
    for name in {*argv[:1]} & DECLARED.keys():
        module, positional, without = DECLARED[name]
        declared = importlib.import_module(f"scalepeft.{module}").Options
        options.add_arguments(commands[name], declared, positional, without)
    commands["bench"].set_defaults(**dict.fromkeys(BENCH_FLAGS))  # None: not given
    _written_here(commands)
    args, left = made.parse_known_args(argv)
    command = commands[args.command]
    places = [getattr(args, name, None) for name in ("run_dir", "out", "job_file", "folder")]
    if wrong := [p for p in (*getattr(args, "run_dirs", ()), *places) if p and not plain(p)]:
        command.error(f"{one_line(wrong[0], 100)}: a name with control characters, or not UTF-8")
    settings = [a for a in left if "=" in a and not a.startswith("-")]
    if len(settings) != len(left) or (settings and not hasattr(args, "settings")):
        command.error(f"unrecognized arguments: {' '.join(left)}")
    if settings:
        args.settings = [*args.settings, *settings]
    for name in ("run_dir", "out") if args.command in ("merge", "export") else ():
        if "=" in getattr(args, name):
            command.error(f"{name.upper()}={getattr(args, name)}: RUN_DIR and OUT come first")
    if args.command == "bench":
        others = [n for n in (*BENCH_FLAGS, *FLAGS_OF["gpu"]) if n not in FLAGS_OF[args.what]]
        wrong = [f"--{name}" for name in others if getattr(args, name) is not None]
        if wrong := [*wrong, *(args.settings if args.what != "train" else ())]:
            command.error(f"{wrong[0]} is not an option of bench {args.what}")
    return args
