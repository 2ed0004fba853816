"""``scalepeft doctor``: can a run be started here? One process, or every rank of a job.

All ranks run the same checks at the same time, each with a limit; rank 0 judges and prints.
"""

import argparse
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from scalepeft.build import engine_class
from scalepeft.cluster.doctor import inputs, links, machine, run_folder
from scalepeft.cluster.doctor.check import Check, Context
from scalepeft.cluster.doctor.findings import Finding, by_value, summary, where
from scalepeft.cluster.doctor.rendezvous import GRACE, RendezvousError, first_line, join
from scalepeft.config import files as config_files
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.launch import launch_variables
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.parallel.ranks import Ranks

LONGEST = 86400  # seconds that --timeout may ask for


@dataclass(frozen=True)
class Options:
    """What to look at.

    Attributes:
        settings: [CONFIG] [KEY=VALUE ...] of the run; without, the machine alone is looked at.
        run_dir: folder to look at (default: the config's, or this one).
        timeout: seconds that ranks may take to come, and each check.
        json: print one JSON object instead of lines.
    """

    settings: list[str]
    run_dir: str | None = None
    timeout: float = 120.0
    json: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        """Take the fields from the command line."""
        return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})

    def config(self) -> RunConfig | None:
        """Return the run's config; None if no setting names one.

        Raises:
            UserError: a mistake in it, or in an option.
        """
        if not 0 < self.timeout <= LONGEST:
            raise UserError(
                f"--timeout {self.timeout:g}: must be more than 0 and at most {LONGEST} seconds"
            )
        if not self.settings:
            return None
        path, overrides = None, self.settings
        if "=" not in overrides[0]:
            path, overrides = overrides[0], overrides[1:]
        if self.run_dir is not None:
            overrides = [*overrides, f"run_dir={self.run_dir}"]
        try:
            return config_files.load(path, overrides)[0]
        except UserError:
            # A mistake in a setting comes before a setting that is missing.
            keys = {setting.partition("=")[0] for setting in overrides}
            absent = [] if "run_dir" in keys else ["run_dir=."]
            if not keys & {"train.max_steps", "train.epochs"}:
                absent.append(f"train.max_steps={1 << 31}")
            config_files.load(path, [*absent, *overrides])
            raise


def run(options: Options) -> int:
    """Run the checks and print them on rank 0; return 0, or 1 if there is something to fix.

    Raises:
        UserError: a mistake in options or config.
    """
    config = options.config()
    env = launch_variables(os.environ)
    if config is not None:
        engine_class(config).check(int(env["WORLD_SIZE"]))
    try:
        rendezvous = join(env, options.timeout)
        run_dir = config.run_dir if config else options.run_dir or "."
        ranks = Ranks(rendezvous.rank, rendezvous.world_size, int(env["LOCAL_RANK"]))
        doctor = Doctor(Context(config, Path(run_dir), ranks, rendezvous))
        doctor.run()
        if rendezvous.rank == 0:
            _print(options, doctor.findings, doctor.facts, list(rendezvous.hosts.values()))
        broken = any(f.state == "fix" for f in doctor.findings)
        code = rendezvous.share(BROKEN if broken else FINISHED)
        rendezvous.close()
    except RendezvousError as error:
        # There may be no rank 0 to tell it to: each rank prints what it knows.
        if env["RANK"] == "0":
            _print(options, [Finding("ranks", "fix", str(error))], [], [])
        else:
            say(f"error: {error}")
        _leave(BROKEN)
    if doctor.stuck:
        _leave(code)
    return int(code)


class Outcome(NamedTuple):
    """What a rank's probe came to: its value, why there is none, whether it still runs."""

    value: Any = None
    error: str | None = None
    timed_out: bool = False


class RankLost(Exception):
    """A rank gave no answer; the others end here."""


class Doctor:
    """The checks in their order; ``findings`` and ``facts`` (each rank's values, by check) fill on
    rank 0. ``stuck``: somewhere a thread hangs or a rank is gone, so processes can only end with
    ``os._exit``.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.rendezvous = context, context.rendezvous
        self.findings: list[Finding] = []
        self.facts: list[dict[str, Any]] = [{} for _ in range(self.rendezvous.world_size)]
        self.stuck = False

    def run(self) -> None:
        """Run every check; one that needs another's success is left out without it."""
        try:
            self._run()
        except RankLost:
            text = "what comes after this was not tried: not every rank answers any more"
            self.findings.append(Finding("ranks", "info", text))
        finally:
            self.limited(partial(run_folder.clean_up, self.context))

    def _run(self) -> None:
        config, ranks = self.context.config, self.context.ranks
        self.check(machine.VERSIONS)
        self.check(machine.ENVIRONMENT)
        usable = self.check(machine.DEVICES)
        if usable:
            self.check(machine.KERNELS)
        if usable and config is not None and config.engine.name == "zero":
            self.check(machine.DEEPSPEED)
        for check in inputs.CHECKS if config is not None else ():
            self.check(check)
        linked = self.check(links.GLOO)
        if linked and usable:
            linked = ranks.device.type == "cpu" or self.check(links.NCCL)
            linked = linked and self.check(links.BYTES)
        if self.check(run_folder.SAVING) and self.check(run_folder.SAME):
            self.check(run_folder.SPACE)
        if linked and not self.stuck:
            self.limited(ranks.finish)
        else:  # leaving a process group in order takes all of its ranks
            self.stuck = True

    def check(self, check: Check) -> bool:
        """Run a check on its ranks; return on every rank whether there is nothing to fix.

        Raises:
            RankLost: a rank gave no answer.
        """
        ranks, rendezvous = self.context.ranks, self.rendezvous
        probes = {"all": True, "nodes": ranks.local_rank == 0, "main": ranks.is_main}[check.on]
        mine = self.limited(partial(check.probe, self.context)) if probes else None
        answers = rendezvous.gather(mine, rendezvous.timeout + GRACE)
        good = lost = timed_out = False
        if ranks.is_main:
            outcomes = {rank: Outcome(*answer) for rank, answer in answers.items() if answer}
            findings = self._judge(check, outcomes)
            if silent := set(range(ranks.world_size)) - answers.keys():
                text = f"{check.name}: {where(silent, rendezvous.hosts)}: no answer within"
                text += f" {rendezvous.timeout:.0f} s: died, or hangs"
                findings = [Finding("ranks", "fix", text)]
            self.findings += findings
            good, lost = all(f.state != "fix" for f in findings), bool(silent)
            timed_out = any(outcome.timed_out for outcome in outcomes.values())
        good, lost, timed_out = rendezvous.share([good, lost, timed_out])
        self.stuck = self.stuck or lost or timed_out
        if lost:
            raise RankLost
        return good

    def _judge(self, check: Check, outcomes: dict[int, Outcome]) -> list[Finding]:
        hosts = self.rendezvous.hosts
        for rank, outcome in outcomes.items():
            self.facts[rank][check.name] = outcome.error or outcome.value
        if errors := {rank: o.error for rank, o in outcomes.items() if o.error is not None}:
            return [Finding(check.name, "fix", by_value(errors, hosts), check.remedy)]
        values = {rank: outcome.value for rank, outcome in outcomes.items()}
        findings = [Finding(check.name, *f) for f in check.verdict(self.context, values, hosts)]
        broken = any(f.state == "fix" for f in findings)
        return [f for f in findings if not (broken and f.state == "ok")]

    def limited(self, work: Callable[[], Any]) -> Outcome:
        """Run ``work`` in a thread, for ``timeout`` seconds at most."""
        done: list[Outcome] = []

        def call() -> None:
            if self.context.ranks.device.type == "cuda":
                torch.cuda.set_device(self.context.ranks.device)  # it is the thread's
            try:
                done.append(Outcome(work()))
            except Exception as error:  # whatever it is, it is what doctor was asked to find
                done.append(Outcome(error=first_line(error)))

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.rendezvous.timeout)
        limit = f"still not done after {self.rendezvous.timeout:.0f} s"
        return done[0] if done else Outcome(error=limit, timed_out=True)


def _print(options: Options, findings: list[Finding], facts: list[Any], hosts: list[str]) -> None:
    wrong = [f for f in findings if f.state == "fix"]
    if options.json:
        found = {"healthy": not wrong, "hosts": hosts}
        found |= {"findings": [dataclasses.asdict(f) for f in findings], "ranks": facts}
        print(json.dumps(found))
    else:
        lines = [f"{'FIX' if f in wrong else f.state:5} {f.check:13} {f.text()}" for f in findings]
        print("\n".join([*lines, *summary(findings)]))
    sys.stdout.flush()


def _leave(code: int) -> NoReturn:
    """End the process although a thread may hang in a collective, or the peers be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
