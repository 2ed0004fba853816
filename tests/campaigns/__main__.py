"""``launch/campaign.sh KIND --minutes N --seed S``: disturbs real runs and counts what became of
them; a row of docs/reliability.md.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from processes import zygote
from tally import TABLE, Campaign, Tally


def campaign(kind: str) -> Campaign:
    """What a word of the command line does."""
    if kind == "kills":
        from kills import campaign as found
    elif kind == "damage":
        from damage import campaign as found
    elif kind == "disks":
        from full_disks import campaign as found
    elif kind == "launches":
        from launches import campaign as found
    else:
        from slurm_jobs import campaign as found
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/campaign.sh", description=__doc__)
    parser.add_argument("kind", choices=["kills", "damage", "slurm", "disks", "launches"])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="no row in docs/reliability.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        os.environ["SCALEPEFT_CACHE"] = f"{folder}/cache"
        begun = time.monotonic()
        tally = Tally(Random(args.seed), begun + 60 * args.minutes)
        try:
            campaign(args.kind)(Path(folder), tally)
        finally:
            zygote().close()
        row = tally.row(args.kind, (time.monotonic() - begun) / 60, args.seed)
    print(row, end="")
    if not args.dry_run:
        with TABLE.open("a") as f:
            f.write(row)
    return int(bool(tally.faults))


if __name__ == "__main__":
    sys.exit(main())
