"""predictions.jsonl: appended by example id, each batch on the disk before the next begins."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import lines_of, read_json, read_line, seal, write_atomically, writing
from scalepeft.core.log import say
from scalepeft.core.preemption import tell_job
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.stage import set_aside

KINDS = {"id": str, "asked": str, "prediction": str, "cut": bool}
"""What each row has; ``asked``: digest of its prompt, ``cut``: which lost its beginning. Last comes
``digest``, of the row under the settings.
"""
AGAIN = "make room and run the same command again"
INFORMATIVE = {"examples", "model", "batch"}
"""Settings that change no prediction: rows know what they ask, and weights their fingerprint."""


class Predictions:
    """The predictions of one evaluation, on every rank; rank 0 alone touches the disk."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        settings: dict[str, Any],
        prompts: dict[str, str],
        ranks: Ranks | None = None,
    ) -> None:
        """Continue those of the same target and settings; set others aside."""
        self.run_dir, self.name, self.settings = run_dir, name, settings
        self.path, self.ranks = run_dir / name / "predictions.jsonl", ranks or Ranks()
        self.asked = {i: hashlib.sha256(p.encode()).hexdigest()[:16] for i, p in prompts.items()}
        # By example id, of rows that still ask the same.
        self.done: dict[str, dict[str, Any]] = self.ranks.run_on_main(self._open)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write a batch, a part on each rank; a collective. Raises UserError: the disk refuses."""
        every = [row for part in self.ranks.gather(rows) for row in part]
        batch = [{**row, "asked": self.asked[row["id"]]} for row in every]
        for row in batch:
            row["digest"] = digest_of(row, self.settings)
        self.ranks.run_on_main(lambda: self._write(batch))
        self.done.update((row["id"], {key: row[key] for key in KINDS}) for row in batch)

    def check_ours(self) -> None:
        """Raise UserError if another evaluation, with other settings, has begun here meanwhile."""
        if not self._is_ours():
            raise UserError(
                f"{self.path.parent}: another evaluation of this run has begun with other settings,"
                f" and set these {len(self.done)} predictions aside; run one after the other"
            )

    def _open(self) -> dict[str, dict[str, Any]]:
        folder = self.path.parent
        with writing(folder):
            if self.path.exists() and not self._is_ours():
                target = set_aside(self.run_dir, [self.name])
                say(f"{folder}: predictions of another adapter or other settings: kept in {target}")
            folder.mkdir(parents=True, exist_ok=True)
            marker = json.dumps(self.settings, indent=1, sort_keys=True)
            write_atomically(self.path.with_name("settings.json"), marker)
            done, whole, count = {}, 0, Counter[str]()
            for line, row in self._stored(count):
                whole += len(line) if line.endswith(b"\n") else 0
                if row["id"] in self.asked:
                    done[row["id"]] = {key: row[key] for key in KINDS}
            if bad := count["damaged"]:
                say(f"{self.path}: {bad} rows are damaged or were changed: they are answered again")
            if old := count["old"]:
                say(f"{self.path}: {old} rows of an older version, without digest, are taken so")
            if self.path.exists() and whole != self.path.stat().st_size:  # a kill left a torn line
                good = (line.rstrip(b"\n") + b"\n" for line, _ in self._stored(Counter()))
                write_atomically(self.path, good)
        return done

    def _stored(self, count: Counter[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
        for line, row in stored(self.path, self.settings, count):
            # None: of a test set that may come back
            if self.asked.get(row["id"]) in (None, row["asked"]):
                yield line, row

    def _is_ours(self) -> bool:
        found = read_json(self.path.with_name("settings.json"))
        return _deciding(found) == _deciding(self.settings)

    def _write(self, batch: list[dict[str, Any]]) -> None:
        self.check_ours()
        kept = f"the {len(self.done)} predictions before are kept: {AGAIN}"
        with writing(self.path, kept), self.path.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch)
            f.flush()
            os.fsync(f.fileno())
        tell_job("progress", f"{len(self.done) + len(batch)} predictions")


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in INFORMATIVE and v is not None}


def digest_of(row: dict[str, Any], settings: dict[str, Any]) -> str:
    """What a row's ``digest`` is to be under the settings."""
    return seal(row, seal(_deciding(settings)))[:16]


def stored(
    file: Path, settings: dict[str, Any], count: Counter[str]
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines of predictions.jsonl with their rows; ``count``s what else is to be said."""
    for line in lines_of(file):
        row = read_line(line, *KINDS) or {}
        typed = [type(row.get(key)) for key in KINDS] == [*KINDS.values()]
        # Rows without one are older than all that have one.
        old = "digest" not in row and not count["sealed"]
        if typed and (old or row.get("digest") == digest_of(row, settings)):
            count["old" if old else "sealed"] += 1
            yield line, row
        elif line.endswith(b"\n"):  # else a kill tore it
            count["damaged"] += 1
