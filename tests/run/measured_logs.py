"""Time and memory of a long run's status, resume, goodput and report, and of many predictions.

    python tests/run/measured_logs.py FOLDER [STEPS] [PREDICTIONS]

FOLDER gets the files. Each figure is of a process of its own, over what it took to import.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from scalepeft.analysis.report import load
from scalepeft.eval.predictions import Predictions
from scalepeft.run.goodput import goodput, lost_since
from scalepeft.run.logs import RowLog
from scalepeft.run.status import status

SAVE_EVERY = 100


def write(folder: Path, steps: int) -> None:
    """A run of this many steps, killed half-way between two saves."""
    folder.mkdir(parents=True)
    start = {"event": "start", "time": 1015.0, "step": 0, "launched": 1000.0, "steps": 2 * steps}
    with (folder / "events.jsonl").open("w") as f:
        f.write(json.dumps({**start, "startup": 5.0, "load": 10.0, "world_size": 1}) + "\n")
        for step in range(SAVE_EVERY, steps + 1, SAVE_EVERY):
            saved = {"event": "saved", "time": 1015.0 + 2 * step, "generation": 1, "step": step}
            f.write(json.dumps({**saved, "seconds": 0.25, "written": 0.5, "bytes": 14496}) + "\n")
    with (folder / "metrics.jsonl").open("w") as f:
        for step in range(1, steps + SAVE_EVERY // 2 + 1):
            row = {
                "step": step, "loss": 5.853874206542969, "lr": 0.0025, "label_tokens": 28,
                "grad_norm": 0.25842928886413574, "sample_index": 4 * step,
                "seconds": 0.017852944000026127, "tokens_per_second": 16411.859018858246,
                "time": 1015.0 + 2 * step,
            }  # fmt: skip
            f.write(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text("train: {}\n")


def resume(folder: Path, steps: int) -> None:
    lost = lost_since(folder, steps, 1e9)
    assert lost["recomputed_steps"] == SAVE_EVERY // 2, lost
    assert RowLog(folder / "metrics.jsonl", steps).last_step == steps


def predict(folder: Path, count: int) -> Predictions:
    prompts = {str(i): f"question {i}" for i in range(count)}
    return Predictions(folder, "toy", {"a": 1}, prompts)


def append(folder: Path, count: int) -> None:
    """From nothing, 16 rows of 900 characters at a time."""
    found = predict(folder, count)
    for first in range(0, count, 16):
        ids = map(str, range(first, min(first + 16, count)))
        found.append([{"id": i, "prediction": f"{i} " + "x" * 800, "cut": False} for i in ids])


def held(field: str) -> float:
    """MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def measure(what: str, folder: Path, count: int) -> None:
    run = {
        "status": lambda: status(folder),
        "goodput": lambda: goodput(folder),
        "report's figures": lambda: load.read(folder, "run"),
        "resume": lambda: resume(folder, count),
        "predictions written": lambda: append(folder, count),
        "predictions opened": lambda: predict(folder, count),
        "predictions opened, torn": lambda: predict(folder, count),
    }[what]
    Path("/proc/self/clear_refs").write_text("5")  # the imports' peak is forgotten
    before = held("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    kept = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    more = held("VmHWM") - before
    del kept
    print(f"| {what} | {count:,} | {cpu:.2f} | {wall:.2f} | {more:.0f} |", flush=True)


def main(folder: Path, steps: int, predictions: int) -> None:
    print("| | rows | CPU s | wall s | MiB more |\n|---|---:|---:|---:|---:|", flush=True)

    def alone(what: str, place: Path, count: int) -> None:
        command = [sys.executable, __file__, "--one", what, str(place), str(count)]
        subprocess.run(command, check=True)

    for count in (steps // 10, steps):
        place = folder / f"run-{count}"
        write(place, count)
        for what in ("status", "goodput", "report's figures", "resume"):
            alone(what, place, count)
    for count in (predictions // 10, predictions):
        place = folder / f"predictions-{count}"
        alone("predictions written", place, count)
        alone("predictions opened", place, count)
        with (place / "toy/predictions.jsonl").open("a") as f:
            f.write('{"id": "0", "predic')
        alone("predictions opened, torn", place, count)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(Path(sys.argv[1]), *map(int, (*sys.argv[2:], 1_000_000, 100_000)[:2]))
