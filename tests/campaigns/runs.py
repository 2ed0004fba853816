"""Small runs that a campaign disturbs, each beside one that nothing happens to."""

import json
from functools import cache
from pathlib import Path

from processes import TINY, Job, adapter_bytes, losses, train
from tally import Tally

SAVE_EVERY = 3
LONG = [*TINY, "train.max_steps=45", f"train.save_every={SAVE_EVERY}", "data.valid_size=12"]
LONG += ["train.eval_every=10", "data.train_size=200"]
LONG += ["adapter.target_modules=[q_proj,down_proj]"]  # a step of two ranks is mostly calls
KINDS = {
    "single": (1, []),
    "single async nf4": (1, ["train.save_mode=async", "model.quant=nf4"]),
    "fsdp2": (2, ["engine.name=fsdp2"]),
    "fsdp2 sharded": (2, ["engine.name=fsdp2", "train.save_mode=sharded"]),
    "fsdp2 async": (2, ["engine.name=fsdp2", "train.save_mode=async"]),
    "ddp async": (2, ["engine.name=ddp", "train.save_mode=async"]),
}


def start(kind: str, run: Path, *settings: str, **env: str) -> Job:
    ranks, words = KINDS[kind]
    program = (env.pop("PROGRAM"),) if "PROGRAM" in env else ("-m", "scalepeft")
    return Job(ranks, ["train", *LONG, *words, f"run_dir={run}", *settings], env, program)


@cache
def reference(kind: str, work: Path) -> Path:
    """The same run, undisturbed."""
    ranks, words = KINDS[kind]
    run = work / f"reference {kind}"
    train(ranks, run, *LONG[len(TINY) :], *words, timeout=600)
    return run


def compare(tally: Tally, kind: str, run: Path, work: Path, what: str) -> None:
    """A finished run beside the undisturbed: adapter, losses and held-out losses, bitwise."""
    want = reference(kind, work)

    def held_out(folder: Path) -> list[float]:
        lines = (folder / "validation.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    for seen in (adapter_bytes, losses, held_out):
        tally.compare(seen(run) == seen(want), f"{kind}: {seen.__name__} of {run}: {what}")


def steps(run: Path) -> int:
    """Rows in the log."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def starts(run: Path) -> list[int]:
    """The step at which each start began to train."""
    file = run / "events.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [row["step"] for row in rows if row["event"] == "start"]
