"""Arguments of the command line: what each command takes, and its help."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from scalepeft import __version__
from scalepeft.core import options
from scalepeft.core.log import say
from scalepeft.core.preemption import USER_ERROR

STAGES = ("prepare", "train", "merge", "evaluate", "report")
STOPPABLE = {"train", "evaluate", "pipeline", "compare"}
"""Commands that a signal stops in order: saved, exit code 75."""
EPILOG = """\
exit codes: 0 finished; 75 stopped by SIGTERM, SIGINT or SIGUSR1 and saved, run again to continue;
            2 a mistake in the call, config or data (one line says which); 1 a bug, a broken machine
            merge, export, methods and bench end with 130 when they are interrupted
"""
BENCH_FLAGS = "shape methods rank tokens precision quant device repeats".split()
GPU_FLAGS = "seconds only tiny".split()


class Parser(argparse.ArgumentParser):
    """One line for a mistake in the call, and no usage text."""

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        say(f"error: {message}; see {self.prog} --help")
        sys.exit(USER_ERROR)


# Command -> (module of its ``Options``, positional ones, ones that are no argument).
DECLARED = {
    "compare": ("analysis.compare.command", [], []),
    "score": ("eval.score_files", [], []),
    "bench": ("analysis.bench.command", ["what"], []),
    "plan": ("cluster.plan.planning", [], ["disk", "network"]),
    "submit": ("cluster.submit", ["job_file"], []),
}


# Command -> its ``line`` in the list of all, and the ``text`` above its own arguments.
COMMANDS = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text(encoding="utf-8"))


def _written_here(commands: dict[str, Parser]) -> None:
    """Give the commands their other arguments."""

    def add(names: str, flag: str, help: str, **words: Any) -> None:
        for name in names.split():
            commands[name].add_argument(*flag.split(), help=help, **words)

    flag: dict[str, Any] = {"action": "store_true"}
    add(" ".join(COMMANDS), "--debug", "show the traceback of a user error too", **flag)
    add("methods doctor plan status", "--json", "JSON in place of text", **flag)
    add("report status", "run_dirs", "a run, or (status) a sweep", nargs="+", metavar="RUN_DIR")
    add("evaluate merge export", "run_dir", "folder of a finished run")
    add("merge export", "out", "folder to write; must not exist")
    for names, metavar, help in (
        ("train pipeline config", "[CONFIG] KEY=VALUE", "a YAML file, then settings"),
        ("doctor plan", "[CONFIG] KEY=VALUE", "of the run, as for train"),
        ("evaluate", "KEY=VALUE", "e.g. data.test=FILES evaluate.limit=100"),
        ("merge export", "model.path=FOLDER", "where the base is now"),
    ):
        add(names, "settings", help, nargs="*", metavar=metavar)
    add("train", "--resume-with-changes", "continue although harmless keys differ", **flag)
    kind: dict[str, Any] = {"dest": "kind", "action": "store_const", "default": "adapter"}
    which = commands["evaluate"].add_mutually_exclusive_group()
    which.add_argument("--base", **kind, const="base", help="score the base without the adapter")
    which.add_argument("--merged", **kind, const="merged", help="score RUN_DIR/merged")
    which = commands["pipeline"].add_mutually_exclusive_group()
    which.add_argument("--stage", choices=STAGES, help="this one alone; those before it are done")
    which.add_argument("--until", choices=STAGES, help="end after this one")
    add("pipeline", "--from", "do this one and those after it again", dest="first", choices=STAGES)
    add("report", "--out", "where the report goes", metavar="FOLDER")
    weights: dict[str, Any] = {"dest": "base", "choices": ("original", "dequantized")}
    what = "merge into the weights of the files, or into what the adapter saw in training"
    add("merge", "--base-weights --base", what, default="original", **weights)
    dtypes = ("base", "fp32", "bf16")
    add("merge", "--dtype", "of the merged weights", choices=dtypes, default="base")
    add("export", "--format", "see above", choices=("peft", "lora"), required=True)
    add("methods", "--model", "a shape by name, or a model folder", default="llama-3.1-8b")
    add("bench", "--seconds", "gpu: for all sections together (500)", type=float)
    add("bench", "--only", "gpu: these sections alone, e.g. env,quant", metavar="A,B")
    add("bench", "--tiny", "gpu: seconds, on any CPU", action="store_const", const=True)
    section: dict[str, Any] = {"nargs": "?", "const": "", "metavar": "SECTION"}
    add("config", "--reference", "every key, of a section or all", **section)
    what = "our model of model.path against transformers' own: this alone, in one process"
    add("doctor", "--against-transformers", what, **flag)
    add("doctor", "--run-dir", "folder to look at (default: the config's, or this one)")
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    add("doctor", "--timeout", "for ranks and each check (120)", **seconds)
    speed: dict[str, Any] = {"type": float, "default": 1.0, "metavar": "GB/S"}
    add("plan", "--disk-gbps", "of the run folder's disk (1.0)", **speed)


def parse(argv: list[str], doc: str | None) -> argparse.Namespace:
    """Parse; flags may stand anywhere between settings, which argparse alone does not allow."""
    look: dict[str, Any] = {
        "epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter,
    }  # fmt: skip
    made = Parser("scalepeft", description=doc, **look)
    made.add_argument("--version", action="version", version=f"scalepeft {__version__}")
    adding = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {
        name: adding.add_parser(name, help=told["line"], description=told.get("text"), **look)
        for name, told in COMMANDS.items()
    }
    for name in {*argv[:1]} & DECLARED.keys():  # of no other: importing them takes seconds
        module, positional, without = DECLARED[name]
        declared = importlib.import_module(f"scalepeft.{module}").Options
        options.add_arguments(commands[name], declared, positional, without)
    commands["bench"].set_defaults(**dict.fromkeys(BENCH_FLAGS))  # None: not given
    _written_here(commands)
    args, left = made.parse_known_args(argv)
    command = commands[args.command]
    settings = [a for a in left if "=" in a and not a.startswith("-")]
    if len(settings) != len(left) or (settings and not hasattr(args, "settings")):
        command.error(f"unrecognized arguments: {' '.join(left)}")
    if settings:
        args.settings = [*args.settings, *settings]
    for name in ("run_dir", "out") if args.command in ("merge", "export") else ():
        if "=" in getattr(args, name):
            command.error(f"{name.upper()}={getattr(args, name)}: RUN_DIR and OUT come first")
    if args.command == "bench":
        for name in GPU_FLAGS if args.what != "gpu" else BENCH_FLAGS:
            if getattr(args, name) is not None:
                command.error(f"--{name} is not an option of bench {args.what}")
    return args
