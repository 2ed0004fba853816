"""``scalepeft verify``: is a run folder whole? Every byte is read, by what resume goes by."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from scalepeft.adapters.layout import description_file, weights_file
from scalepeft.core.errors import UserError
from scalepeft.core.files import damage, digest, read_json, read_lines
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.core.text import one_line, table
from scalepeft.data import token_file
from scalepeft.eval import predictions
from scalepeft.export import streaming
from scalepeft.run.checkpoint import DamagedCheckpoint, steps_of, verify
from scalepeft.run.folder import older_adapter, read_run_adapter
from scalepeft.run.stage import Stage

Part = tuple[str, str, str]
"""State (whole, damaged, stale: made from what has changed since, absent), name, reason."""


def run(run_dir: str, as_json: bool) -> int:
    """Prints a line for each part; returns 1 if one is damaged or stale. Raises UserError: none."""
    found = list(parts(Path(run_dir)))
    if not found:
        raise UserError(f"{run_dir}: nothing of a run is in it; name a run's run_dir")
    keys = ("state", "part", "reason")
    as_rows = [dict(zip(keys, part, strict=True)) for part in found]
    print(json.dumps(as_rows, indent=1) if as_json else "\n".join(table(found, left=3, indent="")))
    return BROKEN if {"damaged", "stale"} & {part[0] for part in found} else FINISHED


def parts(folder: Path) -> Iterator[Part]:
    """What is in a run folder, in the order in which it is made."""
    cell = [folder / f"{name}.json" for name in ("training", "evaluation")]  # of a comparison
    for file in [*sorted(folder.glob("stages/*.json")), *(f for f in cell if f.is_file())]:
        if "." not in file.stem and not file.stem.startswith("holder"):
            stage = Stage(file.parent, file.stem, folder)
            # What is stale is made again, and may be set aside by now.
            old = stage.stale()
            yield _part(str(file.relative_to(folder)), None if old else stage.damage(), old)
    places = [folder / f"checkpoints/step-{step:06d}" for step in steps_of(folder)]
    for place in places:
        yield _part(f"checkpoints/{place.name}", _why(verify, place))
    about = read_json(description_file(folder / "adapter") or folder / "adapter")
    if (folder / "adapter").is_dir():
        reason = _why(read_run_adapter, folder)
        yield _part("adapter", reason, older_adapter(folder, about.get("step")))
    if (folder / "merged").is_dir():
        yield _part("merged", streaming.changed(folder / "merged", digest))
    for file in sorted(folder.glob("eval*/*/predictions.jsonl")):
        yield _predictions(folder, file)
    starts = read_lines(folder / "events.jsonl", "tokens", newest_first=True)
    for name in next((map(str, start["tokens"]) for start in starts), ()):
        if not Path(name).is_file():
            yield "absent", name, "made again when it is needed"
        else:
            tokens = token_file.whole(Path(name))
            yield _part(name, None if tokens else "other tokens than were written")
    states = (read_json(place / "state.json").get("base") for place in places)
    bases = (base for base in [about.get("base_model"), *states] if isinstance(base, dict))
    yield from (_base(base) for base in islice(bases, 1))


def _part(name: str, reason: str | None, old: str | None = None) -> Part:
    state = "damaged" if reason else "stale" if old else "whole"
    return state, name, one_line(reason or old or "")


def _why(check: Callable[[Path], object], folder: Path) -> str | None:
    try:
        check(folder)
    except (DamagedCheckpoint, UserError) as error:
        return str(error)
    return None


def _predictions(folder: Path, file: Path) -> Part:
    count, settings = Counter[str](), read_json(file.with_name("settings.json"))
    rows = sum(1 for _ in predictions.stored(file, settings, count))
    bad, adapter, old = count["damaged"], weights_file(folder / "adapter"), None
    if file.parent.parent.name == "eval" and adapter.is_file():
        old = "of another adapter" if settings.get("subject") != digest(adapter) else None
    reason = f"{bad} of {rows + bad} rows differ from their digest" if bad else None
    return _part(str(file.relative_to(folder)), reason, old)


def _base(recorded: dict[str, Any]) -> Part:
    name, known = f"model.path={recorded.get('path')}", recorded.get("sha256")
    place = Path(str(recorded.get("path")))
    if not place.is_dir() or not isinstance(known, dict):
        return "absent", name, "no folder here, or its sha256 is not recorded"
    return _part(name, damage(place, {file: {"sha256": value} for file, value in known.items()}))
