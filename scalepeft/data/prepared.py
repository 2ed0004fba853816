"""Prepared rows of a pipeline: each split read, checked and written once, as its examples."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalepeft.core.files import read_lines, write_atomically
from scalepeft.core.log import say
from scalepeft.data.tasks.base import Split, Task, prepared_for, to_prepared


def write(task: Task, split: Split, path: Path) -> dict[str, Any]:
    """Writes a split's examples to ``path``, and beside it what was left out; returns counts."""
    key, count = prepared_for(task, split), 0
    path.parent.mkdir(parents=True, exist_ok=True)

    def lines() -> Iterator[bytes]:
        nonlocal count
        for example in task.stream(split):
            count += 1
            yield (json.dumps(to_prepared(example, key), ensure_ascii=False) + "\n").encode()

    write_atomically(path, lines())
    listed = path.with_name(f"{split}.left-out.txt")
    listed.unlink(missing_ok=True)  # of an earlier reading
    left_out = len(task.skipped)
    if left_out:
        write_atomically(listed, "".join(f"{where}\n" for where in task.skipped))
        say(f"data.{split}: {left_out} broken rows left out, listed in {listed}")
    for line in task.remarks(split):
        say(line)
    counts = {"rows": count, "left_out": left_out, "duplicates": task.repeated}
    counts |= {"control_tokens": len(task.spelling), "test_questions": task.leaks.total()}
    return {**counts, "notes": task.notes}


def overlaps(files: dict[Split, Path]) -> dict[str, int]:
    """``test_questions_in_train`` and so on: how many two splits share, but for case and spaces."""
    asked: dict[str, set[str]] = {
        split: {
            " ".join(str(row["meta"].get("question", row["prompt"])).lower().split())
            for row in read_lines(path, "prompt", "meta")
        }
        for split, path in files.items()
    }
    counts = {}
    for split, other in (("test", "train"), ("test", "valid"), ("valid", "train")):
        common = len(asked.get(split, set()) & asked.get(other, set()))
        counts[f"{split}_questions_in_{other}"] = common
        if common:
            say(f"data.{split}: {common} of its questions are in data.{other} too")
    return counts
