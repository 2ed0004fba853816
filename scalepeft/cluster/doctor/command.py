"""``scalepeft doctor``: can a run start here? All ranks check, with limits; rank 0 judges."""

import json
import os
import sys
from functools import partial
from pathlib import Path

from scalepeft.build import engine_class
from scalepeft.cluster.doctor import against, links, machine, storage
from scalepeft.cluster.doctor.check import Context, Finding, first_line, meet
from scalepeft.config import files
from scalepeft.core.errors import UserError
from scalepeft.core.launch import launch_variables
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.folder import check_same_run
from scalepeft.run.lease import check_free

LINKS = "set {}_SOCKET_IFNAME to the interface that the nodes share; open the ports between them"
PATIENCE = 120.0  # seconds for ranks to come, and for each check, without --timeout
LONGEST = 86400  # seconds that --timeout may ask for


def run(
    settings: list[str],
    run_dir: str | None = None,
    timeout: float | None = None,
    as_json: bool = False,
    against_transformers: bool = False,
) -> int:
    """Run the checks, print them on rank 0; return 0, or 1 if there is something to fix."""
    if against_transformers:
        if run_dir is not None or as_json or timeout is not None:
            what = "--against-transformers takes neither --run-dir nor --json nor --timeout"
            raise UserError(f"{what}; leave them out")
        return against.run(settings)
    timeout = PATIENCE if timeout is None else timeout
    if not 0 < timeout <= LONGEST:
        raise UserError(f"--timeout {timeout:g}: must be more than 0 and at most {LONGEST} seconds")
    env, config = launch_variables(os.environ), None
    if settings:
        path, overrides = files.config_first(settings)
        folder = [] if run_dir is None else [f"run_dir={run_dir}"]
        config, _ = files.load(path, [*overrides, *folder])
        engine_class(config).check(int(env["WORLD_SIZE"]))
    ranks = Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))
    context = Context(ranks, timeout, config, Path(config.run_dir if config else run_dir or "."))
    try:
        meet(context, env)
        run_checks(context)
        if ranks.is_main:
            print(report(context, as_json), flush=True)
        context.leave()
    except RuntimeError as error:
        context.findings = [Finding("ranks", "fix", first_line(error))]
        context.stuck = True
        # There may be no rank 0 to tell it to: each rank prints what it knows.
        if ranks.is_main:
            print(report(context, as_json), flush=True)
        else:
            say(f"error: {first_line(error)}")
    code = BROKEN if any(f.state == "fix" for f in context.findings) else FINISHED
    if context.stuck:
        sys.stderr.flush()
        os._exit(code)
    return code


def run_checks(context: Context) -> None:
    """Run every check; one that needs another's success is left out without it."""
    check, config, ranks = context.check, context.config, context.ranks
    check("versions", machine.versions)
    check("environment", machine.environment, "nodes", "set SCALEPEFT_CACHE to another folder")
    usable = check("devices", machine.device, judge=machine.check_devices)
    if usable:
        check("kernels", machine.kernels)
    if config is not None:
        if usable and config.engine.name == "zero":
            check("deepspeed", machine.deepspeed, "nodes", "repair it, or take engine.name=fsdp2")
        check("base", storage.base, "nodes")
        check("data", storage.data, "nodes")
        check("rows", storage.rows, "main")
        check("global batch", storage.batch, "main")
        check("run config", lambda _: check_same_run(config, allow_changes=False), "main")
        check("holder", lambda _: check_free(context.run_dir), "main")
    linked = check("links", partial(links.collectives, backend="gloo"), remedy=LINKS.format("GLOO"))
    if linked and usable and ranks.device.type == "cuda":
        linked = check(
            "GPU links", partial(links.collectives, backend="nccl"), remedy=LINKS.format("NCCL")
        )
    if linked and usable:
        remedy = "update torch or the driver; take engine.name=ddp"
        linked = check("4-bit bytes", links.stored_bytes, remedy=remedy)
    room = "make room, mount it writable, or choose another run_dir"
    shared = "any node may hold rank 0 after a restart: put run_dir where all can see and write it"
    saves = check("run folder", storage.saving, "main", room)
    if saves and check("run folder", storage.same_folder, remedy=shared):
        check("free space", storage.space, "main", room)
    context.limited(partial(storage.clean_up, context))
    context.stuck |= not linked  # leaving a process group in order takes all of its ranks
    if not context.stuck:
        context.limited(ranks.finish)


def report(context: Context, as_json: bool) -> str:
    """Return the findings as lines, at the end all that is to fix, or as one JSON object."""
    findings, warnings = context.findings, sum(f.state == "warn" for f in context.findings)
    wrong = [f for f in findings if f.state == "fix"]
    if as_json:
        hosts, ranks = list(context.hosts.values()), [context.facts[r] for r in context.hosts]
        texts = [f._asdict() for f in findings]
        return json.dumps({"healthy": not wrong, "hosts": hosts, "findings": texts, "ranks": ranks})
    rest = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
    lines = [f"{'FIX' if f in wrong else f.state:5} {f.check:13} {f.text()}" for f in findings]
    lines.append(f"to fix{rest}:" if wrong else f"nothing to fix{rest}")
    lines += [f"  {number}. {f.check}: {f.text()}" for number, f in enumerate(wrong, 1)]
    return "\n".join(lines)
