"""What decides a cell's training, its evaluation and the speed of its steps, each as a hash.

Files count by content and not by place; a key that changes neither (``data.workers``,
``train.save_every``, ``evaluate.batch_size``) is in none of them.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from scalepeft.config import changes
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.fields import Decides
from scalepeft.core.files import read_mapping


def training(config: RunConfig, inputs: dict[str, Any]) -> str:
    """What decides the adapter and its held-out loss."""
    return _sha(_training(config, inputs))


def speed(config: RunConfig, inputs: dict[str, Any]) -> str:
    """What decides the seconds of a step too."""
    return _sha([_training(config, inputs), changes.deciding(config, Decides.SPEED)])


def evaluation(config: RunConfig, inputs: dict[str, Any]) -> str:
    """What decides the score of a trained adapter."""
    kept = changes.deciding(config, Decides.PREDICTIONS, Decides.SCORES, but=(Decides.FILES,))
    return _sha([kept, inputs.get("test")])


def attempt(config: RunConfig, inputs: dict[str, Any], evaluated: bool) -> str:
    """All that a failure may come from: under another key it is tried again."""
    dropped = ("run_dir", "pipeline", *([] if evaluated else ["evaluate"]))
    values = {k: v for k, v in cfg.to_dict(config).items() if k not in dropped}
    known = {k: v for k, v in inputs.items() if evaluated or k != "test"}
    return _sha([values, known])


def evaluate_settings(config: RunConfig, folder: Path) -> list[str]:
    """``key=value`` for ``scalepeft evaluate FOLDER`` where the run there was begun with others.

    Raises:
        UserError: its config.yaml is gone or broken.
    """
    held = read_mapping(folder / "config.yaml", yaml.safe_load, f"remove {folder}: it is run again")
    old = dict(changes.flatten(cfg.to_dict(cfg.from_dict(held))))
    other_engine = old["engine.name"] != config.engine.name
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in changes.flatten(cfg.to_dict(config))
        if changes.matches_key(key, changes.for_evaluation())
        and (old.get(key) != value or (other_engine and key.startswith("engine.")))
    ]


def _training(config: RunConfig, inputs: dict[str, Any]) -> list[Any]:
    kept = changes.deciding(config, *changes.LEARNED, Decides.LENGTH)
    if "base" not in inputs:  # not a folder: the name is all there is to know it by
        kept |= {"model.path": config.model.path, "model.revision": config.model.revision}
    if "tokenizer" in inputs:  # known by its content
        kept.pop("model.tokenizer", None)
    return [kept, {k: v for k, v in inputs.items() if k != "test"}]


def _sha(known: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
