"""The form of a check: what it tries on each rank, what rank 0 makes of all ranks' values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scalepeft.cluster.doctor.findings import Hosts, Values, by_value
from scalepeft.cluster.doctor.rendezvous import Rendezvous
from scalepeft.parallel.ranks import Ranks

Verdict = Iterator[tuple[str, ...]]
"""(state, found) or (state, found, remedy) of each ``Finding``."""


@dataclass
class Context:
    """What probes and verdicts may use.

    Attributes:
        config: of the run; without one (None) the machine alone is looked at.
        run_dir: the folder that is looked at.
        ranks: this process; its device is set by the check of the devices.
        rendezvous: of all ranks.
    """

    config: Any  # RunConfig, or None: the checks of inputs run only with one
    run_dir: Path
    ranks: Ranks
    rendezvous: Rendezvous


def same_everywhere(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield values that are texts, or (state, text), and that those of state ``ok`` differ."""
    pairs = {r: ("ok", v) if isinstance(v, str) else tuple(v) for r, v in values.items()}
    fine = {rank: text for rank, (state, text) in pairs.items() if state == "ok"}
    if len(set(fine.values())) > 1:
        yield "fix", by_value(fine, hosts), "give every node the same"
    for state, text in dict.fromkeys(pairs.values()):
        ranks = {rank: text for rank, pair in pairs.items() if pair == (state, text)}
        yield state, text if len(ranks) == len(pairs) else by_value(ranks, hosts)


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: as it is printed.
        probe: on each rank: returns what it sees, of JSON's types; may raise any exception, whose
            first line becomes the finding, and may use collectives where ``on`` is ``all``.
        verdict: on rank 0: yields the findings from the values of the ranks that probed; an ``ok``
            beside a ``fix`` is left out.
        on: the ranks that probe: all, the first of each node, or rank 0.
        remedy: what to do if a probe raises.
    """

    name: str
    probe: Callable[[Context], Any]
    verdict: Callable[[Context, Values, Hosts], Verdict] = same_everywhere
    on: Literal["all", "nodes", "main"] = "all"
    remedy: str = ""
