"""``python -m scalepeft`` whose disk is full from a step on: FILL names a file that takes what is
left of it, with FILL_ROOM what was kept, too; FILL_AT is the step, at which FILL_SIGNAL comes. It
waits for no disk: the second save in a row that fails ends it.
"""

import os
import sys
from pathlib import Path
from typing import Any

from disks import fill_up

from scalepeft.cli import main
from scalepeft.run import saver
from scalepeft.run.records import RunRecorder

saver.PATIENCE_SECONDS, saver.FINAL_PAUSES = 0.0, ()
log = RunRecorder.log


def log_then_fill(self: RunRecorder, name: str, row: dict[str, Any]) -> None:
    log(self, name, row)
    due = name == "metrics" and row["step"] == int(os.environ.get("FILL_AT", "0"))
    if self.ranks.is_main and due:
        if "FILL_ROOM" in os.environ:
            (self.path / "checkpoints" / ".room").unlink()
        fill_up(Path(os.environ["FILL"]))
        os.kill(os.getpid(), int(os.environ.get("FILL_SIGNAL", "0")))


RunRecorder.log = log_then_fill  # type: ignore[method-assign]
sys.exit(main())
