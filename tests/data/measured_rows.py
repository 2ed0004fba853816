"""Rows -> tokens against ``datasets.map``: python measured_rows.py SHARED ROWS FOLDER.

Each figure is a process of its own; CPU is user and system time with all children, memory the
largest resident set of one process over that after its imports.
"""

import gzip
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def usage() -> tuple[float, float]:
    """(CPU seconds with children, MiB of the largest process)."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    parts = [resource.getrusage(w) for w in who]
    return sum(p.ru_utime + p.ru_stime for p in parts), max(p.ru_maxrss for p in parts) / 1024


def ours(shared: Path, file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    from scalepeft.data import token_file
    from scalepeft.data.tasks.math import Math, MathConfig

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer/mistral_v1")
    task = Math(MathConfig(train=[str(file)], test_rows="keep", cache=str(folder)), tokenizer)
    measured(lambda: token_file.files(task, tokenizer, 32000, [2]))


def theirs(shared: Path, file: Path, folder: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer/mistral_v1")
    prompt = "Below is an instruction ...\n\n### Instruction:\n{}\n\n### Response:"

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        asked = tokenizer([prompt.format(q) for q in rows["question"]])["input_ids"]
        told = tokenizer(rows["answer"], add_special_tokens=False)["input_ids"]
        ids = [[*a, *t, 2][:512] for a, t in zip(asked, told, strict=True)]
        labels = [[*[-100] * len(a), *t, 2][:512] for a, t in zip(asked, told, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def work() -> None:
        held = datasets.load_dataset("json", data_files=str(file), cache_dir=str(folder))["train"]
        held.map(encode, batched=True, num_proc=2, remove_columns=held.column_names)

    measured(work)


def measured(work: object) -> None:
    cpu, memory = usage()
    begin = time.monotonic()
    work()  # type: ignore[operator]
    now = usage()
    print(f"{time.monotonic() - begin:.0f} s, {now[0] - cpu:.0f} CPU s, {now[1] - memory:.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1] in ("ours", "theirs"):
        {"ours": ours, "theirs": theirs}[sys.argv[1]](*map(Path, sys.argv[2:]))
        raise SystemExit
    shared, count, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    text = gzip.decompress((shared / "gsm8k/train.jsonl.gz").read_bytes()).decode()
    rows = list(map(json.loads, text.splitlines()))
    file = folder / "rows.jsonl"
    with file.open("w") as f:
        for i in range(count):
            row = rows[i % len(rows)]
            f.write(json.dumps({**row, "question": f"{i}. {row['question']}"}) + "\n")
    print(f"{count} rows, {file.stat().st_size >> 20} MiB, {os.cpu_count()} cores")
    for name in ("ours", "ours", "theirs"):
        done = subprocess.run(
            [sys.executable, __file__, name, shared, file, folder / name],
            capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        print(name, done.stdout.strip().splitlines()[-1])
