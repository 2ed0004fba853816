"""What a campaign counts, and its row of docs/reliability.md."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from random import Random

import pytest
from processes import ROOT, Job

TABLE = ROOT / "docs" / "reliability.md"
OF_PEERS = re.compile(r"gloo|Connection (closed|reset)|DistNetworkError|RuntimeError: rank \d")


@dataclass
class Tally:
    """Counts until so many are tried or the time is over."""

    rng: Random
    until: float
    limit: int = 10**9
    tried: int = 0
    survived: int = 0
    lost: int = 0
    """Steps that were computed again after a disturbance, at most."""
    silent: int = 0
    """Results that differ from the undisturbed without a word."""
    tracebacks: int = 0
    """Of ours: those of torch's collectives on a survivor whose peer was killed do not count."""
    faults: list[str] = field(default_factory=list)

    def goes_on(self) -> bool:
        return self.tried < self.limit and time.monotonic() < self.until

    def count(self, ok: bool, what: str, text: str = "", times: int = 1) -> None:
        """A disturbance, whether it was survived, and what was printed."""
        self.tried, self.survived = self.tried + times, self.survived + times * ok
        ours = [t for t in text.split("Traceback (most")[1:] if not OF_PEERS.search(t)]
        self.tracebacks += len(ours)
        if not ok or ours:
            self.fault(f"{what}\n{text[-3000:]}")

    def ended(self, job: Job) -> tuple[list[int], str]:
        """Exit codes and what was printed; of ranks that hang, codes that nothing allows."""
        try:
            return job.wait(600)
        except pytest.fail.Exception as error:
            return [99] * len(job.ranks), str(error)

    def compare(self, same: bool, what: str) -> None:
        """A result beside the undisturbed one."""
        if not same:
            self.silent += 1
            self.fault(f"SILENT: {what}")

    def fault(self, what: str) -> None:
        self.faults.append(what)
        print(f"campaign: {what}", flush=True)

    def row(self, name: str, minutes: float, seed: int) -> str:
        git = ["git", "-C", str(ROOT)]
        changes = ["diff", "--quiet", "HEAD", "--", ".", ":!docs/reliability.md"]  # its own rows
        words = [*git, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        commit += "-dirty" * subprocess.run([*git, *changes], check=False).returncode
        numbers = [self.tried, self.survived, self.lost, self.silent, self.tracebacks]
        head = [date.today().isoformat(), commit, name, f"{minutes:.0f}", str(seed)]
        return f"| {' | '.join([*head, *map(str, numbers)])} |\n"


Campaign = Callable[[Path, Tally], None]
"""Disturbs runs in a folder of its own for as long as the tally ``goes_on``."""
