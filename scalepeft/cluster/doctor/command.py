"""``scalepeft doctor``: can a run be started here? One process, or every rank of a job.

Each check is a stage that all ranks run at the same time with a limit; rank 0 judges and prints.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from scalepeft.adapters import inject as injection
from scalepeft.build import check_batch, engine_class
from scalepeft.cluster.doctor import checks as judge
from scalepeft.cluster.doctor import filesystem as disk
from scalepeft.cluster.doctor import network as links
from scalepeft.cluster.doctor import node
from scalepeft.cluster.doctor.findings import Finding, by_value, fix, summary
from scalepeft.cluster.doctor.rendezvous import Apart, Meeting, Outcome, meet
from scalepeft.config import files as config_files
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.launch import launch_variables
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.core.slurm import slurm_start
from scalepeft.models import structure, tiny
from scalepeft.models.hub import BUILTIN
from scalepeft.parallel.ranks import Ranks, pick_device
from scalepeft.run.folder import check_same_run
from scalepeft.run.lease import check_free

LONGEST = 86400  # seconds that --timeout may ask for


@dataclass(frozen=True)
class Options:
    """What to look at; see ``scalepeft doctor --help``."""

    settings: list[str]
    run_dir: str | None = None
    timeout: float = 120.0
    json: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        """Takes the fields from the command line."""
        return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})

    def config(self) -> RunConfig | None:
        """The run's config; None if no setting names one.

        Raises:
            UserError: a mistake in it, or in an option.
        """
        if not 0 < self.timeout <= LONGEST:
            raise UserError(
                f"--timeout {self.timeout:g}: must be more than 0 and at most {LONGEST} seconds"
            )
        if not self.settings:
            return None
        path, settings = None, self.settings
        if "=" not in settings[0]:
            path, settings = settings[0], settings[1:]
        if self.run_dir is not None:
            settings = [*settings, f"run_dir={self.run_dir}"]
        try:
            return config_files.load(path, settings)[0]
        except UserError:
            # A mistake in what is given comes before what is not given yet.
            keys = {setting.partition("=")[0] for setting in settings}
            absent = [] if "run_dir" in keys else ["run_dir=."]
            if not keys & {"train.max_steps", "train.epochs"}:
                absent.append(f"train.max_steps={1 << 31}")
            config_files.load(path, [*absent, *settings])
            raise


def run(options: Options) -> int:
    """Runs the checks and prints them on rank 0; returns 0, or 1 if there is something to fix.

    Raises:
        UserError: a mistake in options or config.
    """
    config = options.config()
    env = launch_variables(os.environ)
    if config is not None:
        engine_class(config).check(int(env["WORLD_SIZE"]))
    try:
        meeting = meet(env, options.timeout)
        visit = Visit(meeting, config, options.run_dir or ".", int(env["LOCAL_RANK"]))
        try:
            visit.all()
        finally:
            visit.close()
        if meeting.rank == 0:
            hosts = [meeting.hosts[rank] for rank in range(meeting.world_size)]
            _print(options, visit.findings, visit.facts, hosts)
        broken = any(f.state == "fix" for f in visit.findings)
        code = meeting.agree(BROKEN if broken else FINISHED)
        meeting.part()
    except Apart as error:
        # There may be no rank 0 to tell it to: each says what it knows.
        if env["RANK"] == "0":
            _print(options, [fix("ranks", str(error))], [], [])
        else:
            say(f"error: {error}")
        _leave(BROKEN)
    if visit.stuck:
        _leave(code)
    return int(code)


class _Gone(Exception):
    """A rank gave no answer; the others end here."""


class Visit:
    """The checks in their order; ``findings`` fill on rank 0.

    Args:
        meeting: the ranks that came.
        config: of the run, if there is one.
        run_dir: the folder to look at, without a config.
        local_rank: of this process on its node.
    """

    def __init__(
        self, meeting: Meeting, config: RunConfig | None, run_dir: str, local_rank: int
    ) -> None:
        self.meeting, self.config = meeting, config
        self.run_dir = Path(config.run_dir if config else run_dir)
        self.ranks = Ranks(meeting.rank, meeting.world_size, local_rank)
        self.findings: list[Finding] = []
        self.facts: list[Any] = []
        """What each rank told of its node, for ``--json``."""
        self.stuck = False
        """Somewhere a thread hangs, or a rank is gone: processes can only end with ``os._exit``."""
        self._probe: Path | None = None

    def all(self) -> None:
        """Every check; one that needs another's success is left out without it."""
        try:
            self._checks()
        except _Gone:
            text = "what comes after this was not tried: not every rank answers any more"
            self.findings.append(Finding("ranks", "info", text))

    def _checks(self) -> None:
        usable = self._node()
        self._base()
        self._start()
        linked = self._links("links", "gloo", links.join) and self._clocks()
        if linked and usable:
            if self.ranks.device.type == "cuda":
                linked = self._links("GPU links", "nccl", links.join_devices)
            linked = linked and self._bytes()
        self._disk()
        if linked and not self.stuck:
            self.meeting.stage(self.ranks.finish)
        else:  # leaving a group in order takes all of its ranks
            self.stuck = True

    def close(self) -> None:
        """Takes the probe folder away."""
        if self._probe is not None:
            self.meeting.limited(partial(disk.remove, self._probe))

    def _stage(
        self, work: Callable[[], Any], judged: Callable[[list[Outcome], dict[int, str]], Any]
    ) -> bool:
        """Runs a stage and has rank 0 judge it; True on every rank if there is nothing to fix.

        Raises:
            _Gone: a rank gave no answer.
        """
        outcomes = self.meeting.stage(work)
        good = True
        if self.meeting.rank == 0:
            found = judged(outcomes, self.meeting.hosts)
            found = found if isinstance(found, list) else [found]
            self.findings += found
            good = not [f for f in found if f.state == "fix"]
            if good and (lost := {r: o.error for r, o in enumerate(outcomes) if o.gone}):
                self.findings.append(fix("ranks", by_value(lost, self.meeting.hosts)))
        hangs, gone = any(o.hangs for o in outcomes), any(o.gone for o in outcomes)
        good, hangs, gone = self.meeting.agree([good, hangs, gone])
        self.stuck = self.stuck or hangs or gone
        if gone:
            raise _Gone
        return good

    def _node(self) -> bool:
        """Versions, limits, devices, kernels; False if the ranks have no devices to train on."""
        config, local_rank = self.config, self.ranks.local_rank
        wanted = config.engine.device if config else "auto"

        def facts() -> dict[str, Any]:
            return {"versions": node.versions(), "limits": node.limits()}

        def judge_facts(outcomes: list[Outcome], hosts: dict[int, str]) -> list[Finding]:
            self.facts = [outcome.value or {"error": outcome.error} for outcome in outcomes]
            if bad := {r: o.error for r, o in enumerate(outcomes) if o.error is not None}:
                return [fix("versions", by_value(bad, hosts))]
            found = {r: o.value["versions"] for r, o in enumerate(outcomes)}
            limits = {r: o.value["limits"] for r, o in enumerate(outcomes)}
            cuda = wanted != "cpu" and "NCCL" in found[0]
            return [
                *judge.versions(found, hosts, node.lower_bounds(), config),
                *judge.environment(limits, hosts, cuda),
            ]

        def judge_devices(outcomes: list[Outcome], hosts: dict[int, str]) -> list[Finding]:
            for facts_of_rank, outcome in zip(self.facts, outcomes, strict=True):
                facts_of_rank["device"] = outcome.value or {"error": outcome.error}
            return judge.devices(outcomes, hosts, config)

        self._stage(facts, judge_facts)
        if not self._stage(lambda: node.device(wanted, local_rank), judge_devices):
            return False
        self.ranks.device = self.meeting.device = pick_device(wanted, local_rank)
        self._stage(lambda: node.kernels(config, self.ranks.device), judge.kernels)
        if config is not None and config.engine.name == "zero":
            kind, first = self.ranks.device.type, local_rank == 0
            self._stage(lambda: node.deepspeed(kind) if first else None, judge.deepspeed)
        return True

    def _base(self) -> None:
        if (config := self.config) is None:
            return
        first = self.ranks.local_rank == 0

        def judged(outcomes: list[Outcome], hosts: dict[int, str]) -> Finding:
            return judge.base(outcomes, hosts, config.model.path)

        self._stage(lambda: node.model(config) if first else None, judged)
        self._stage(lambda: node.data(config) if first else None, judge.data)
        main = self.meeting.rank == 0
        self._stage(lambda: node.rows(config) if main else None, judge.rows)

    def _start(self) -> None:
        """What training refuses before it loads anything."""
        if (config := self.config) is None:
            return
        world, name = self.meeting.world_size, f"run_dir={config.run_dir}"
        checks: list[tuple[str, Callable[[], None], str]] = [
            (
                "global batch",
                lambda: check_batch(config, world),
                f"{config.train.global_batch // world} rows a step on each rank",
            ),
            (
                "run config",
                lambda: check_same_run(config, allow_changes=False),
                f"{name} holds no checkpoint of another config",
            ),
            (
                "holder",
                lambda: check_free(self.run_dir, *slurm_start()),
                f"nobody trains in {name}",
            ),
        ]
        for check, work, well in checks:
            judged = partial(judge.start, check, well)
            self._stage(work if self.meeting.rank == 0 else lambda: None, judged)

    def _links(self, check: str, kind: str, join: Callable[..., None]) -> bool:
        def work() -> dict[str, Any]:
            join(self.ranks, self.meeting.client(), self.meeting.timeout)
            device = self.ranks.device if kind == "nccl" else torch.device("cpu")
            return links.try_collectives(self.ranks, device)

        return self._stage(work, partial(links.judge_links, check, kind))

    def _clocks(self) -> bool:
        if self.meeting.world_size == 1:
            return True
        return self._stage(lambda: links.clock_offsets(self.ranks), links.judge_clocks)

    def _bytes(self) -> bool:
        needed = self.config is None or judge.shards_bytes(self.config)
        judged = partial(links.judge_bytes, needed=needed)
        return self._stage(lambda: links.try_bytes(self.ranks), judged)

    def _disk(self) -> None:
        main, name = self.meeting.rank == 0, f"run_dir={self.run_dir}"

        def made(outcomes: list[Outcome], _: dict[int, str]) -> list[Finding]:
            if (error := outcomes[0].error) is not None:
                return [disk.judge_writing(name, error)]
            self._probe = Path(outcomes[0].value)
            return []

        def probed(outcomes: list[Outcome], _: dict[int, str]) -> list[Finding]:
            if (error := outcomes[0].error) is not None:
                return [disk.judge_writing(name, error)]
            return disk.judge_probe(name, outcomes[0].value)

        if not self._stage(lambda: disk.make_probe(self.run_dir) if main else None, made):
            return
        probe = Path(self.meeting.agree(str(self._probe)))
        if not self._stage(lambda: disk.probe(probe) if main else None, probed):
            return
        watched = disk.Publisher(
            probe, self.meeting.client(), self.meeting.rank, self.meeting.world_size
        )
        self._stage(watched.run, partial(disk.judge_seen, name))
        self._stage(lambda: self._room() if main else None, partial(self._judge_room, name))

    def _room(self) -> list[Any]:
        return [disk.room(self.run_dir), checkpoint_bytes(self.config) if self.config else None]

    def _judge_room(self, name: str, outcomes: list[Outcome], _: dict[int, str]) -> list[Finding]:
        if (error := outcomes[0].error) is not None:
            return [fix("free space", f"{name}: {error}")]
        free, checkpoint = outcomes[0].value
        keep = self.config.train.keep_checkpoints if self.config else 0
        return [disk.judge_room(name, free, checkpoint, keep)]


def checkpoint_bytes(config: RunConfig) -> int | None:
    """Size of one checkpoint: the adapter and AdamW's two moments in fp32.

    Returns:
        None for a base of the hub that is not in this node's cache: its shape is not known.

    Raises:
        UserError: the base or the adapter's config is wrong.
    """
    if config.model.path == BUILTIN:
        folder: Path | None = tiny.make(0)
    elif Path(config.model.path).is_dir():
        folder = Path(config.model.path)
    else:
        folder = node.cached(config.model.path, config.model.revision)
    if folder is None or not (folder / "config.json").is_file():
        return None
    model = structure.build(config.model, folder, config.train.precision)
    injection.inject(model, config.adapter)
    return 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def _print(options: Options, findings: list[Finding], facts: list[Any], hosts: list[str]) -> None:
    healthy = not [f for f in findings if f.state == "fix"]
    if options.json:
        listed = [dataclasses.asdict(f) for f in findings]
        print(json.dumps({"healthy": healthy, "hosts": hosts, "findings": listed, "ranks": facts}))
    else:
        lines = [f.line() for f in findings]
        print("\n".join([*lines, *summary(findings)]))
    sys.stdout.flush()


def _leave(code: int) -> NoReturn:
    """Ends the process although a thread may hang in a collective, or the peers be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
