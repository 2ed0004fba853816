"""predictions.jsonl of an evaluation: appended by example id, each batch on the disk before the
next begins.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.checkpoint import write_atomically
from scalepeft.lookup import UserError
from scalepeft.preemption import tell_job
from scalepeft.progress import say


@dataclass
class Predictions:
    """The predictions of one evaluation, on rank 0.

    Attributes:
        path: predictions.jsonl; settings.json beside it says what was evaluated and how.
        settings: that.
        done: example id -> row with ``id``, ``prediction`` and ``cut`` (the prompt lost its
            beginning).
    """

    path: Path
    settings: dict[str, Any]
    done: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> "Predictions":
        """Continues predictions of the same adapter and settings; sets those of others aside."""
        path = folder / "predictions.jsonl"
        found = cls(path, settings, {})
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
        return bool(held == self.settings)

    def _read(self) -> bytes:
        """Fills ``done``; returns the lines that are whole."""
        kept = b""
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
                types = [type(row[key]) for key in ("id", "prediction", "cut")]
            except (ValueError, KeyError, TypeError):
                continue  # generated again
            if types == [str, str, bool]:
                self.done[row["id"]] = row
                kept += line + b"\n"
        return kept

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes a batch of predictions through to the disk.

        Raises:
            UserError: the disk refuses, or another evaluation has taken the folder.
        """
        self.check_ours()
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
