"""The command line. Exit codes: 0 finished, 75 stopped by a signal and saved, 2 the user's mistake,
1 a bug.
"""

import argparse
import atexit
import dataclasses
import gc
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from errno import EACCES, ELOOP, ENAMETOOLONG, ENOTDIR, EPERM, EROFS
from typing import Any

from scalepeft import arguments
from scalepeft.core.launch import importing, rank
from scalepeft.core.log import keep_speaking, say
from scalepeft.core.preemption import BROKEN, FINISHED, USER_ERROR, StopFlag

INTERRUPTED = 130  # as the shell reports a death by Ctrl-C
REFUSED = (EACCES, ELOOP, ENAMETOOLONG, ENOTDIR, EPERM, EROFS)
"""What the system says of a name, or of rights, that the user has to mend."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    as_process, argv = argv is None, sys.argv[1:] if argv is None else argv
    # The end of a process looks for no garbage, which Triton, where it is loaded, would list.
    atexit.register(lambda: None if "triton" in sys.modules else gc.freeze())
    # Before torch is imported: from here on a signal means "stop in order".
    stop = StopFlag()
    stoppable = not arguments.STOPPABLE.isdisjoint(argv[:1])
    if as_process:
        keep_speaking(result=not stoppable)
    if stoppable:
        stop.install()
    else:  # TERM as Ctrl-C, so that what is half written goes
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            return _run(arguments.parse(argv, __doc__), stop)
        finally:
            print(end="", flush=True)
    except KeyboardInterrupt:
        fetching = argv[:1] == ["fetch"]
        say(f"interrupted; {'the same command goes on' if fetching else 'no partial files left'}")
        return INTERRUPTED
    except Exception as error:
        code = _explain(error, "--debug" in argv, stoppable)
    finally:
        if stoppable:
            stop.release()
        else:
            signal.signal(signal.SIGTERM, before)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        # Other ranks may be gone: an orderly shutdown of the group could wait for them forever.
        sys.stdout.flush()
        sys.stderr.flush()
        if code == USER_ERROR:
            time.sleep(1)  # all ranks come here: the slower ones still read what was agreed
        os._exit(code)
    return code


# Command -> its module, imported once the signals are taken over, and how it is called.
CALLS: dict[str, tuple[str, Callable[[Any, argparse.Namespace, StopFlag], Any]]] = {
    "init": ("cluster.init", lambda m, a, _: m.run(a.folder, a.recipe, a.site, a.listed)),
    "train": ("train", lambda m, a, stop: m.run(_load(a), stop, a.resume_with_changes)),
    "pipeline": ("pipeline", lambda m, a, s: m.run(_load(a), s, a.first, a.until, a.stage)),
    "evaluate": ("eval.evaluate", lambda m, a, stop: m.run(a.run_dir, a.settings, a.kind, stop)),
    "generate": ("eval.evaluate", lambda m, a, _: m.generate(a)),
    "compare": (
        "analysis.compare.command", lambda m, a, stop: m.run(m.Options.of(_values(m, a)), stop)
    ),
    "score": ("eval.score_files", lambda m, a, _: m.run(m.Options(**_values(m, a)))),
    "report": ("analysis.report.command", lambda m, a, _: m.run(a.run_dirs, a.out, a.peft)),
    "merge": ("export.merge", lambda m, a, _: m.run(a.run_dir, a.out, a.settings, a.base, a.dtype)),
    "export": ("export.peft", lambda m, a, _: m.run(a.run_dir, a.out, a.settings, a.format)),
    "push": (
        "integrations.hub", lambda m, a, _: m.run(a.run_dir, a.repo, a.private, a.license, a.base)
    ),
    "methods": ("analysis.methods", lambda m, a, _: m.run(a.model, a.json)),
    "bench": ("analysis.bench.command", lambda m, a, _: m.run(m.Options(**_values(m, a)))),
    "bench gpu": (
        "analysis.bench.gpu.command", lambda m, a, _: m.run(a.out, a.seconds, a.only, a.tiny)
    ),
    "bench train": ("analysis.bench.train", lambda m, a, _: m.run(a.settings, a.out, a.repeats)),
    "config": ("config.command", lambda m, a, _: m.run(a.settings, a.reference)),
    "data": ("analysis.rows", lambda m, a, _: m.run(a.settings, a.show)),
    "doctor": (
        "cluster.doctor.command",
        lambda m, a, _: m.run(a.settings, a.run_dir, a.timeout, a.json, a.against_transformers),
    ),
    "fetch": ("cluster.fetch", lambda m, a, _: m.run(a.settings, a.out, a.check)),
    "plan": (
        "cluster.plan.command",
        lambda m, a, _: m.run(
            a.settings, m.Options(**_values(m, a), disk=a.disk_gbps * 1e9), a.json
        ),
    ),
    "submit": ("cluster.submit", lambda m, a, _: m.run(m.Options(**_values(m, a)))),
    "verify": ("cluster.verify", lambda m, a, _: m.run(a.run_dir, a.json)),
    "status": ("cluster.status", lambda m, a, _: m.run(a.run_dirs, a.json)),
}  # fmt: skip


def _run(args: argparse.Namespace, stop: StopFlag) -> int:
    of_its_own = f"{args.command} {getattr(args, 'what', '')}"
    name, call = CALLS[of_its_own if of_its_own in CALLS else args.command]
    with importing():
        module = importlib.import_module(f"scalepeft.{name}")
    code = call(module, args, stop)
    return code if isinstance(code, int) else FINISHED


def _load(args: argparse.Namespace) -> Any:
    from scalepeft.config import files

    config, notes = files.load(*files.config_first(args.settings))
    for note in notes if rank() == 0 else ():
        say(note)
    return config


def _values(module: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What the module's ``Options`` take of the command line; None there means their default."""
    return {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(module.Options)
        if getattr(args, field.name, None) is not None or field.default is dataclasses.MISSING
    }


def _explain(error: Exception, debug: bool, stoppable: bool) -> int:
    from scalepeft.core.errors import UserError
    from scalepeft.core.text import one_line
    from scalepeft.run.lease import Superseded

    if isinstance(error, Superseded):
        say(f"stopped: {error}")
        return BROKEN
    if isinstance(error, BrokenPipeError) and not stoppable:  # "| head": nobody is there to be told
        return BROKEN
    refused = error if isinstance(error, OSError) and error.errno in REFUSED else None
    refused = refused if refused and refused.filename else None
    mistake = refused or isinstance(error, UserError)
    text = f"{refused.filename}: {refused.strerror}" if refused else str(error)
    # A name of thousands of characters: its begin and end.
    text = one_line(re.sub(r"(\S{80})\S{150,}(\S{20})", r"\1...\2", text), 2000)
    lost = None
    if "torch" in sys.modules:  # else no rank has met another
        from scalepeft.parallel import rendezvous

        if rendezvous.of_a_connection(error):
            lost = "lost the connection to another rank, whose lines say why: " + text
            lost = rendezvous.who_is_gone() or lost
        rendezvous.tell(lost or f"{type(error).__name__}: {text}")
    if debug or not (lost or mistake):
        traceback.print_exc()
    if lost or not mistake:
        say(f"failed on rank {rank()}: {lost or f'{type(error).__name__}: {text}'}")
        return BROKEN
    if refused or rank() == 0:  # user errors are agreed between the ranks: one line is enough
        say(f"error: {text}")
    return USER_ERROR
