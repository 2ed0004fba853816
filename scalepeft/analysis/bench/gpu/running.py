"""Right runs, through the command line: stopped, killed and resumed bitwise; one fsdp2 rank."""

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

from scalepeft.adapters.layout import WEIGHTS
from scalepeft.analysis.bench.gpu.session import SCALEPEFT, Session
from scalepeft.core.preemption import STOPPED

RUN = (
    "model.path=builtin:tiny", "data.name=toy", "data.train_size=300", "adapter.rank=4",
    "engine.name=single", "train.precision=bf16", "train.lr=3e-3", "train.global_batch=8",
    "train.micro_batch=4", "train.max_steps=24", "train.save_every=4",
)  # fmt: skip
CASES = {
    "hoft, nf4": ("adapter.name=hoft", "model.quant=nf4"),
    "lora, dropout, int8": ("adapter.name=lora", "adapter.dropout=0.1", "model.quant=int8"),
}


def resumed(session: Session) -> dict[str, Any]:
    """Is the adapter of a run that was stopped and killed that of an undisturbed one, bitwise?"""
    cases = list(CASES.items())[: 1 if session.tiny else None]
    return {name: session.attempt(_resumed, settings) for name, settings in cases}


def _resumed(session: Session, settings: tuple[str, ...]) -> dict[str, Any]:
    whole, cut = session.out / "runs/whole", session.out / "runs/cut"
    shutil.rmtree(whole.parent, ignore_errors=True)
    words = ("train", *RUN, f"engine.device={session.device.type}", *settings)
    again = (*words, f"run_dir={cut}")
    with ThreadPoolExecutor(1) as pool:
        undisturbed = pool.submit(session.call, *words, f"run_dir={whole}")
        session.call(*again, "train.stop_at=7", expect=(STOPPED,))
        found = {"stopped after": 7, "killed after": _kill(session, again, cut / "metrics.jsonl")}
        session.call(*again)
        undisturbed.result()
    one, other = ((d / "adapter" / WEIGHTS).read_bytes() for d in (whole, cut))
    if one != other:
        fault = f"the resumed adapter differs: {whole.parent} is kept"
        return {**found, "bitwise": False, "fault": fault}
    shutil.rmtree(whole.parent)
    return {**found, "bitwise": True}


def _kill(session: Session, words: tuple[str, ...], metrics: Path) -> int:
    """Kills a run that goes on after 12 steps; returns how many it had written down."""
    with subprocess.Popen([*SCALEPEFT, *words], stdout=DEVNULL, stderr=PIPE, text=True) as process:
        while process.poll() is None and metrics.read_bytes().count(b"\n") < 12:
            if time.monotonic() > session.end:
                break
            time.sleep(0.005)
        process.kill()
        said = process.communicate()[1]
    steps = metrics.read_bytes().count(b"\n")
    if process.returncode != -9 or steps < 12:
        where = f"ended with {process.returncode} after step {steps}"
        raise RuntimeError(f"{where}, where it was to be killed after 12: {said[-400:]}")
    return steps


def one_rank(session: Session) -> dict[str, Any]:
    """Collectives, and 4-bit bytes through fsdp2's all-gather, as ``doctor`` tries them."""
    out = session.call("doctor", "--json", f"--run-dir={session.out}", expect=(0, 1))
    said, checks = json.loads(out), ("links", "GPU links", "4-bit bytes")
    found: dict[str, Any] = {
        name: value if isinstance(value, str) else value[1]  # (state, text)
        for name, value in said["ranks"][0].items() if name in checks
    }  # fmt: skip
    wrong = [f["found"] for f in said["findings"] if f["state"] == "fix" and f["check"] in checks]
    return found | ({"fault": "; ".join(wrong)} if wrong else {})
