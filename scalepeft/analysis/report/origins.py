"""With what a run was made and how to make it again: settings, hardware, versions, checkpoints,
commands.
"""

import json
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from scalepeft.analysis.report.blocks import Block, Code, Fold, Heading, Table, Text
from scalepeft.analysis.report.facts import Run, defaults_of, protocol_of
from scalepeft.analysis.report.values import UNKNOWN, devices_of, shown
from scalepeft.config import changes

SHORT = 16  # characters of a digest: enough to tell two apart


def configs(runs: list[Run]) -> list[Block]:
    """What differs between the runs; of one run, what differs from defaults and protocol."""
    flat = [dict(changes.flatten(run.config)) for run in runs]
    if len(runs) == 1:
        found = _from_defaults(runs[0], flat[0])
    else:
        keys = sorted({key for one in flat for key in one})
        rows = [
            [key, *("–" if key not in one else shown(one[key], 80) for one in flat)]
            for key in keys
            if any(one.get(key) != flat[0].get(key) for one in flat)
        ]
        table = Table(["setting", *(run.name for run in runs)], rows, "l" * (1 + len(runs)))
        text = f"{len(rows)} of {len(keys)} settings differ between the runs."
        found = [Text(text), *([table] if rows else [])]
    for run in runs:
        name = "all settings" if len(runs) == 1 else f"all settings of {run.name}"
        dumped = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        found.append(Fold(f"{name} (config.yaml)", [Code(dumped[:50_000])]))
    return found


def _from_defaults(run: Run, flat: dict[str, Any]) -> list[Block]:
    defaults, protocol = defaults_of(run), protocol_of(run)
    if defaults is None:
        text = "config.yaml is lost or not one of this version: not compared with the defaults."
        return [Text(text, warns=True)]
    rows = []
    for key, value in flat.items():
        expected = protocol.get(key, defaults.get(key))
        if value != expected or (key in protocol and value != defaults.get(key)):
            told = shown(protocol[key]) if key in protocol else ""
            rows.append([key, shown(value), told, shown(defaults.get(key))])
    text = f"{len(rows)} of {len(flat)} settings are not the default."
    if not protocol:
        return [Text(text), Table(["setting", "here", "default"], [[*r[:2], r[3]] for r in rows],
                                  "lll")]  # fmt: skip
    return [Text(text), Table(["setting", "here", "protocol", "default"], rows, "llll")]


def origins(runs: list[Run]) -> list[Block]:
    """Hardware, versions, digests, checkpoints, commands."""
    found: list[Block] = []
    for run in runs:
        inner = _origin(run)
        found += inner if len(runs) == 1 else [Fold(run.name, inner)]
    return found


def _origin(run: Run) -> list[Block]:
    state = run.checkpoint["state"] if run.checkpoint else {}
    base = state.get("base") or run.adapter.get("base_model") or {}
    seeds = {k: v for k, v in changes.flatten(run.config) if k.endswith("seed")}
    versions = run.last.get("versions") or {}
    rows = [
        ["versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or UNKNOWN],
        ["commit of scalepeft", str(run.last.get("commit") or UNKNOWN)],
        ["devices", devices_of(run)],
        ["most memory that rank 0 held", _memory(run.peak)],
        ["seeds", ", ".join(f"{k} {v}" for k, v in seeds.items()) or UNKNOWN],
        ["base, fingerprint of its files", _digest(base.get("fingerprint"))],
        ["training rows, fingerprint", _digest(state.get("data"))],
        ["adapter, sha256", _digest(run.adapter.get("sha256")) if run.adapter else "not written"],
        ["newest checkpoint that verifies", _checkpoint(run)],
    ]
    return [
        Table(["", ""], rows, "ll"),
        Heading("Starts"),
        _starts(run),
        Heading("Make it again"),
        Code(commands(run)),
        Text("Settings given to scalepeft evaluate itself, such as data.test, come on top."),
    ]


def _memory(peak: dict[str, Any]) -> str:
    words = {"peak_memory": "on its GPU", "peak_resident": "on its host"}
    found = [
        f"{peak[key] / 2**30:.2f} GiB {where}"
        for key, where in words.items()
        if isinstance(peak.get(key), int)
    ]
    return ", ".join(found) or UNKNOWN


def _digest(value: object) -> str:
    return f"{str(value)[:SHORT]}…" if value else UNKNOWN


def _checkpoint(run: Run) -> str:
    if run.checkpoint is None:
        return "none"
    files = run.checkpoint["files"].values()
    size = sum(info.get("bytes", 0) for info in files)
    return f"step {run.checkpoint['step']:,}: {len(files)} files, {size / 2**20:.1f} MiB"


def _starts(run: Run) -> Table:
    rows = []
    for number, start in list(enumerate(run.starts, 1))[-50:]:
        when = start.get("time")
        ranks = [r for r in start.get("per_rank") or [] if isinstance(r, dict)]
        hosts = list(dict.fromkeys(str(r["host"]) for r in ranks if "host" in r))
        hosts = hosts or [str(start.get("host", "–"))]
        rows.append(
            [
                str(number),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else "–",
                f"{start['step']:,}",
                str(start["world_size"]),
                str(start.get("engine", "–")),
                ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else ""),
                str(start.get("job", "–")),
                str(start.get("recomputed_steps", "–")),
            ]
        )
    head = ["start", "when", "at step", "ranks", "engine", "host", "Slurm job", "steps lost before"]
    return Table(head, rows, "rlrrlllr")


def commands(run: Run) -> str:
    """The shell commands that make a run again, out of its resolved config."""
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
            used = evaluation.scores.get("evaluate")
            for key, value in used.items() if isinstance(used, dict) else ():
                if value != run.get(f"evaluate.{key}"):
                    words.append(shlex.quote(f"evaluate.{key}={json.dumps(value)}"))
            lines.append(" ".join(words))
    return "\n".join(lines)
