"""Names to modules: a registry is a folder, a key is a file name. Also what all configs and errors
share.
"""

import difflib
import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
"""Of every config dataclass: an unknown key is an error, and so is a number that is not finite."""


def split_commas(value: object) -> object:
    """``a,b`` of the command line as a list."""
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


NameList = Annotated[list[str], BeforeValidator(split_commas)]
"""A list of names; ``a,b`` on the command line is the same as ``[a, b]``."""


def _one_text(value: object) -> object:
    return [value] if isinstance(value, str) else value


TextList = Annotated[list[str], BeforeValidator(_one_text)]
"""A list of texts, which may hold commas; one text alone is a list of it."""


def _layers(value: object) -> object:
    numbers = split_commas([value] if isinstance(value, int) else value)
    if value == "all":
        return value
    try:
        found = [int(n) for n in numbers]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        found = []
    if not found or min(found) < 0 or isinstance(value, bool):
        raise ValueError("expected 'all', or numbers of decoder blocks from 0, such as 0,1,5")
    return sorted(set(found))


Layers = Annotated[Literal["all"] | list[int], BeforeValidator(_layers)]
"""``all``, or numbers of decoder blocks; ``0,3`` and ``5`` on the command line are lists too."""


class UserError(ValueError):
    """A mistake of the user's: the message says what came, what is allowed and what to do (exit
    code 2).
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Builds the error for a name that does not exist, with the near one and all that do."""
    allowed = sorted(allowed)
    return UserError(
        f"no {kind} '{name}'.{nearest(name, allowed)} Available: {', '.join(allowed) or 'none'}"
    )


def read_mapping(file: Path, parse: Callable[[str], object], remedy: str) -> dict[str, Any]:
    """Reads a JSON or YAML file that must hold a mapping.

    Raises:
        UserError: it is missing, unreadable, broken or holds something else; ends with ``remedy``.
    """
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {remedy}") from None
    except Exception as error:  # every parser has its own
        raise UserError(f"{file}: cannot be read: {error}; {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{file}: must hold keys with values, not {type(values).__name__}; {remedy}"
        )
    return values


def names(pattern: str, layer: str) -> bool:
    """True if ``pattern`` is the last part of the layer's name, or fits the whole of it."""
    return layer.rsplit(".", 1)[-1] == pattern or fnmatch.fnmatchcase(layer, pattern)


def available(package: str) -> list[str]:
    """Lists the registry keys of ``scalepeft.<package>``: its modules without the ones that are not
    entries.
    """
    folder = importlib.import_module(f"scalepeft.{package}")
    helpers: frozenset[str] = getattr(folder, "HELPERS", frozenset({"base"}))
    names = (module.name for module in pkgutil.iter_modules(folder.__path__))
    return sorted(name for name in names if name not in helpers and not name.startswith("_"))


def find(package: str, name: str, kind: str) -> ModuleType:
    """Imports entry ``name`` of registry ``scalepeft.<package>``.

    Raises:
        UserError: no such entry; the message lists those that exist.
    """
    if name not in available(package):
        raise unknown(kind, name, available(package))
    return importlib.import_module(f"scalepeft.{package}.{name}")


def find_class(package: str, name: str, kind: str, base: type[T]) -> type[T]:
    """Returns the entry's own subclass of ``base``. Raises UserError as ``find`` does."""
    module = find(package, name, kind)
    classes = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, base))
    return next(c for c in classes if c.__module__ == module.__name__)
