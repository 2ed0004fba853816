"""COMET of translations, by ``comet-score`` in its own environment, on files (docs/evaluation.md).

unbabel-comet pins older libraries than this package runs with, so it is never imported. Paper:
COMET-22 (Rei et al., WMT 2022); the model's scores times 100, averaged over the rows.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import read_json, write_atomically
from scalepeft.core.preemption import StopFlag, Stopping
from scalepeft.core.stats import mean_interval
from scalepeft.data.tasks.base import Scored

VARIABLE = "SCALEPEFT_COMET"
MODEL = "Unbabel/wmt22-comet-da"
TEXTS = ("src.txt", "mt.txt", "ref.txt")
# comet-score would take itself for a rank of our job, and our packages for its own.
INHERITED = re.compile(r"(?!SLURM_|PMI|TORCHELASTIC_|MASTER_|PYTHON)(?!.*(RANK|WORLD_SIZE))")


def write(folder: Path, rows: list[Scored]) -> None:
    """Write the texts to ``folder/comet``, a row a line."""
    columns = {
        "src.txt": [row.example.meta["question"] for row in rows],
        "mt.txt": [row.score.extracted or "" for row in rows],
        "ref.txt": [row.example.meta["reference"] for row in rows],
        "set.txt": [str(row.example.meta.get("source", "")) for row in rows],
    }
    (folder / "comet").mkdir(parents=True, exist_ok=True)
    for name, texts in columns.items():
        lines = (re.sub(r"[\r\n]+", " ", text) + "\n" for text in texts)
        write_atomically(folder / "comet" / name, "".join(lines))


def compute(folder: Path, stop: StopFlag | None = None) -> dict[str, Any] | None:
    """Score the texts in ``folder/comet``; return what comet.json then holds, None without
    ``SCALEPEFT_COMET`` and older scores. Raises UserError: no such program, it failed, its output
    is not COMET's; Stopping: a signal came, the program was ended.
    """
    inputs, result = folder / "comet", folder / "comet.json"
    digest, (program, model) = digest_of(folder), _program()
    stored = read(folder)
    if stored and stored["texts"] == digest and (not program or stored["model"] == model):
        return stored
    result.unlink(missing_ok=True)  # of other texts
    if not program:
        return None
    arguments = "-s src.txt -t mt.txt -r ref.txt --quiet --only_system --to_json segments.json"
    command = [*program, "--model", model, *arguments.split()]
    (inputs / "segments.json").unlink(missing_ok=True)
    _run(command, inputs, stop)
    names = (inputs / "set.txt").read_text().split("\n")[:-1]
    scores = _segments(inputs / "segments.json", len(names))
    mean, half = mean_interval(scores)
    half = half or 0.0
    rows = [*zip(names, scores, strict=True)]
    results = {
        "score": mean,
        "ci95": [mean - half, mean + half],
        "rows": len(scores),
        "sources": {n: statistics.fmean(x for m, x in rows if m == n) for n in sorted({*names})},
        "model": model,
        "command": shlex.join(command),
        "texts": digest,
    }
    write_atomically(result, json.dumps(results, indent=1))
    return results


def read(folder: Path) -> dict[str, Any] | None:
    """Return what ``compute`` wrote to a folder; None if nothing, or not all of it."""
    stored = read_json(folder / "comet.json")
    return stored if {"score", "ci95", "rows", "model", "texts"} <= stored.keys() else None


def digest_of(folder: Path) -> str:
    """Return the sha256 of the texts in ``folder/comet``."""
    files = (folder / "comet" / name for name in TEXTS)
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files if f.is_file())).hexdigest()


def line(results: dict[str, Any] | None) -> str:
    """Return what ``compute`` returned as a line, or how to get it."""
    if results is None:
        fix = f"in an environment of its own, then {VARIABLE}=ENV/bin/comet-score"
        return f"COMET: not computed (pip install unbabel-comet {fix})"
    (low, high), of = results["ci95"], f"({results['model']}, {results['rows']} rows)"
    return f"COMET: {results['score']:.2f}, 95 % interval {low:.2f} to {high:.2f} {of}"


def _program() -> tuple[list[str], str]:
    """The program with the user's options for it, empty if not set; and the model."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--model", default=MODEL)
    try:
        chosen, words = options.parse_known_args(shlex.split(os.environ.get(VARIABLE, "")))
    except (ValueError, argparse.ArgumentError) as error:
        raise UserError(f"{VARIABLE}={os.environ[VARIABLE]}: {error}") from None
    if not words:
        return [], chosen.model
    if (program := shutil.which(words[0])) is None:
        fix = "it is the path of comet-score in the environment where unbabel-comet is installed"
        raise UserError(f"{VARIABLE}={words[0]}: no such program; {fix}")
    return [os.path.abspath(program), *words[1:]], chosen.model


def _run(command: list[str], inputs: Path, stop: StopFlag | None) -> None:
    log = inputs / "log.txt"
    env = {key: value for key, value in os.environ.items() if INHERITED.match(key)}
    with log.open("w") as out:
        try:
            # In a new session: a signal to our job is ours to handle.
            process = subprocess.Popen(
                command, cwd=inputs, env=env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{VARIABLE}: {command[0]} cannot be run: {error.strerror}") from None
    while process.poll() is None:
        if stop is not None and stop.signal is not None:
            os.killpg(process.pid, 9)
            process.wait()
            raise Stopping
        time.sleep(0.05)
    if process.returncode:
        printed = log.read_text(errors="replace").strip().rpartition("\n")[2].strip()
        what = f"{printed[:300] or 'printed nothing'}; log: {log}"
        raise UserError(f"{command[0]} ended with {process.returncode}: {what}")


def _segments(file: Path, rows: int) -> list[float]:
    """Return the rows' scores times 100; --to_json writes {"mt.txt": [{"COMET": 0.8, ...}]}."""
    try:
        (segments,) = json.loads(file.read_text()).values()
        scores = [100 * float(row["COMET"]) for row in segments]
        if len(scores) != rows or not all(map(math.isfinite, scores)):
            raise ValueError(f"{len(scores)} scores, not {rows} finite ones")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log, what = file.with_name("log.txt"), "is not what comet-score --to_json writes"
        raise UserError(f"{file}: {what} ({error!r:.150}); log: {log}") from None
    return scores
