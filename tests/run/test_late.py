"""Numbers of a step that are read when the next one is on its way: rows, saves, ends as before."""

import re
from pathlib import Path
from typing import Any

from processes import TINY, Job, adapter_bytes, rows, train

LATE = (str(Path(__file__).with_name("late.py")),)
RUN = [
    "train.max_steps=8", "train.save_every=3", "train.keep_checkpoints=3", "data.valid_size=20",
    "train.eval_every=5",
]  # fmt: skip


def late(ranks: int, folder: Path, *settings: str) -> tuple[int, str]:
    job = Job(ranks, ["train", *TINY, f"run_dir={folder}", *settings], program=LATE)
    (code, *_), text = job.wait(120)
    return code, next((w for w in text.splitlines() if w.startswith("order ")), text)[6:]


def numbers(folder: Path) -> list[dict[str, Any]]:
    timing = {"time", "seconds", "tokens_per_second"}
    found = rows(folder)
    if (folder / "validation.jsonl").exists():
        found += rows(folder, "validation.jsonl")
    return [{k: v for k, v in row.items() if k not in timing} for row in found]


def test_a_run_read_late_and_stopped_is_the_same_run(tmp_path: Path) -> None:
    train(1, tmp_path / "once", *RUN)
    # Step 3 is read before its save, 4 before the stop's, 5 before its validation loss.
    assert late(1, tmp_path / "late", *RUN, "train.stop_at=4") == (75, "ssrsrrsr")
    assert late(1, tmp_path / "late", *RUN) == (0, "srsrssrr")
    assert numbers(tmp_path / "late") == numbers(tmp_path / "once")
    assert adapter_bytes(tmp_path / "late") == adapter_bytes(tmp_path / "once")


def test_skipped_steps_read_late_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    run = [
        "train.max_steps=30", "train.lr=1e30", "train.max_grad_norm=0", "train.max_nonfinite=3",
        "train.schedule=constant", "adapter.name=lora", "engine=ddp",
    ]  # fmt: skip
    text = train(2, tmp_path / "early", *run, expect=1)
    code, late_text = late(2, tmp_path / "late", *run)
    error = re.findall(r"not finite for 3 steps in a row, to step \d+", text)
    assert error and code == 1
    assert re.findall(r"not finite for 3 steps in a row, to step \d+", late_text) == error
    assert numbers(tmp_path / "late") == numbers(tmp_path / "early")
    assert [row["loss"] is None for row in numbers(tmp_path / "late")][-4:] == [False] + [True] * 3
