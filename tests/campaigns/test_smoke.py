"""A few disturbances of each campaign, so that they cannot rot (launch/campaign.sh)."""

import importlib
import os
import time
from pathlib import Path
from random import Random

import pytest
from tally import Tally


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "limit"), [("kills", 2), ("damage", 60), ("full_disks", 2), ("launches", 3)]
)
def test_a_campaign_counts_what_it_does(name: str, limit: int, tmp_path: Path) -> None:
    if name == "full_disks" and os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    tally = Tally(Random(1), time.monotonic() + 240, limit)
    importlib.import_module(name).campaign(tmp_path, tally)
    assert limit <= tally.tried <= limit + 1 and tally.survived == tally.tried, tally.faults
    assert (tally.silent, tally.tracebacks, tally.faults) == (0, 0, [])
    assert tally.lost <= 6
    row = tally.row(name, 1, 1)
    assert row.count("|") == 11 and f"| {tally.tried} | {tally.survived} |" in row
