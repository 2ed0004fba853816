"""What doctor found, and how ranks and their nodes are named in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = Mapping[int, Any]
"""Rank -> what its probe returned."""
Hosts = Mapping[int, str]
"""Rank -> host."""


@dataclass(frozen=True)
class Finding:
    """One line of what doctor found.

    Attributes:
        check: name of the check.
        state: ``ok``; ``info``: nothing to judge; ``warn``: runs, with what the text says;
            ``fix``: a run would fail or go wrong.
        found: what was seen.
        remedy: what to do.
    """

    check: str
    state: str
    found: str
    remedy: str = ""

    def text(self) -> str:
        """Return what was seen and what to do, on one line."""
        return " ".join(self.found.split()) + (f" -> {self.remedy}" if self.remedy else "")


def summary(findings: Sequence[Finding]) -> list[str]:
    """Return the last lines: nothing to fix, or all that is, numbered."""
    wrong = [f for f in findings if f.state == "fix"]
    warnings = sum(f.state == "warn" for f in findings)
    rest = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
    if not wrong:
        return [f"nothing to fix{rest}"]
    return [f"to fix{rest}:", *(f"  {i}. {f.check}: {f.text()}" for i, f in enumerate(wrong, 1))]


def where(ranks: Iterable[int], hosts: Hosts) -> str:
    """``rank 3 on n2``, ``ranks 0-2, 5 on n1 and rank 8 on n2``; no host where none is known."""
    spans: dict[str, list[list[int]]] = {}
    for rank in sorted(ranks):
        of_host = spans.setdefault(hosts.get(rank, ""), [])
        if of_host and of_host[-1][-1] == rank - 1:
            of_host[-1][1:] = [rank]
        else:
            of_host.append([rank])
    texts = []
    for host, of_host in spans.items():
        plural = "s" * (len(of_host) > 1 or len(of_host[0]) > 1)
        text = f"rank{plural} " + ", ".join("-".join(map(str, span)) for span in of_host)
        texts.append(f"{text} on {host}" if host else text)
    return " and ".join(texts)


def by_value(values: Values, hosts: Hosts) -> str:
    """Who has which value: ``2.13.0 on ranks 0-7 on n1; 2.12.1 on ranks 8-15 on n2``."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks_of.setdefault(str(value), []).append(rank)
    return "; ".join(f"{value} on {where(ranks, hosts)}" for value, ranks in ranks_of.items())
