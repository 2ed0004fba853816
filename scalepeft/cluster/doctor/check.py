"""The form of a check, and the ranks that run it: they meet at a TCPStore and with time limits, so
that a rank that never comes, dies or hangs is a finding and not a hang.
"""

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

from scalepeft.core.slurm import _output
from scalepeft.parallel.ranks import Ranks

GRACE = 10.0  # seconds that an answer may take beyond the work itself


class Finding(NamedTuple):
    """One line: what a check saw, what to do. ``state``: ``ok``; ``info``, nothing to judge;
    ``warn``, a run works with what the text says; ``fix``, it would fail or go wrong.
    """

    check: str
    state: str
    found: str
    remedy: str = ""

    def text(self) -> str:
        """Return what was seen and what to do, on one line."""
        return " ".join(self.found.split()) + (f" -> {self.remedy}" if self.remedy else "")


@dataclass
class Context:
    """What is looked at, by which ranks, and what was found.

    Attributes:
        ranks: this process; its device is set by the check of the devices.
        store: where the ranks meet; the main thread's: one client serves one thread at a time.
        timeout: seconds that a check may take.
        config: of the run; without one the machine alone is looked at.
        run_dir: the folder that is looked at.
        hosts: rank -> host of those that came; this, ``findings`` and ``facts`` (each rank's
            values, by check) are rank 0's.
        broken: there is something to fix. ``lost``: a rank gave no answer, so nothing more is
            tried. ``stuck``: for that, or because a thread hangs somewhere, processes can only end
            with ``os._exit``.
    """

    ranks: Ranks
    store: Any
    timeout: float
    config: Any = None
    run_dir: Path = Path()
    hosts: dict[int, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    facts: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    broken: bool = False
    lost: bool = False
    stuck: bool = False
    _round: int = 0

    def gather(self, value: Any, seconds: float) -> dict[int, Any]:
        """Return rank -> value, of JSON's types, of those that answer in time; on rank 0 alone."""
        self._round += 1
        keys = {r: f"{self._round}/{r}" for r in self.hosts or range(self.ranks.world_size)}
        self.store.set(f"{self._round}/{self.ranks.rank}", json.dumps(value))
        if not self.ranks.is_main:
            return {}
        until = time.monotonic() + seconds
        # Not store.wait: it prints warnings of its own when the time is up.
        while not self.store.check(list(keys.values())) and time.monotonic() < until:
            time.sleep(0.02)
        came = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: json.loads(self.store.get(key)) for rank, key in came.items()}

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Raises RuntimeError: rank 0 is gone."""
        self._round += 1
        key = f"{self._round}"
        if self.ranks.is_main:
            self.store.set(key, json.dumps(value))
        self.store.wait([key], timedelta(seconds=2 * (self.timeout + GRACE)))
        return json.loads(self.store.get(key))

    def check(self, check: "Check") -> bool:
        """Run a check on its ranks; return on every rank whether there is nothing to fix."""
        if self.lost:
            return False
        probes = {"all": True, "nodes": self.ranks.local_rank == 0, "main": self.ranks.is_main}
        mine = self.limited(partial(check.probe, self)) if probes[check.on] else None
        answers = self.gather(mine, self.timeout + GRACE)
        outcomes = {rank: answer for rank, answer in answers.items() if answer}
        failed = {rank: text for rank, (state, text) in outcomes.items() if state != "done"}
        values = {rank: value for rank, (_, value) in outcomes.items()}
        for rank, value in values.items():
            self.facts[rank][check.name] = value
        findings = []
        if silent := self.hosts.keys() - answers.keys():
            text = f"{check.name}: {where(silent, self.hosts)}: no answer within"
            findings = [
                Finding("ranks", "fix", f"{text} {self.timeout:.0f} s: died, or hangs"),
                Finding("ranks", "info", "nothing more was tried: not every rank answers any more"),
            ]
        elif failed:
            findings = [Finding(check.name, "fix", by_value(failed, self.hosts), check.remedy)]
        elif values:
            findings = [Finding(check.name, *f) for f in check.verdict(self, values)]
        good = all(f.state != "fix" for f in findings)
        self.findings += [f for f in findings if good or f.state != "ok"]
        hangs = any(state == "hangs" for state, _ in outcomes.values())
        good, self.lost, hangs = self.share([good, bool(silent), hangs])
        self.broken |= not good
        self.stuck |= self.lost or hangs
        return good

    def limited(self, work: Callable[[], Any]) -> tuple[str, Any]:
        """Run ``work`` in a thread; return ``done`` with its result, or ``failed``, or ``hangs``
        after ``timeout`` seconds, with why.
        """
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


Values = Mapping[int, Any]
"""Rank -> what its probe returned."""
Verdict = Iterator[tuple[str, ...]]
"""(state, found) or (state, found, remedy) of each ``Finding``."""


def same_everywhere(context: Context, values: Values) -> Verdict:
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


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: as it is printed.
        probe: on each rank: returns what it sees, of JSON's types; may raise any exception, whose
            first line becomes the finding, and may use collectives where ``on`` is ``all``.
        verdict: on rank 0: yields the findings from the values of the ranks that probed; an ``ok``
            beside a ``fix`` is left out.
        on: the ranks that probe: ``all``, the first of each node (``nodes``), or rank 0 (``main``).
        remedy: what to do if a probe raises.
    """

    name: str
    probe: Callable[[Context], Any]
    verdict: Callable[[Context, Values], Verdict] = same_everywhere
    on: str = "all"
    remedy: str = ""


def meet(env: Mapping[str, str], timeout: float) -> Context:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT; rank 0 learns who is there.

    Args:
        env: the launcher's variables (``launch_variables``).
        timeout: seconds to wait for the last one, and for each later round.

    Raises:
        RuntimeError: the store cannot be reached, or ranks did not come: who, and where to look.
    """
    rank, world_size, local_rank = (int(env[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    ranks, host = Ranks(rank, world_size, local_rank), socket.gethostname()
    if world_size == 1:
        return Context(ranks, dist.HashStore(), timeout, hosts={0: host})
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    at, limit = f"{address}:{port}", timedelta(seconds=timeout)
    # torchrun serves the store itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves and (error := _unreachable(address, port, timeout)):
        raise RuntimeError(
            f"rank {rank} on {host} does not reach rank 0 at {at} within {timeout:.0f} s ({error}):"
            f" is rank 0 there (its lines say), does {host} take {address} for the right machine"
            " (set MASTER_ADDR), is a firewall in between"
        )
    try:
        store = dist.TCPStore(address, port, None, serves, limit, wait_for_workers=False)
    except RuntimeError as failure:
        raise RuntimeError(
            f"rank {rank} on {host}, {at}: {first_line(failure)}; if the port is taken, set"
            " MASTER_PORT to a free one"
        ) from None
    # A restart by torchrun meets at the same store, where the keys of the first start still are.
    prefix = f"doctor {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    context = Context(ranks, dist.PrefixStore(prefix, store), timeout)
    context.hosts = hosts = context.gather(host, timeout)
    missing = context.share([r for r in range(world_size) if r not in hosts])
    if not missing:
        return context
    context.gather(None, GRACE)  # rank 0, which may serve the store, is the last to leave
    text = f"{where(missing, {})} of {world_size} did not come to {at} within {timeout:.0f} s"
    if rank == 0:
        text += f"; there: {where(hosts, hosts)}"
        if empty := sorted(_step_nodes() - {host.split(".")[0] for host in hosts.values()}):
            text += f"; no rank of {', '.join(empty)} came"
    raise RuntimeError(text)


def _step_nodes() -> set[str]:
    """Return the nodes of this Slurm step; none where that is not to be had."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes or not shutil.which("scontrol"):
        return set()
    return {name.split(".")[0] for name in _output("scontrol", "show", "hostnames", nodes).split()}


def _unreachable(address: str, port: int, timeout: float) -> str:
    """Return why nobody listens there in time. TCPStore's own waiting prints stacks."""
    until, error = time.monotonic() + timeout, ""
    while (remaining := until - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=remaining).close()
            return ""
        except OSError as failure:
            error = failure.strerror or str(failure)
            time.sleep(min(0.1, remaining))
    return error


def where(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """``rank 3 on n2``, ``ranks 0-2, 5 on n1 and rank 8 on n2``; no host where none is known."""
    spans: dict[str, list[range]] = {}
    for rank in sorted(ranks):
        of_host = spans.setdefault(hosts.get(rank, ""), [])
        start = of_host.pop().start if of_host and of_host[-1].stop == rank else rank
        of_host.append(range(start, rank + 1))
    texts = []
    for host, of_host in spans.items():
        shown = ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in of_host)
        plural = "s" * (sum(map(len, of_host)) > 1)
        texts.append(f"rank{plural} {shown}" + f" on {host}" * bool(host))
    return " and ".join(texts)


def by_value(values: Values, hosts: Mapping[int, str]) -> str:
    """Who has which value: ``2.13.0 on ranks 0-7 on n1; 2.12.1 on ranks 8-15 on n2``."""
    texts = {str(value): [r for r in values if values[r] == value] for value in values.values()}
    return "; ".join(f"{text} on {where(ranks, hosts)}" for text, ranks in texts.items())


def first_line(error: Exception) -> str:
    """Return the first line of the message that says something."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
