"""Makes the league: bases, rows and comparisons of a list, and its page. See league.sh."""

import argparse
import glob
import gzip
import itertools
import json
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from scalepeft.config.files import config_root
from scalepeft.core.preemption import STOPPED
from scalepeft.models import tiny

Mapping = dict[str, Any]
COMPARE = [sys.executable, "-P", "-m", "scalepeft", "compare"]


def texts_of(row: Any) -> str:
    """A row's text: a question and its answer, one after the other, or the English side."""
    if isinstance(row, str):
        return row.strip()
    if "translation" in row:
        return row["translation"]["en"].strip()
    question = row.get("question", row.get("instruction"))
    answer = re.sub("<<.*?>>", "", row["answer"]) if "question" in row else row["output"]
    return f"{question}\n{answer}"


def read(data: Path, patterns: list[str]) -> list[str]:
    """The texts of all rows of files, JSON, json lines or lines, each once, in their order."""
    found: dict[str, None] = {}
    for pattern in patterns:
        files = sorted(glob.glob(str(data / pattern)))
        if not files:
            sys.exit(f"league: {data / pattern}: no such file; name the folder that holds it")
        for file in files:
            with gzip.open(file, "rt", encoding="utf-8") as f:
                text = f.read()
            if text.startswith("["):
                rows = json.loads(text)
            else:
                rows = [json.loads(t) if t[0] == "{" else t for t in text.splitlines() if t]
            found |= dict.fromkeys(map(texts_of, rows))
    return list(found)


def make_rows(data: Path, out: Path, files: list[str], held_out: int, longest: int = 10**9) -> None:
    """Write ``train.jsonl`` and ``valid.jsonl`` into ``out``."""
    rows = [text for text in read(data, files) if len(text) <= longest]
    random.Random(0).shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("valid", rows[:held_out]), ("train", rows[held_out:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (out / f"{name}.jsonl").write_text(lines)


def make_base(data: Path, name: str, base: Mapping) -> str:
    """A base's folder: one of DATA, or that of a model that is pretrained here, once."""
    if "folder" in base:
        return str(data / base["folder"])
    return str(tiny.pretrain(read(data, base["text"]), base["spec"], base["recipe"], name))


def make_methods(out: Path, methods: Mapping) -> list[str]:
    """Write a file for each method; return their names."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, given in methods.items():
        own = {key: value for key, value in given.items() if key not in ("like", "lr")}
        shipped = config_root() / "adapters" / f"{given.get('like', name)}.yaml"
        adapter = {**yaml.safe_load(shipped.read_text())["adapter"], **own}
        file = out / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"adapter": adapter, "train": {"lr": given["lr"]}}))
        files.append(str(file))
    return files


class Comparisons:
    """Commands, so many at a time; a signal goes to those that run and starts no others."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.stopped, self.running = jobs, False, set[subprocess.Popen[bytes]]()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number: int, _: object) -> None:
        """Hand a signal on."""
        self.stopped = True
        for process in list(self.running):
            process.send_signal(number)

    def run(self, commands: dict[Path, list[str]]) -> int:
        """Run them, each into its log; return the exit code of all."""
        with ThreadPoolExecutor(self.jobs) as pool:
            codes = dict(zip(commands, pool.map(self._one, commands.items()), strict=True))
        broken = [str(log) for log, code in codes.items() if code not in (0, STOPPED)]
        if broken and not self.stopped:
            print(f"league: broke: {', '.join(broken)}", file=sys.stderr)
        return STOPPED if self.stopped else int(bool(broken))

    def _one(self, job: tuple[Path, list[str]]) -> int:
        log, command = job
        if self.stopped:
            return STOPPED
        print(f"league: {log.stem}", file=sys.stderr, flush=True)
        with log.open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
            self.running.add(process)
            code = process.wait()
        self.running.discard(process)
        return code


def commands_of(spec: Mapping, bases: Mapping, out: Path) -> dict[Path, list[str]]:
    """Log -> command of each comparison of the list."""
    commands = {}
    for group in spec["comparisons"]:
        files = make_methods(out / "methods", spec[group.get("methods", "methods")])
        reference = str(out / "methods" / f"{group.get('reference', 'lora')}.yaml")
        places = itertools.product(*(group[k] for k in ("bases", "rows", "steps", "quant")))
        for base, rows, steps, quant in places:
            name = f"{group.get('name', '')}{base}-{rows}-{steps:03}-{quant}"
            paths = [f"data.{k}={out}/rows/{rows}/{k}.jsonl" for k in ("train", "valid")]
            length = [f"train.max_steps={steps}", f"train.warmup_steps={steps // 10}"]
            commands[out / "logs" / f"{name}.log"] = [
                *COMPARE, f"model.path={bases[base]}", f"model.quant={quant}", *spec["settings"],
                *paths, *length, f"--methods={','.join(files)}", f"--reference={reference}",
                *group["options"], f"--out={out}/comparisons/{name}",
            ]  # fmt: skip
    return commands


def main() -> int:
    """Read the words, make what there is to compare, compare, write the page."""
    here = Path(__file__).resolve().parent
    words = argparse.ArgumentParser("league.sh")
    words.add_argument("data", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--list", type=Path, default=here / "league.yaml")
    words.add_argument("--jobs", type=int, default=2)
    words.add_argument("--docs", type=Path, default=here.parent / "docs")
    args = words.parse_args()
    spec, out = yaml.safe_load(args.list.read_text()), args.out.resolve()
    for name, rows in spec["rows"].items():
        make_rows(args.data, out / "rows" / name, **rows)
    bases = {name: make_base(args.data, name, base) for name, base in spec["bases"].items()}
    (out / "logs").mkdir(exist_ok=True)
    code = Comparisons(args.jobs).run(commands_of(spec, bases, out))
    page = [f"--league={out}/comparisons", f"--out={args.docs}"]
    return code or subprocess.run([*COMPARE, *page], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
