"""predictions.jsonl of an evaluation: appended by example id, each batch on the disk before the
next begins.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import tell_job

TOLD = ("examples", "model", "batch")
"""Settings that are told, and change no prediction that is there: each row knows what it asks, and
weights are known by their fingerprint."""


@dataclass
class Predictions:
    """The predictions of one evaluation, on rank 0.

    Attributes:
        path: predictions.jsonl; settings.json beside it says what was evaluated and how.
        settings: that.
        asked: example id -> digest of its prompt, of every row of this evaluation.
        done: example id -> row with ``id``, ``asked``, ``prediction`` and ``cut`` (the prompt lost
            its beginning), of rows that still ask the same.
    """

    path: Path
    settings: dict[str, Any]
    asked: dict[str, str]
    done: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], prompts: dict[str, str]) -> "Predictions":
        """Continues predictions of the same adapter and settings; sets those of others aside.

        Args:
            folder: of the evaluation.
            settings: what is evaluated and how.
            prompts: example id -> prompt. More rows, fewer or other ones change nothing for those
                that stay.
        """
        path = folder / "predictions.jsonl"
        asked = {i: hashlib.sha256(p.encode()).hexdigest()[:16] for i, p in prompts.items()}
        found = cls(path, settings, asked, {})
        try:
            if path.exists() and not found._ours():
                number = 1 + len(list(folder.parent.glob(f"{folder.name}.old-*")))
                folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
                say(
                    f"{folder}: predictions of another adapter or other settings: kept as"
                    f" {folder.name}.old-{number}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(found._marker, json.dumps(settings, indent=1, sort_keys=True))
            lines = found._read()
            if path.exists() and lines != path.read_bytes():
                write_atomically(path, lines.decode())  # without what a kill left torn
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        return found

    @property
    def _marker(self) -> Path:
        return self.path.with_name("settings.json")

    def _ours(self) -> bool:
        try:
            held: Any = json.loads(self._marker.read_text())
        except (OSError, ValueError):
            return False
        if not isinstance(held, dict):
            return False
        both = ({k: v for k, v in s.items() if k not in TOLD} for s in (held, self.settings))
        return next(both) == next(both)

    def _read(self) -> bytes:
        """Fills ``done``; returns the lines that are whole."""
        kept = b""
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
                types = [type(row[key]) for key in ("id", "asked", "prediction", "cut")]
            except (ValueError, KeyError, TypeError):
                continue  # generated again
            if types == [str, str, str, bool]:
                now = self.asked.get(row["id"])
                if now == row["asked"]:
                    self.done[row["id"]] = row
                if now in (None, row["asked"]):  # None: of a test set that may come back
                    kept += line + b"\n"
        return kept

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes a batch of predictions through to the disk.

        Raises:
            UserError: the disk refuses, or another evaluation has taken the folder.
        """
        self.check_ours()
        rows = [{**row, "asked": self.asked[row["id"]]} for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; the {len(self.done)}"
                " predictions before are kept: make room and run the same command again"
            ) from None
        self.done.update((row["id"], row) for row in rows)
        tell_job("progress", f"{len(self.done)} predictions")

    def check_ours(self) -> None:
        """Raises UserError: another evaluation, with other settings, has begun here meanwhile."""
        if not self._ours():
            raise UserError(
                f"{self.path.parent}: another evaluation of this run has begun with other settings,"
                f" and set these {len(self.done)} predictions aside; run one after the other"
            )
