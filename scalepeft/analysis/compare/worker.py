"""What a cell's run is to the comparison: a child process and the figures it leaves."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from scalepeft.config.schema import RunConfig
from scalepeft.core.files import read_lines
from scalepeft.core.preemption import FINISHED, STOPPED, USER_ERROR, StopFlag, Stopping
from scalepeft.eval import scores


def run_child(arguments: list[str], log: Path, stop: StopFlag) -> int:
    """Run ``python -m scalepeft ARGUMENTS``, hand a stop signal on to it; return its exit code.

    Raises:
        Stopping: it was told to stop, by us or by somebody else.
    """
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    forwarded = False
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "scalepeft", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # Ctrl-C reaches it once, through us
        )
        while process.poll() is None:
            if stop.signal is not None and not forwarded:
                process.send_signal(stop.signal)
                forwarded = True
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    if process.returncode == STOPPED or (forwarded and process.returncode != FINISHED):
        raise Stopping
    return process.returncode


def failure_reason(code: int, log: Path, start: int) -> tuple[str, str]:
    """Return (state, reason) of a failed child: ``failed`` would come again, ``broke`` may not.

    Args:
        code: its exit code, negative for a signal.
        log: what it printed.
        start: where its own part of the log begins, in bytes.
    """
    if code < 0:
        more = " (out of memory?)" if -code == signal.SIGKILL else ""
        return "broke", f"killed by {signal.Signals(-code).name}{more}"
    text = log.read_bytes()[start:].decode(errors="replace").strip()
    errors = re.findall("(scalepeft: error|FloatingPointError): (.*)", text)
    for kind, reason in reversed(errors):
        if kind == "FloatingPointError":
            return "failed", f"diverged: {reason}"
        if code == USER_ERROR:
            return "failed", reason
    last = text.splitlines()[-1].strip() if text else "printed nothing"
    return "broke", f"exit code {code}: {last}"[:300]


def read_result(config: RunConfig, name: str) -> tuple[dict[str, Any], list[Path]]:
    """Read the figures of a finished ``training`` or ``evaluation`` from the run folder.

    Returns:
        The figures and the files that they are from. Of a training ``loss``: held-out, after the
        last step (None: not finite), ``seconds``: of the training steps, ``peak_memory``: bytes,
        ``memory``: ``cuda`` (the allocator's peak of rank 0) or ``resident`` (of the process).
        Of an evaluation the headline ``metric``, its ``score``, and ``share``: it is one.
    """
    folder = Path(config.run_dir)
    if name == "evaluation":
        file = folder / "eval" / config.data.name / "scores.json"
        headline, metric = scores.first(scores.read(file))
        return {"metric": headline, "score": metric["value"], "share": metric["share"]}, [file]
    files = [folder / "metrics.jsonl", folder / "validation.jsonl"]
    steps, held_out = (read_lines(file, "step") for file in files)
    events = read_lines(folder / "events.jsonl", "event")
    start = next(e for e in reversed(events) if e["event"] == "start")
    cuda = [e["peak_memory"] for e in events if e.get("peak_memory")]
    resident = [e["peak_resident"] for e in events if e.get("peak_resident")]
    seconds = sum(row["seconds"] for row in steps)
    last = held_out[-1] if held_out and held_out[-1]["step"] == steps[-1]["step"] else {}
    result = {
        "loss": last.get("loss"),
        "rows": last.get("rows"),
        "parameters": start["parameters"],
        "device": start["per_rank"][0]["device"],
        "ranks": start["world_size"],
        "versions": start["versions"],
        "steps": steps[-1]["step"],
        "seconds": seconds,
        "tokens_per_second": sum(r["tokens_per_second"] * r["seconds"] for r in steps) / seconds,
        "peak_memory": max(cuda or resident, default=None),
        "memory": "cuda" if cuda else "resident",
    }
    return result, files
