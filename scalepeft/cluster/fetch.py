"""``scalepeft fetch``: what a run takes from the hub, for nodes without a network."""

import json
import os
from pathlib import Path
from typing import Any

from scalepeft.config import files
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import damage, read_json, write_atomically, writing
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.core.text import size
from scalepeft.data import tables
from scalepeft.data.rows import paths_of
from scalepeft.data.tasks.base import SPLITS
from scalepeft.models import hub
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.stage import facts


def run(settings: list[str], out: str | None, check: str | None) -> int:
    """Fetches into ``out``, or reads ``check`` again ("": HF_HOME); returns the exit code. Raises
    UserError: nothing to fetch or to check, or what the hub, the network or the disk refused.
    """
    home, config = _home(check or out), files.load_partly(settings)
    names, listed = _names(config), home / tables.FETCHED
    held: dict[str, Any] = read_json(listed).get("fetched", {})
    if check is not None and (names or held):
        return max(_check(home, name, held.get(name, {})) for name in names or held)
    if not names:
        raise UserError(f"nothing of the hub is named, nor listed in {listed}; name a run's config")
    if hub.unfetched(""):
        raise UserError("HF_HUB_OFFLINE is set: unset it here; it is for the job")
    for name in names:
        commit, paths, more = (_rows if name.startswith("hf://") else _model)(name, config, home)
        kept = {str(p.relative_to(home)): facts(p) for p in sorted(paths) if p.is_file()}
        held[name] = {"commit": commit, "files": kept, **more}
        total = size(sum(file["bytes"] for file in kept.values()))
        print(f"{name}: commit {commit}, {len(kept)} files, {total}", flush=True)
    with writing(listed):  # beside what another fetch has brought meanwhile
        held = read_json(listed).get("fetched", {}) | {name: held[name] for name in names}
        write_atomically(listed, json.dumps({"fetched": held}, indent=1))
    print(f"listed in {listed}; for the job:\nexport HF_HOME={home} HF_HUB_OFFLINE=1")
    return FINISHED


def _home(folder: str | None) -> Path:
    """HF_HOME, from now on the folder if one is named; the token stays where it was."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        if os.environ.get(name):
            raise UserError(f"{name} is set: a job would look there; unset it, here and in the job")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    before = Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()
    os.environ.setdefault("HF_TOKEN_PATH", str(before / "token"))
    os.environ["HF_HOME"] = str(Path(folder or before).resolve())
    return Path(os.environ["HF_HOME"])


def _names(config: RunConfig) -> list[str]:
    names = [f"model.{key}={name}" for key in ("path", "tokenizer")
             if (name := getattr(config.model, key)) not in (None, hub.BUILTIN)
             and not Path(name).is_dir()]  # fmt: skip
    sources = [source for split in SPLITS for source in getattr(config.data, split)]
    return names + [s for s in sources if s.startswith("hf://") and not paths_of(s)]


def _model(name: str, config: RunConfig, home: Path) -> tuple[str, list[Path], dict[str, Any]]:
    base = hub.open_base(config.model, Ranks())
    _ = base.digests(Ranks()), base.tokenizer, base.ends  # what a run reads, as the hub has it
    key, _, repo = name.partition("=")
    ref = (config.model.revision if key == "model.path" else None) or "main"
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    refs = folder / "refs" / ref
    commit = refs.read_text() if refs.is_file() else ref
    return commit, [refs, *(folder / "snapshots" / commit).rglob("*")], {}


def _rows(source: str, *_: Any) -> tuple[str, list[Path], dict[str, Any]]:
    with tables.explained(source):
        made, split = tables.builder(source)
        next(tables.prepared(made, split), None)
    folder = Path(made.cache_dir)
    builder = {"config_name": folder.parts[-3], "version": folder.parts[-2], "hash": made.hash}
    builder |= {"repo_id": made.repo_id, "dataset_name": made.dataset_name}
    return made.hash, [*folder.rglob("*")], {"builder": builder}  # the commit, but of CONVERTED


def _check(home: Path, name: str, entry: dict[str, Any]) -> int:
    """Reads every byte of one thing again and prints what is wrong with it."""
    kept = entry.get("files", {})
    wrong = [] if kept else [f"FIX   {name}: not fetched"]
    for file, known in kept.items():
        if why := damage(home, {file: known}):
            place = (home / file).resolve() if file.startswith("hub/") else (home / file).parent
            wrong.append(f"FIX   {name}: {why}; remove {place} and fetch again")
    print("\n".join(wrong or [f"ok    {name}: {len(kept)} files"]), flush=True)
    return BROKEN if wrong else FINISHED
