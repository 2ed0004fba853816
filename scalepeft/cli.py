"""The command line. Exit codes: 0 finished, 75 stopped by a signal and saved, 2 the user's mistake,
1 a bug.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from scalepeft import arguments
from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED, USER_ERROR, StopFlag

if TYPE_CHECKING:  # its module imports torch
    from scalepeft.config.schema import RunConfig, Subject

INTERRUPTED = 130  # as the shell reports a death by Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    args = arguments.parse(argv, __doc__)
    # Before torch is imported: from here on a signal means "stop in order".
    stop = StopFlag()
    stoppable = args.command in ("train", "evaluate", "pipeline", "compare")
    if stoppable:
        stop.install()
    else:  # TERM as Ctrl-C, so that what is half written goes
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(args, stop)
    except KeyboardInterrupt:
        print("scalepeft: interrupted; no partial files left", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = _explain(error, args.debug)
    finally:
        if stoppable:
            stop.release()
        else:
            signal.signal(signal.SIGTERM, before)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        # Other ranks may be gone: an orderly shutdown of the process group could wait for them
        # forever.
        sys.stdout.flush()
        sys.stderr.flush()
        if code == USER_ERROR:
            time.sleep(1)  # all ranks come here: the slower ones still read what was agreed
        os._exit(code)
    return code


def _run(args: argparse.Namespace, stop: StopFlag) -> int:
    # Each command's module is imported here, after the signals are taken over.
    on_ranks = {
        "train": _train, "pipeline": _pipeline, "evaluate": _evaluate, "compare": _compare,
    }  # fmt: skip
    if args.command in on_ranks:
        return on_ranks[args.command](args, stop)
    if args.command in ("doctor", "plan", "submit", "status"):
        return _cluster(args)
    return _results(args)


def _load(args: argparse.Namespace) -> "RunConfig":
    from scalepeft.config import files

    config, notes = files.load(*files._config_first(args.settings))
    for note in notes if rank() == 0 else ():
        say(note)
    return config


def _train(args: argparse.Namespace, stop: StopFlag) -> int:
    config = _load(args)
    from scalepeft import train

    return train.run(config, stop, args.resume_with_changes)


def _pipeline(args: argparse.Namespace, stop: StopFlag) -> int:
    config = _load(args)
    from scalepeft import pipeline

    return pipeline.run(config, pipeline.Options(args.first, args.until, args.stage), stop)


def _evaluate(args: argparse.Namespace, stop: StopFlag) -> int:
    from scalepeft.eval import evaluate

    kind: Subject = "base" if args.base else "merged" if args.merged else "adapter"
    return evaluate.run(args.run_dir, args.settings, kind, stop)


def _compare(args: argparse.Namespace, stop: StopFlag) -> int:
    from scalepeft.analysis.compare import command

    return command.run(command.Options.of(_values(args)), stop)


def _results(args: argparse.Namespace) -> int:
    if args.command == "score":
        from scalepeft.eval import score_files

        score_files.run(score_files.Options(**_values(args)))
    elif args.command == "report":
        from scalepeft.analysis.report import command as report

        report.run(args.run_dirs, args.out)
    elif args.command == "merge":
        from scalepeft.export import merge

        merge.run(args.run_dir, args.out, args.settings, args.base, args.dtype)
    elif args.command == "export":
        from scalepeft.export import peft

        peft.run(args.run_dir, args.out, args.settings, args.format)
    elif args.command == "config":
        from scalepeft.config import command as config

        config.run(args.settings, args.reference)
    elif args.command == "methods":
        from scalepeft.analysis import methods

        methods.run(args.model, args.json)
    elif args.what == "gpu":
        from scalepeft.analysis.bench.gpu import command as gpu

        return gpu.run(args.out, args.seconds, args.only, args.tiny)
    else:
        from scalepeft.analysis.bench import command as bench

        bench.run(bench.Options.of(args))
    return FINISHED


def _cluster(args: argparse.Namespace) -> int:
    if args.command == "doctor":
        from scalepeft.cluster.doctor import command as doctor

        return doctor.run(args.settings, args.run_dir, args.timeout, args.json)
    if args.command == "plan":
        from scalepeft.cluster.plan import command as plan

        options = plan.Options(
            nodes=args.nodes, gpus_per_node=args.gpus_per_node, gpu=args.gpu, memory=args.memory,
            disk=args.disk_gbps * 1e9, step_seconds=args.step_seconds,
        )  # fmt: skip
        plan.run(args.settings, options, args.json, args.plot)
    elif args.command == "submit":
        from scalepeft.cluster import submit

        submit.run(submit.Options(**_values(args)))
    else:
        from scalepeft.cluster import status

        status.run(args.run_dirs, args.json)
    return FINISHED


def _values(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k not in ("command", "debug")}


def _explain(error: Exception, debug: bool) -> int:
    from scalepeft.core.errors import UserError
    from scalepeft.run.lease import Superseded

    if isinstance(error, Superseded):
        print(f"scalepeft: stopped: {error}", file=sys.stderr)
        return BROKEN
    if not isinstance(error, UserError):
        traceback.print_exc()
        print(
            f"scalepeft: failed on rank {rank()}: {type(error).__name__}: {error}", file=sys.stderr
        )
        return BROKEN
    if debug:
        traceback.print_exc()
    # User errors are agreed between the ranks, so one line is enough.
    if rank() == 0:
        print(f"scalepeft: error: {' '.join(str(error).split())}", file=sys.stderr)
    return USER_ERROR
