"""``scalepeft verify``: is a run folder whole? By the functions that resume, evaluate and pipeline
trust, but every byte is read, whatever is kept of an earlier reading.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import damage, digest, read_json, read_lines
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.core.text import one_line, table
from scalepeft.eval import predictions
from scalepeft.run.checkpoint import DamagedCheckpoint, steps_of, verify
from scalepeft.run.folder import older_adapter
from scalepeft.run.stage import Stage, stale

WHOLE, DAMAGED, STALE, ABSENT = "whole", "damaged", "stale", "absent"
Part = tuple[str, str, str]
"""Its state, its name, and why."""


def run(run_dir: str, as_json: bool) -> int:
    """Prints a line for each part of a run's or a pipeline's folder; returns 0 if all that is there
    is whole, 1 if something is damaged, or stale: made from what has changed since.

    Raises:
        UserError: the folder holds nothing of a run.
    """
    found = list(parts(Path(run_dir)))
    if not found:
        raise UserError(f"{run_dir}: nothing of a run is in it; name a run's run_dir")
    if as_json:
        keys = ("state", "part", "reason")
        print(json.dumps([dict(zip(keys, part, strict=True)) for part in found], indent=1))
    else:
        print("\n".join(table(found, left=3)))
    return BROKEN if {DAMAGED, STALE} & {state for state, _, _ in found} else FINISHED


def parts(folder: Path) -> Iterator[Part]:
    """What is in a run folder, in the order in which it is made."""
    base: Any = None
    for stage in _stages(folder):
        old = stale(stage)
        bad = None if old else stage.damage()  # it is made again, and may be set aside by now
        if not stage.done():
            bad = "its manifest is broken or has changed since it was written"
        yield _part(str(stage.done_file.relative_to(folder)), bad, old)
    for step in steps_of(folder):
        place, reason = folder / "checkpoints" / f"step-{step:06d}", None
        try:
            state = verify(place)["state"]
            base = base or state["base"]
        except DamagedCheckpoint as error:
            reason = str(error)
        yield _part(f"checkpoints/{place.name}", reason)
    if (folder / "adapter").is_dir():
        from scalepeft.adapters.inject import read_adapter

        reason = old = None
        try:
            about = read_adapter(folder / "adapter")[2]
            base, old = about.get("base_model") or base, older_adapter(folder, about.get("step"))
        except UserError as error:
            reason = str(error)
        yield _part("adapter", reason, old)
    if (folder / "merged").is_dir():
        from scalepeft.export.streaming import changed

        yield _part("merged", changed(folder / "merged", digest))
    for file in sorted(folder.glob("eval*/*/predictions.jsonl")):
        yield _predictions(folder, file)
    for start in read_lines(folder / "events.jsonl", "tokens", newest_first=True):
        yield from map(_tokens, map(Path, start["tokens"]))
        break
    if base:
        yield _base(base)


def _part(name: str, reason: str | None, old: str | None = None) -> Part:
    return (DAMAGED if reason else STALE if old else WHOLE), name, one_line(reason or old or "")


def _stages(folder: Path) -> Iterator[Stage]:
    """Finished ones, of a pipeline or of a comparison's cell."""
    places = [folder / f"{name}.json" for name in ("training", "evaluation")]
    for file in [*sorted((folder / "stages").glob("*.json")), *places]:
        if file.is_file() and "." not in file.stem and file.stem != "holder":
            yield Stage(file.parent, file.stem, folder)


def _predictions(folder: Path, file: Path) -> Part:
    count, settings = Counter[str](), read_json(file.with_name("settings.json"))
    for _ in predictions.stored(file, settings, count):
        pass
    reason, old, adapter = None, None, folder / "adapter/adapter.safetensors"
    if count["damaged"]:
        reason = f"{count['damaged']} of {count.total()} rows differ from their digest"
    if file.parent.parent.name == "eval" and adapter.is_file():
        old = "of another adapter" if settings.get("subject") != digest(adapter) else None
    return _part(str(file.relative_to(folder)), reason, old)


def _tokens(file: Path) -> Part:
    from scalepeft.data.token_file import whole

    if not file.is_file():
        return ABSENT, str(file), "made again when it is needed"
    return _part(str(file), None if whole(file) else "other tokens than were written")


def _base(recorded: dict[str, Any]) -> Part:
    """The folder that a run's base is recorded in."""
    name, known = f"model.path={recorded.get('path')}", recorded.get("sha256")
    place = Path(str(recorded.get("path")))
    if not place.is_dir() or not isinstance(known, dict):
        return ABSENT, name, "no folder here, or a run without its sha256: not read"
    return _part(name, damage(place, {file: {"sha256": value} for file, value in known.items()}))
