"""What differs between two configs, and which keys may."""

from typing import Any

# Keys that may differ when a run is resumed: never compared, and with --resume-with-changes.
FREE_TO_CHANGE = ("run_dir", "extensions", "train.stop_at", "evaluate.", "pipeline.")
HARMLESS = (
    "engine.",
    "model.path",  # a moved folder: the base's fingerprint is compared, not its place
    "data.train",  # moved files: the tokenised rows are compared
    "data.valid",
    "data.test",
    "data.on_error",  # so they are here
    "data.workers",
    "data.cache",
    "train.micro_batch",
    "train.save_every",
    "train.save_mode",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.loss_chunk",
    "train.max_nonfinite",
    "train.tensorboard",
    "train.wandb",
    "train.max_steps",  # the schedule is recomputed over the new length
    "train.epochs",
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns dotted key -> (old, new) for every key that differs, without those that are free to
    change.
    """
    flat_old, flat_new = (dict(flatten(d)) for d in (old, new))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in keys
        if flat_old.get(key) != flat_new.get(key) and not matches_key(key, FREE_TO_CHANGE)
    }


def matches_key(key: str, listed: tuple[str, ...]) -> bool:
    """True if ``key`` is listed, or its section is (``engine.``)."""
    return any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in listed)


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flat += flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
