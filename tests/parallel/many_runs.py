"""Ranks that meet once and then train one run after the other: the program of the big tables.

Its argument is a JSON file with a list of ``[run_dir, settings]``; a ``run_dir`` that exists is
resumed. Each rank prints ``ok RUN_DIR EXIT_CODE`` after each.
"""

import gc
import json
import sys
from pathlib import Path

from scalepeft import train
from scalepeft.config import files as config_files
from scalepeft.core.preemption import StopFlag
from scalepeft.parallel.ranks import Ranks


def main() -> None:
    ranks = Ranks.start("cpu", process_group=True)
    for run_dir, settings in json.loads(Path(sys.argv[1]).read_text()):
        config, _ = config_files.load(None, [*settings, f"run_dir={run_dir}"])
        code = train.run_on(ranks, config, StopFlag(), resume_with_changes=True)
        gc.collect()
        print(f"ok {run_dir} {code}", flush=True)
    ranks.finish()


if __name__ == "__main__":
    main()
