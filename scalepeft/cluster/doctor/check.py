"""The form of a check, and ranks that run it: one that dies or hangs is a finding, not a hang."""

import json
import os
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from scalepeft.core.slurm import output_of
from scalepeft.parallel import rendezvous
from scalepeft.parallel.ranks import Ranks

GRACE = 10.0  # seconds that an answer may take beyond the work itself


class Finding(NamedTuple):
    """One line: what a check saw and what to do. ``state``: ``ok``, ``info``, ``warn``, ``fix``."""

    check: str
    state: str
    found: str
    remedy: str = ""

    def text(self) -> str:
        """Return what was seen and what to do, on one line."""
        return " ".join(self.found.split()) + (f" -> {self.remedy}" if self.remedy else "")


Values = Mapping[int, Any]  # rank -> what its probe returned
Verdict = Iterator[tuple[str, ...]]  # (state, found) or (state, found, remedy) of each finding
Probe = Callable[["Context"], Any]
Judge = Callable[["Context", Values], Verdict]


def compare(context: "Context", values: Values) -> Verdict:
    """Yield values: None, text, name -> text, (state, text); and what differs of those ``ok``."""
    pairs = {}
    for rank, value in values.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        pairs[rank] = tuple(text) if isinstance(text, list | tuple) else ("ok", text or "in order")
    parts = {rank: text.split(", ") for rank, (state, text) in pairs.items() if state == "ok"}
    common = set.intersection(*map(set, parts.values())) if parts else set()
    differ = {rank: ", ".join(p for p in of_rank if p not in common) or "none"
              for rank, of_rank in parts.items()}  # fmt: skip
    if len(set(differ.values())) > 1:
        yield "fix", by_value(differ, context.hosts), "give every node the same"
    for state, text in dict.fromkeys(pairs.values()):
        ranks = {rank: text for rank, pair in pairs.items() if pair == (state, text)}
        yield state, text if len(ranks) == len(pairs) else by_value(ranks, context.hosts)


@dataclass
class Context:
    """What is looked at, by which ranks, and what was found."""

    ranks: Ranks  # this process; its device is set by the check of the devices
    timeout: float  # seconds that ranks may take to come, and each check
    config: Any  # of the run; without one the machine alone is looked at
    run_dir: Path
    store: Any = None  # where ranks meet; the main thread's: one client serves one thread at a time
    hosts: dict[int, str] = field(default_factory=dict)  # of the ranks that came
    findings: list[Finding] = field(default_factory=list)  # in the order of the checks
    facts: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """Rank -> check -> what its probe returned."""
    lost: bool = False  # a rank gave no answer, so nothing more is tried
    stuck: bool = False  # so, or as a thread hangs, processes must end with ``os._exit``
    _round: int = 0

    def exchange(self, value: Any, seconds: float) -> dict[int, Any]:
        """Return rank -> value, of JSON's types, of those that answer in time, on every rank."""
        self._round += 1
        keys = [f"{self._round}/{rank}" for rank in range(self.ranks.world_size)]
        self.store.set(keys[self.ranks.rank], json.dumps(value))
        until = time.monotonic() + seconds
        # Not store.wait: it prints warnings of its own when the time is up.
        while not (complete := self.store.check(keys)) and time.monotonic() < until:
            time.sleep(0.05)
        came = [r for r, key in enumerate(keys) if complete or self.store.check([key])]
        values = self.store.multi_get([keys[rank] for rank in came])
        return {rank: json.loads(value) for rank, value in zip(came, values, strict=True)}

    def leave(self) -> None:
        """Leave; rank 0, which may serve the store, is the last."""
        self.store.set(f"left/{self.ranks.rank}", "")
        until = time.monotonic() + GRACE * self.ranks.is_main
        while time.monotonic() < until and not self.store.check([f"left/{r}" for r in self.hosts]):
            time.sleep(0.02)

    def check(
        self, name: str, probe: Probe, on: str = "all", remedy: str = "", judge: Judge = compare
    ) -> bool:
        """Run a check; return on every rank whether there is nothing to fix.

        ``probe`` returns what a rank sees, of JSON's types, or raises it (then ``remedy`` is what
        to do), on ``all`` ranks, the first of ``nodes``, or ``main``; ``judge`` yields findings of
        these.
        """
        if self.lost:
            return False
        probes = {"all": True, "nodes": self.ranks.local_rank == 0, "main": self.ranks.is_main}
        mine = self.limited(partial(probe, self)) if probes[on] else None
        answers = self.exchange(mine, self.timeout + GRACE)
        outcomes = {rank: answer for rank, answer in answers.items() if answer}
        failed = {rank: text for rank, (state, text) in outcomes.items() if state != "done"}
        values = {rank: value for rank, (_, value) in outcomes.items()}
        for rank, value in values.items():
            self.facts[rank][name] = value
        if silent := self.hosts.keys() - answers.keys():
            text = f"{name}: {where(silent, self.hosts)}: no answer within"
            text += f" {self.timeout:.0f} s: died, or hangs; what comes after this was not tried"
            findings = [Finding("ranks", "fix", text)]
        elif failed:
            findings = [Finding(name, "fix", by_value(failed, self.hosts), remedy)]
        else:
            findings = [Finding(name, *f) for f in judge(self, values)]
        good = all(f.state != "fix" for f in findings)
        self.findings += [f for f in findings if good or f.state != "ok"]
        self.lost = bool(silent)
        self.stuck |= self.lost or any(state == "hangs" for state, _ in outcomes.values())
        return good

    def limited(self, work: Callable[[], Any]) -> tuple[str, Any]:
        """Run ``work`` in a thread; return ``done`` and its result, or ``failed`` or ``hangs``."""
        outcome: tuple[str, Any] = "hangs", f"still not done after {self.timeout:.0f} s"

        def call() -> None:
            nonlocal outcome
            if self.ranks.device.type == "cuda":
                torch.cuda.set_device(self.ranks.device)  # it is the thread's
            try:
                outcome = "done", work()
            except Exception as error:  # whatever it is, it is what doctor was asked to find
                outcome = "failed", first_line(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout)
        return outcome


def meet(context: Context, env: Mapping[str, str]) -> None:
    """Meet the other ranks. Raises RuntimeError: who did not come, and where to look."""
    rank, world_size, timeout = context.ranks.rank, context.ranks.world_size, context.timeout
    host = socket.gethostname()
    if world_size == 1:
        context.store, context.hosts = dist.HashStore(), {0: host}
        return
    address, port = env.get("MASTER_ADDR", ""), int(env.get("MASTER_PORT", "0"))
    folder = rendezvous.folder()
    at = folder or f"{address}:{port}"
    try:
        if not folder and not rendezvous.serves(env):
            _reach(address, port, timeout)
        context.store = rendezvous.open_store(env, "doctor", timedelta(seconds=timeout))
    except (OSError, RuntimeError) as failure:
        raise RuntimeError(
            f"rank {rank} on {host} does not reach rank 0 at {at} within {timeout:.0f} s"
            f" ({first_line(failure)}): is rank 0 there (its lines say), does {host} take {address}"
            " for the right machine (set MASTER_ADDR), is the port taken (set MASTER_PORT to a free"
            " one), is a firewall in between"
        ) from None
    try:
        context.hosts = hosts = context.exchange(host, timeout)
    except RuntimeError as failure:  # rank 0, which came earlier, has given up with the store
        raise RuntimeError(
            f"rank 0 has left {at} ({first_line(failure)}): its lines say which ranks did not come"
        ) from None
    if missing := set(range(world_size)) - hosts.keys():
        context.leave()
        text = f"{where(missing, {})} of {world_size} did not come to {at} within {timeout:.0f} s"
        text += f"; there: {where(hosts, hosts)}"
        if (nodes := os.environ.get("SLURM_STEP_NODELIST")) and shutil.which("scontrol"):
            names = output_of("scontrol", "show", "hostnames", nodes).split()
            came = {name.split(".")[0] for name in hosts.values()}
            if empty := [name for name in names if name.split(".")[0] not in came]:
                text += f"; no rank of {', '.join(empty)} came"
        raise RuntimeError(text)


def _reach(address: str, port: int, timeout: float) -> None:
    """Wait until somebody listens there. TCPStore's own waiting prints stacks."""
    until = time.monotonic() + timeout
    while True:
        try:
            remaining = max(0.1, until - time.monotonic())
            return socket.create_connection((address, port), timeout=remaining).close()
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.1)


def where(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """``rank 3 on n2``, ``ranks 0-2 on n1 and ranks 5, 8 on n2``; no host where none is known."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        by_host[hosts.get(rank, "")].append(rank)
    texts = []
    for host, (first, *others) in by_host.items():
        run = others and others[-1] - first == len(others)
        shown = f"{first}-{others[-1]}" if run else ", ".join(map(str, (first, *others)))
        texts.append(f"rank{'s' * bool(others)} {shown}" + f" on {host}" * bool(host))
    return " and ".join(texts)


def by_value(values: Values, hosts: Mapping[int, str]) -> str:
    """Who has which value: ``2.13.0 on ranks 0-7 on n1; 2.12.1 on ranks 8-15 on n2``."""
    texts = {str(value): [r for r in values if values[r] == value] for value in values.values()}
    return "; ".join(f"{text} on {where(ranks, hosts)}" for text, ranks in texts.items())


def first_line(error: Exception) -> str:
    """Return the first line of the message that says something."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
