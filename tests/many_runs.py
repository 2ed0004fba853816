"""Ranks that meet once and then train one run after the other: the program of the big tables.

Its argument is a JSON file with a list of ``[run_dir, settings]``; a ``run_dir`` that exists is
resumed. Each rank prints ``ok RUN_DIR EXIT_CODE`` after each.
"""

import gc
import json
import sys
from pathlib import Path

from scalepeft import config as cfg
from scalepeft import train
from scalepeft.parallel.mesh import Ranks
from scalepeft.preemption import StopFlag


def main() -> None:
    ranks = Ranks.start("cpu", process_group=True)
    for run_dir, settings in json.loads(Path(sys.argv[1]).read_text()):
        config, _ = cfg.load(None, [*settings, f"run_dir={run_dir}"])
        code = train.run_on(ranks, config, StopFlag(), resume_with_changes=True)
        gc.collect()
        print(f"ok {run_dir} {code}", flush=True)
    ranks.finish()


if __name__ == "__main__":
    main()
