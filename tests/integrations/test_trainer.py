"""transformers' Trainer and TRL's SFTTrainer with our methods as PEFT tuners: numbers, stops, ranks."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, Job
from safetensors.torch import load_file

from scalepeft.models import tiny

trainer_runs = pytest.importorskip("trainer_runs", reason="needs peft (the extra 'dev')")
PROGRAM = (str(Path(__file__).with_name("trainer_runs.py")),)
PORT = {"SCALEPEFT_RENDEZVOUS": ""}  # accelerate's own way of meeting


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny.make(0))


def ranks(runs: list[dict[str, Any]], env: dict[str, str] = PORT, program: Any = PROGRAM) -> Job:
    return Job(2, [json.dumps(runs)], env, program)


def losses(folder: Path) -> list[float]:
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


def wait_for(file: Path, job: Job) -> None:
    limit = time.monotonic() + 90
    while not file.exists():
        if any(rank.poll() is not None for rank in job.ranks) or time.monotonic() > limit:
            pytest.fail(f"no {file.name}\n{job.wait(1)}")
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_signals_far_apart_stop_all_ranks_at_one_step(tmp_path: Path, base: str) -> None:
    """transformers' own just-in-time checkpoint hangs for good here. Resumed, dropout and all, the
    losses are those of the undisturbed run to the bit.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = {"folder": base, "method": "lora", "max_steps": 7, "gradient_accumulation_steps": 2}
    state = {"SCALEPEFT_JOB_STATE": str(tmp_path), **PORT}
    slow = {**run, "out": str(cut), "slow": 0.25}
    job = ranks([{**run, "out": str(whole)}, slow], state)
    wait_for(cut / "rank-1-step-2", job)
    job.ranks[1].send_signal(signal.SIGTERM)
    time.sleep(0.3)
    job.ranks[0].send_signal(signal.SIGTERM)
    codes, text = job.wait()
    assert codes == [75, 75], text
    (saved,) = cut.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert 2 < step < 7 and f"stopped and saved at step {step}; the same command" in text
    for name in ("progress", "stopped"):  # with which the job script has it come back
        assert (tmp_path / name).read_text() == f"step {step}\n"
    codes, text = ranks([{**run, "out": str(cut)}]).wait()
    assert codes == [0, 0], text
    assert losses(cut) == losses(whole) and len(losses(whole)) == 7
    a, b = (load_file(folder / "final/adapter_model.safetensors") for folder in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
