"""What a run is, and with what it was made."""

import json
from collections import Counter
from itertools import groupby
from typing import Any

from scalepeft.analysis.report.load import Run
from scalepeft.config import changes
from scalepeft.config import schema as cfg
from scalepeft.core.text import size

UNKNOWN = "not recorded"


def shown(value: Any, limit: int = 200) -> str:
    """Return a setting's value as text, cut where it is long."""
    plain = isinstance(value, str) and "\n" not in value
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]} […]"


def method_of(run: Run) -> str:
    """Return the adapter, its size, and how many parameters it trained."""
    rank, count = run.get("adapter.rank"), run.last.get("parameters")
    trained = f", {count:,} trained parameters" if count else ""
    name = run.get("adapter.name", "unknown method")
    return f"{name}{'' if rank is None else f' rank {rank}'}{trained}"


def base_of(run: Run) -> str:
    """Return the base and how its weights are held."""
    storage = run.get("model.quant", "none")
    double = " with double quantization" if run.get("model.double_quant") else ""
    held = run.get("train.precision", "unknown dtype") if storage == "none" else storage
    return f"{run.get('model.path', 'unknown base')} in {held}{double}"


def step_of(run: Run) -> str:
    """Return the newest step, and of how many."""
    step, steps = run.status["step"], run.status["steps"]
    return f"{step:,}" + (f" of {steps:,}" if steps else "")


def ranks_of(run: Run) -> str:
    """Return engine and ranks over the starts."""
    engines = dict.fromkeys(str(start.get("engine", "?")) for start in run.starts)
    worlds = [world for world, _ in groupby(start["world_size"] for start in run.starts)]
    ranks = f"{' → '.join(map(str, worlds))} rank{'' if worlds == [1] else 's'}"
    return f"{' → '.join(engines)} on {ranks}" if worlds else UNKNOWN


def departures(run: Run) -> str:
    """Return where the run departs from its protocol."""
    try:
        found = cfg.deviations(cfg.from_dict({**run.config, "run_dir": str(run.folder)}, True))
    except ValueError as error:
        return f"cannot be told: config.yaml is not one of this version ({error})"
    if run.evaluations:  # what was generated with stands in the scores, and may be other than here
        found = {key: pair for key, pair in found.items() if not key.startswith("evaluate.")}
    for e in run.evaluations:
        found |= e.scores.get("deviations", {})
    listed = (f"{key} is {shown(now)}, not {shown(was)}" for key, (was, now) in found.items())
    return "; ".join(listed) or "none"


def devices_of(run: Run) -> str:
    """Return the devices of the newest start."""
    names = Counter(str(rank.get("device") or UNKNOWN) for rank in run.last.get("per_rank", ()))
    return ", ".join(f"{count} x {name}" for name, count in names.items()) or UNKNOWN


def settings(runs: list[Run]) -> dict[str, Any]:
    """Return what differs between the runs; of one run, from the defaults."""
    one, columns = len(runs) == 1, {run.name: dict(changes.flatten(run.config)) for run in runs}
    keys = list(dict.fromkeys(key for held in columns.values() for key in held))
    if one:
        try:
            columns = {"here": columns[runs[0].name], "default": _defaults(runs[0])}
        except (TypeError, ValueError):
            text = "config.yaml is lost or not one of this version: not compared with the defaults."
            return {"warnings": [text], "table": []}
    first, *others = columns.values()
    rows = [
        [key, *(shown(held[key], 80) if key in held else "–" for held in columns.values())]
        for key in keys
        if any(held.get(key) != first.get(key) for held in others)
    ]
    differ = "are not the default" if one else "differ between the runs"
    remarks = [f"{len(rows)} of {len(keys)} settings {differ}."]
    return {"remarks": remarks, "table": rows and [["setting", *columns], *rows]}


def _defaults(run: Run) -> dict[str, Any]:
    """Dotted key -> default. Raises TypeError or ValueError: no config of this version."""
    built = {section: plain() for section, plain in cfg.PLAIN.items()}
    for section in cfg.NAMED:
        name = str(run.get(f"{section}.name"))
        built[section] = cfg.config_class(section, name)(name=name)
    return dict(changes.flatten({section: cfg.to_dict(held) for section, held in built.items()}))


def origin(run: Run) -> list[list[str]]:
    """Return the rows of versions, hardware, digests and the newest checkpoint."""
    state = run.checkpoint.get("state", {})
    base = state.get("base") or run.adapter.get("base_model") or {}
    flat = changes.flatten(run.config)
    held = {"on its GPU": run.peak.get("peak_memory"), "on its host": run.peak.get("peak_resident")}
    memory = [f"{n / 2**30:.2f} GiB {where}" for where, n in held.items() if n is not None]
    checkpoint = "none"
    if run.checkpoint:
        files = [info["bytes"] for info in run.checkpoint["files"].values()]
        checkpoint = f"step {run.checkpoint['step']:,}: {len(files)} files, {size(sum(files))}"
    return [
        ["versions", _listed(run.last.get("versions", {}))],
        ["commit of scalepeft", str(run.last.get("commit") or UNKNOWN)],
        ["devices", devices_of(run)],
        ["most memory that rank 0 held", ", ".join(memory) or UNKNOWN],
        ["seeds", _listed({key: value for key, value in flat if key.endswith("seed")})],
        ["base, fingerprint of its files", _digest(base.get("fingerprint"))],
        ["training rows, fingerprint", _digest(state.get("data"))],
        ["adapter, sha256", _digest(run.adapter.get("sha256")) if run.adapter else "not written"],
        ["newest checkpoint that verifies", checkpoint],
    ]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) or UNKNOWN


def _digest(value: object) -> str:
    return f"{str(value)[:16]}…" if value else UNKNOWN  # enough to tell two apart
