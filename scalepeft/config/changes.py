"""What a change of a setting means, derived from the marks of its field (``core.fields``)."""

import functools
from pathlib import Path
from typing import Any

from scalepeft.config.schema import TOP, RunConfig, every_class, flatten, to_dict
from scalepeft.core import registry
from scalepeft.core.fields import Decides, marks_of

LEARNED = frozenset({Decides.ROWS, Decides.TOKENS, Decides.TRAINING})
"""Another value of such a key makes another run."""
EVALUATED = frozenset({Decides.PREDICTIONS, Decides.SCORES})


def marks() -> dict[str, frozenset[Decides]]:
    """Dotted key -> marks; of a key that several adapters, engines or tasks have, all of them."""
    return _marks(tuple(registry.extension_folders()))


@functools.cache
def _marks(_extensions: tuple[Path, ...]) -> dict[str, frozenset[Decides]]:
    found = {key: frozenset({Decides.NOTHING}) for key in TOP}
    for section, cls in every_class():
        for name, decided in marks_of(cls).items():
            key = f"{section}.{name}"
            found[key] = found.get(key, frozenset()) | decided
    return found


def deciding(config: RunConfig, *wanted: Decides, but: tuple[Decides, ...] = ()) -> dict[str, Any]:
    """Dotted key -> value of the keys that carry one of the marks, and none of ``but``."""
    return {
        key: value
        for key, value in flatten(to_dict(config))
        if _of(key) & set(wanted) and not _of(key) & set(but)
    }


def is_free(key: str) -> bool:
    """True if a run may be resumed under another value without a word: no training sees it."""
    # Files alone are those trained on; with PREDICTIONS beside it they are the test's.
    return _of(key) - EVALUATED <= {Decides.NOTHING, Decides.FILES} and _of(key) != {Decides.FILES}


def is_harmless(key: str) -> bool:
    """True if ``--resume-with-changes`` may change it: what is learned from a row stays."""
    return not _of(key) & LEARNED


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (old, new) for every key that differs and is not free to change."""
    was, now = dict(flatten(old)), dict(flatten(new))
    return {
        key: (was.get(key), now.get(key))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not is_free(key)
    }


@functools.cache
def for_evaluation() -> tuple[str, ...]:
    """What ``evaluate`` may change of a trained run; an entry with a final dot is a section."""
    sections, data = ("evaluate.", "engine."), {Decides.ROWS, Decides.TOKENS}
    wanted = EVALUATED | {Decides.PLACE}
    keys = [key for key, decided in marks().items() if decided & wanted and not decided & data]
    return (*sections, "engine", *(key for key in keys if not key.startswith(sections)))


@functools.cache
def for_export() -> tuple[str, ...]:
    """What ``scalepeft merge`` and ``export`` may change: where the base lies, and the device."""
    sections = ("model.", "engine.")
    return tuple(k for k, m in marks().items() if Decides.PLACE in m and k.startswith(sections))


def decides_rows(key: str) -> bool:
    """True for the keys of ``data`` under which rows or their tokens are others."""
    wanted = {Decides.ROWS, Decides.TOKENS, Decides.FILES}
    return bool(_of(key) & wanted) and Decides.PREDICTIONS not in _of(key)


def matches_key(key: str, listed: tuple[str, ...]) -> bool:
    """True if ``key`` is listed, or its section is (``engine.``)."""
    return any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in listed)


def _of(key: str) -> frozenset[Decides]:
    """Marks of a key; one that no config has any more is taken to decide the training."""
    return marks().get(key) or frozenset({Decides.TRAINING})
