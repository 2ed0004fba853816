"""What doctor found: one line a check, and the list of what to fix."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LABELS = {"ok": "ok", "info": "info", "warn": "warn", "fix": "FIX"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        state: ``ok``; ``info``: nothing to judge; ``warn``: runs, with what the text says;
            ``fix``: a run would fail or go wrong.
        found: what was seen.
        remedy: what to do.
    """

    check: str
    state: Literal["ok", "info", "warn", "fix"]
    found: str
    remedy: str = ""

    def line(self) -> str:
        """One line of the list."""
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{LABELS[self.state]:5} {self.check:13} {' '.join(self.found.split())}{remedy}"


def fix(check: str, found: str, remedy: str = "") -> Finding:
    """What has to be repaired first."""
    return Finding(check, "fix", found, remedy)


def warn(check: str, found: str, remedy: str = "") -> Finding:
    """What costs time or a guarantee, but no run."""
    return Finding(check, "warn", found, remedy)


def summary(findings: Sequence[Finding]) -> list[str]:
    """The last lines: nothing to fix, or all that is, numbered."""
    wrong = [f for f in findings if f.state == "fix"]
    warnings = sum(f.state == "warn" for f in findings)
    rest = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
    if not wrong:
        return [f"nothing to fix{rest}"]
    return [
        f"to fix{rest}:",
        *(
            f"  {i}. {f.check}: {' '.join(f.found.split())}{' -> ' * bool(f.remedy)}{f.remedy}"
            for i, f in enumerate(wrong, 1)
        ),
    ]


def spans(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-7, 9``."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    many = len(parts) > 1 or len(parts[0]) > 1
    return f"rank{'s' * many} " + ", ".join("-".join(map(str, part)) for part in parts)


def where(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """``rank 3 on n2``, ``ranks 0-7 on n1 and ranks 8-15 on n2``; no host where it is not known."""
    of_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        of_host.setdefault(hosts.get(rank, ""), []).append(rank)
    return " and ".join(f"{spans(rs)}{f' on {h}' * bool(h)}" for h, rs in of_host.items())


def by_value(values: Mapping[int, Any], hosts: Mapping[int, str]) -> str:
    """Who has which value: ``2.13.0 on ranks 0-7 on n1; 2.12.1 on ranks 8-15 on n2``."""
    holders: dict[str, list[int]] = {}
    for rank, value in values.items():
        holders.setdefault(str(value), []).append(rank)
    return "; ".join(f"{value} on {where(ranks, hosts)}" for value, ranks in holders.items())
