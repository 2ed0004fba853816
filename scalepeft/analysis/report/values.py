"""What a run is, in words."""

import json
from typing import Any

from scalepeft.analysis.report.facts import Run
from scalepeft.config import schema as cfg

UNKNOWN = "not recorded"


def shown(value: Any, limit: int = 200) -> str:
    """A setting's value as text, cut where it is long."""
    plain = isinstance(value, str) and "\n" not in value
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]} […]"


def method_of(run: Run) -> str:
    """The adapter, its size, and how many parameters it trained."""
    name = run.get("adapter.name") or run.adapter.get("adapter", {}).get("name") or "unknown method"
    rank = run.get("adapter.rank")
    count = run.last.get("parameters")
    size = f", {count:,} trained parameters" if isinstance(count, int) else ""
    return f"{name}{'' if rank is None else f' rank {rank}'}{size}"


def base_of(run: Run, short: bool = False) -> str:
    """The base and how its weights are held; ``short``: of a long path its end."""
    path = shown(run.get("model.path", "unknown base"))
    if short and len(path) > 30:
        path = f"…/{'/'.join(path.rsplit('/', 2)[-2:])}"
    storage = run.get("model.quant", "none")
    double = " with double quantisation" if run.get("model.double_quant") else ""
    held = run.get("train.precision", "unknown dtype") if storage == "none" else storage
    return f"{path} in {held}{double}"


def task_of(run: Run) -> str:
    """Task and protocol."""
    protocol = run.get("data.protocol")
    return f"{run.get('data.name', 'unknown task')}" + (
        f", protocol {protocol}" if protocol else ""
    )


def standing(run: Run) -> str:
    """How far the run is, and when it was last heard of."""
    return f"{run.status['state']}, step {step_of(run)}"


def step_of(run: Run) -> str:
    """The newest step, and of how many."""
    step, steps = run.status["step"], run.status["steps"]
    return f"{step:,}" + (f" of {steps:,}" if steps else "")


def departures(run: Run) -> str:
    """Where the run departs from its protocol."""
    try:
        found = cfg.deviations(cfg.from_dict({**run.config, "run_dir": str(run.folder)}))
    except ValueError as error:
        return f"cannot be told: config.yaml is not one of this version ({error})"
    if run.evaluations:  # what was generated with stands in the scores, and may be other than here
        found = {key: pair for key, pair in found.items() if not key.startswith("evaluate.")}
    for evaluation in run.evaluations:
        held = evaluation.scores.get("deviations") or {}
        found |= {key: tuple(pair) for key, pair in held.items() if key.startswith("evaluate.")}
    listed = (f"{key} is {shown(now)}, not {shown(was)}" for key, (was, now) in found.items())
    return "; ".join(listed) or "none"


def ranks_of(run: Run) -> str:
    """Engine and ranks over the starts."""
    engines = list(dict.fromkeys(str(e.get("engine", "?")) for e in run.starts))
    worlds = [e["world_size"] for e in run.starts]
    changes = [w for i, w in enumerate(worlds) if i == 0 or w != worlds[i - 1]]
    word = "rank" if changes == [1] else "ranks"
    return f"{' → '.join(engines)} on {' → '.join(map(str, changes))} {word}" if worlds else UNKNOWN


def devices_of(run: Run) -> str:
    """The devices of the newest start."""
    found: dict[str, int] = {}
    for rank in run.last.get("per_rank") or []:
        name = rank.get("device") if isinstance(rank, dict) else None
        found[str(name or UNKNOWN)] = found.get(str(name or UNKNOWN), 0) + 1
    return ", ".join(f"{n} x {name}" for name, n in found.items()) or UNKNOWN


def about(run: Run) -> list[list[str]]:
    """The rows of a run's description."""
    rows = [
        ["method", method_of(run)],
        ["base", base_of(run)],
        ["task", task_of(run)],
    ]
    if run.get("data.protocol"):
        rows.append(["departs from the protocol in", departures(run)])
    restarts = max(0, len(run.starts) - 1)
    return [
        *rows,
        ["engine", ranks_of(run)],
        ["devices", devices_of(run)],
        ["status", f"{standing(run)}, {restarts} restart{'' if restarts == 1 else 's'}"],
    ]
