"""One form for work that is done once for its inputs: pipeline stages, comparison cells, caches.

``NAME.begun.json`` holds the inputs from the first moment on; ``NAME.json`` holds inputs and
outputs and is written last. Killed in between, the same inputs continue; other inputs begin again,
after the old results were set aside.
"""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalepeft import __version__
from scalepeft.config.schema import flatten, renamed_key
from scalepeft.core import files

LARGE = 64 << 20  # bytes
SETTINGS = ("config", "data", "evaluate")  # inputs that are settings by key, dotted in ``config``
MADE_OF = {
    "train": {"rows": "prepare"},
    "merge": {"adapter": "train"},
    "evaluate": {"rows": "prepare", "adapter": "train", "merged": "merge"},
    "report": {"adapter": "train", "scores": "evaluate"},
}
"""Stage of a pipeline -> its inputs that are another stage's outputs."""


class Stage:
    """Named work and its manifests in ``folder``; outputs are relative to ``root`` (its parent)."""

    def __init__(self, folder: Path, name: str, root: Path | None = None) -> None:
        self.name, self.root = name, root or folder.parent
        self.done_file = folder / f"{name}.json"
        self.begun_file = folder / f"{name}.begun.json"

    def done(self) -> dict[str, Any]:
        """The manifest of the finished work; empty where there is none, or a broken one."""
        with suppress(OSError, ValueError):
            return files.read_sealed(self.done_file)
        return {}

    def begun(self) -> dict[str, Any]:
        """The manifest of work in progress; empty likewise."""
        return files.read_json(self.begun_file)

    def outputs(self) -> dict[str, Any]:
        """Relative path -> facts of each file that the finished work made."""
        found = self.done().get("outputs")
        return found if isinstance(found, dict) else {}

    def is_done(self, inputs: Any) -> bool:
        """True if it was finished for these inputs and every output is as it was written."""
        held = self.done().get("inputs")
        return _counting(held, inputs) == plain(inputs) and self.damage(sha256) is None

    def damage(self, hashed: Callable[[Path], str] = files.digest) -> str | None:
        """Why the outputs are not those that the finished work made; None if they are."""
        if not isinstance(self.done().get("outputs"), dict):
            return "its manifest is broken, or has changed since it was written"
        return files.damage(self.root, self.outputs(), hashed)

    def stale(self) -> str | None:
        """Which stages of a pipeline have made something else since this took it; None if none."""
        inputs: Any = self.done().get("inputs")
        folder, others = self.done_file.parent, list[str]()
        for key, name in MADE_OF.get(self.name, {}).items() if isinstance(inputs, dict) else ():
            made, taken = Stage(folder, name).outputs(), inputs.get(key) or {}
            if key == "rows":  # of its splits; "data": of a task that reads no files
                made = taken if "data" in taken else {row: made.get(row) for row in taken}
            others += [name] if taken != made else []
        return f"{', '.join(others)} has made something else since" if others else None

    def is_begun(self, inputs: Any) -> bool:
        """True if it was begun, but not finished, for these inputs."""
        return bool(_counting(self.begun().get("inputs"), inputs) == plain(inputs))

    def begin(self, inputs: Any, **more: Any) -> None:
        """Records the inputs; what was done before is no longer valid."""
        self.done_file.unlink(missing_ok=True)
        self.begun_file.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self.begun_file, json.dumps({"inputs": plain(inputs), **more}))

    def note(self, **more: Any) -> None:
        """Adds to the manifest of work in progress, for a start that continues it."""
        files.write_atomically(self.begun_file, json.dumps({**self.begun(), **more}))

    def finish(
        self, inputs: Any, outputs: Iterable[Path], started: float, **more: Any
    ) -> dict[str, Any]:
        """Writes the manifest, after all it names is on the disk; returns it."""
        made = sorted(outputs)
        for file in made:
            files.fsync(file)
        manifest = {
            "stage": self.name,
            "inputs": plain(inputs),
            "outputs": {str(f.relative_to(self.root)): facts(f) for f in made},
            "finished": time.time(),
            "seconds": time.time() - started,  # of the start that finished it
            "scalepeft": __version__,
            **plain(more),
        }
        self.done_file.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self.done_file, json.dumps(files.sealed(manifest), indent=1))
        self.begun_file.unlink(missing_ok=True)
        return manifest

    def changes(self, inputs: Any) -> str:
        """Names the inputs that differ from those it was done or begun with; empty if none."""
        manifest = self.done() or self.begun()
        held = _counting(manifest.get("inputs"), inputs)
        return differing(held, plain(inputs)) if manifest else ""


def _counting(held: Any, inputs: Any) -> Any:
    """Inputs of an older manifest without settings that no longer count, in today's spelling."""
    if not isinstance(held, dict) or not isinstance(inputs, dict):
        return held
    kept = dict(held)
    for section in SETTINGS:
        old, new = held.get(section), inputs.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            prefix = "" if section == "config" else f"{section}."
            spelled = {renamed_key(prefix + k).removeprefix(prefix): v for k, v in old.items()}
            kept[section] = {key: value for key, value in spelled.items() if key in new}
    return kept


def plain(value: Any) -> Any:
    """A value as JSON gives it back, so that it compares with what was read."""
    return json.loads(json.dumps(value))


def facts(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(file: Path) -> str:
    """The digest of a file, of a large one as it is kept: merged weights may be hundreds of GB."""
    return files.kept_digest(file) if file.stat().st_size >= LARGE else files.digest(file)


def differing(old: Any, new: dict[str, Any], limit: int = 4) -> str:
    """``key: was -> now; ...`` of nested mappings that differ; files by their names alone."""
    was, now = (dict(flatten(d or {})) for d in (old, new))
    named = {}
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            file = key.removesuffix(".bytes").removesuffix(".sha256")
            change = f": {_short(was.get(key))} -> {_short(now.get(key))}"
            named[file] = "" if file != key else change
    more = f" and {len(named) - limit} more" if len(named) > limit else ""
    return "; ".join(key + change for key, change in list(named.items())[:limit]) + more


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Moves what exists of ``names`` to ``folder/replaced-N``; returns that, or None if nothing."""
    present = [name for name in names if (folder / name).exists()]
    if not present:
        return None
    taken = (path.name.rpartition("-")[2] for path in folder.glob("replaced-*"))
    number = 1 + max((int(n) for n in taken if n.isdecimal()), default=0)
    target = folder / f"replaced-{number}"
    for name in present:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(target / name)
    return target


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "..."
