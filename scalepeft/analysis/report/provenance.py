"""What a run is, with what it was made, and how to make it again."""

import json
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from scalepeft.analysis.report.load import Run
from scalepeft.config import changes
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.text import size

UNKNOWN = "not recorded"


def shown(value: Any, limit: int = 200) -> str:
    """Return a setting's value as text, cut where it is long."""
    plain = isinstance(value, str) and "\n" not in value
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]} […]"


def method_of(run: Run) -> str:
    """Return the adapter, its size, and how many parameters it trained."""
    name = run.get("adapter.name") or run.adapter.get("adapter", {}).get("name") or "unknown method"
    rank, count = run.get("adapter.rank"), run.last.get("parameters")
    size = f", {count:,} trained parameters" if isinstance(count, int) else ""
    return f"{name}{'' if rank is None else f' rank {rank}'}{size}"


def base_of(run: Run, short: bool = False) -> str:
    """Return the base and how its weights are held; ``short``: of a long path its end."""
    path = shown(run.get("model.path", "unknown base"))
    if short and len(path) > 30:
        path = f"…/{'/'.join(path.rsplit('/', 2)[-2:])}"
    storage = run.get("model.quant", "none")
    double = " with double quantization" if run.get("model.double_quant") else ""
    held = run.get("train.precision", "unknown dtype") if storage == "none" else storage
    return f"{path} in {held}{double}"


def standing(run: Run) -> tuple[str, str]:
    """Return the word that matters of how far a run is, and the rest."""
    state = f"{run.status['state']}, step {step_of(run)}"
    word, _, rest = state.partition(" " if state.startswith(("finished", "stopped")) else ", ")
    return word, rest


def step_of(run: Run) -> str:
    """Return the newest step, and of how many."""
    step, steps = run.status["step"], run.status["steps"]
    return f"{step:,}" + (f" of {steps:,}" if steps else "")


def _departures(run: Run) -> str:
    """Where the run departs from its protocol."""
    try:
        found = cfg.deviations(cfg.from_dict({**run.config, "run_dir": str(run.folder)}))
    except ValueError as error:
        return f"cannot be told: config.yaml is not one of this version ({error})"
    if run.evaluations:  # what was generated with stands in the scores, and may be other than here
        found = {key: pair for key, pair in found.items() if not key.startswith("evaluate.")}
    for evaluation in run.evaluations:
        held = evaluation.scores["deviations"]
        found |= {key: pair for key, pair in held.items() if key.startswith("evaluate.")}
    listed = (f"{key} is {shown(now)}, not {shown(was)}" for key, (was, now) in found.items())
    return "; ".join(listed) or "none"


def _ranks_of(run: Run) -> str:
    """Engine and ranks over the starts."""
    engines = dict.fromkeys(str(e.get("engine", "?")) for e in run.starts)
    worlds = [e["world_size"] for e in run.starts]
    turns = [w for i, w in enumerate(worlds) if i == 0 or w != worlds[i - 1]]
    word = "rank" if turns == [1] else "ranks"
    return f"{' → '.join(engines)} on {' → '.join(map(str, turns))} {word}" if worlds else UNKNOWN


def _devices_of(run: Run) -> str:
    """The devices of the newest start."""
    names = [str(rank.get("device") or UNKNOWN) for rank in run.last.get("per_rank") or []]
    return ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)) or UNKNOWN


def about(run: Run) -> list[list[str]]:
    """Return the rows of a run's description."""
    protocol, restarts = run.get("data.protocol"), max(0, len(run.starts) - 1)
    task = run.get("data.name", "unknown task")
    again = f"{restarts} restart{'' if restarts == 1 else 's'}"
    rows = {
        "method": method_of(run),
        "base": base_of(run),
        "task": f"{task}, protocol {protocol}" if protocol else task,
        "departs from the protocol in": _departures(run) if protocol else None,
        "engine": _ranks_of(run),
        "devices": _devices_of(run),
        "status": f"{run.status['state']}, step {step_of(run)}, {again}",
    }
    return [[name, text] for name, text in rows.items() if text is not None]


def settings(runs: list[Run]) -> dict[str, Any]:
    """Return what differs between the runs; of one run, from defaults and protocol."""
    one, flat = len(runs) == 1, [dict(changes.flatten(run.config)) for run in runs]
    names = ["all settings" if one else f"all settings of {run.name}" for run in runs]
    dumped = [yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs]
    files = [{"name": n, "text": text[:50_000]} for n, text in zip(names, dumped, strict=True)]
    columns = {run.name: held for run, held in zip(runs, flat, strict=True)}
    protocol, keys = _protocol_of(runs[0]), sorted({key for held in flat for key in held})
    said = "settings differ between the runs."
    if one:
        defaults = _defaults_of(runs[0])
        if defaults is None:
            text = "config.yaml is lost or not one of this version: not compared with the defaults."
            return {"files": files, "remarks": [], "warnings": [text], "table": None}
        columns = {"here": flat[0], "protocol": defaults | protocol, "default": defaults}
        columns = {k: v for k, v in columns.items() if protocol or k != "protocol"}
        keys, said = list(flat[0]), "settings are not the default."
    rows = []
    for key in keys:
        held = {name: column.get(key) for name, column in columns.items()}
        if any(value != flat[0].get(key) for value in held.values()):
            known = {"protocol": protocol} if one else {}
            told = [name for name, column in columns.items() if key in known.get(name, column)]
            rows.append([key, *(shown(v, 80) if n in told else "–" for n, v in held.items())])
    table = {"head": ["setting", *columns], "rows": rows, "align": "l" * (1 + len(columns))}
    text = f"{len(rows)} of {len(keys)} {said}"
    return {"files": files, "remarks": [text], "warnings": [], "table": table if rows else None}


def _defaults_of(run: Run) -> dict[str, Any] | None:
    """Dotted key -> default of every setting; None where its config is not of this version."""
    try:
        built = {section: plain() for section, plain in cfg.PLAIN.items()}
        for section in cfg.NAMED:
            name = str(run.get(f"{section}.name"))
            built[section] = cfg.config_class(section, name)(name=name)
    except (UserError, TypeError, ValueError):
        return None
    return dict(changes.flatten({section: cfg.to_dict(held) for section, held in built.items()}))


def _protocol_of(run: Run) -> dict[str, Any]:
    """Dotted key -> value of the protocol that a run names; empty without one."""
    try:
        cls = cfg.config_class("data", str(run.get("data.name")))
        protocol = cls.PROTOCOLS[run.get("data.protocol")]  # type: ignore[attr-defined]
    except (UserError, KeyError):
        return {}
    return dict(changes.flatten({"data": protocol.data, "evaluate": protocol.evaluate}))


def origin(run: Run) -> dict[str, Any]:
    """Return hardware, versions, digests, checkpoints, starts, commands."""
    state = run.checkpoint["state"] if run.checkpoint else {}
    base = state.get("base") or run.adapter.get("base_model") or {}
    flat = dict(changes.flatten(run.config))
    held = {"on its GPU": run.peak.get("peak_memory"), "on its host": run.peak.get("peak_resident")}
    memory = [f"{n / 2**30:.2f} GiB {where}" for where, n in held.items() if isinstance(n, int)]
    checkpoint = "none"
    if run.checkpoint:
        files = [info["bytes"] for info in run.checkpoint["files"].values()]
        checkpoint = f"step {run.checkpoint['step']:,}: {len(files)} files, {size(sum(files))}"
    rows = [
        ["versions", _listed(run.last.get("versions") or {})],
        ["commit of scalepeft", str(run.last.get("commit") or UNKNOWN)],
        ["devices", _devices_of(run)],
        ["most memory that rank 0 held", ", ".join(memory) or UNKNOWN],
        ["seeds", _listed({k: v for k, v in flat.items() if k.endswith("seed")})],
        ["base, fingerprint of its files", _digest(base.get("fingerprint"))],
        ["training rows, fingerprint", _digest(state.get("data"))],
        ["adapter, sha256", _digest(run.adapter.get("sha256")) if run.adapter else "not written"],
        ["newest checkpoint that verifies", checkpoint],
    ]
    table = {"head": ["", ""], "rows": rows, "align": "ll"}
    return {"name": run.name, "table": table, "starts": _starts(run), "commands": commands(run)}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) or UNKNOWN


def _digest(value: object) -> str:
    return f"{str(value)[:16]}…" if value else UNKNOWN  # enough to tell two apart


def _starts(run: Run) -> dict[str, Any]:
    rows = []
    for number, start in list(enumerate(run.starts, 1))[-50:]:
        when = time.localtime(start["time"]) if "time" in start else None
        hosts = list(
            dict.fromkeys(str(r["host"]) for r in start.get("per_rank") or [] if "host" in r)
        )
        hosts = hosts or [str(start.get("host", "–"))]
        more = f" and {len(hosts) - 4} more" if len(hosts) > 4 else ""
        known = [str(start.get(key, "–")) for key in ("engine", "job", "recomputed_steps")]
        date = time.strftime("%Y-%m-%d %H:%M:%S", when) if when else "–"
        at = [str(number), date, f"{start['step']:,}", start["world_size"], known[0]]
        rows.append([*at, ", ".join(hosts[:4]) + more, *known[1:]])
    head = ["start", "when", "at step", "ranks", "engine", "host", "Slurm job", "steps lost before"]
    return {"head": head, "rows": rows, "align": "rlrrlllr"}


def commands(run: Run) -> str:
    """Return the shell commands that make a run again, out of its resolved config."""
    world = run.last.get("world_size", 1)
    launch = f"torchrun --nproc-per-node {world} -m scalepeft" if world > 1 else "scalepeft"
    new = str(Path("runs") / f"{run.folder.resolve().name}-again")
    stop = " train.stop_at=null" if run.get("train.stop_at") else ""
    config = shlex.quote(str(run.folder / "config.yaml"))
    lines = [f"{launch} train {config} run_dir={shlex.quote(new)}{stop}"]
    flags = {"base": " --base", "tuned": "", "merged": " --merged"}
    for evaluation in run.evaluations:
        if evaluation.which == "merged":
            lines.append(f"scalepeft merge {shlex.quote(new)} {shlex.quote(new + '/merged')}")
        if evaluation.which in flags:
            words = [f"{launch} evaluate {shlex.quote(new)}{flags[evaluation.which]}"]
            for key, value in evaluation.scores["evaluate"].items():
                if value != run.get(f"evaluate.{key}"):
                    words.append(shlex.quote(f"evaluate.{key}={json.dumps(value)}"))
            lines.append(" ".join(words))
    return "\n".join(lines)
