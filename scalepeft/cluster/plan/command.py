"""``scalepeft plan``: memory, traffic, times and the grace period of a run, before it queues.

From the config alone, on any machine: models/dimensions.py finds the base's dimensions, simulate.py
runs a step of a few blocks on fake tensors, memory.py makes a rank's bytes of it, planning.py
compares them with a GPU, report.py prints.
"""

import json
from pathlib import Path

from scalepeft.cluster.plan import report
from scalepeft.cluster.plan.planning import Options, plan
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.log import say


def run(settings: list[str], options: Options, as_json: bool, picture: str | None) -> None:
    """Plan the run of a ``train`` command's arguments and print the plan.

    Raises:
        UserError: as ``planning.plan``; or the picture cannot be written.
    """
    if picture is not None and not picture.endswith(".png"):
        raise UserError(f"--plot {picture}: expected FILE.png")
    if picture is not None and not Path(picture).parent.is_dir():
        raise UserError(f"--plot {picture}: no such folder")
    planned = plan(_config(settings), options)
    print(json.dumps(report.as_dict(planned), indent=1) if as_json else report.table(planned))
    if picture is not None:
        report.plot(planned, Path(picture))
        say(f"wrote {picture}")


def _config(settings: list[str]) -> RunConfig:
    """As ``config.load``; what no plan reads, the run folder and the length, may be absent."""
    path = None
    if settings and "=" not in settings[0]:
        path, *settings = settings
    notes: list[str] = []
    values = config_files.values_of(path, settings, notes)
    train = values["train"] = dict(values.get("train") or {})
    if train.get("max_steps") is None and train.get("epochs") is None:
        train["epochs"] = 1.0
    values["run_dir"] = values.get("run_dir") or "unset"
    config = cfg.from_dict(values)
    for note in notes:
        say(note)
    return config
