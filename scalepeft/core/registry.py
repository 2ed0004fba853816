"""Names to modules: a registry is a folder, a key is a file name; ``extend`` adds others'."""

import fnmatch
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from scalepeft.core.errors import UserError, unknown

T = TypeVar("T")
# Folder of scalepeft -> its name in an extension folder and, after "scalepeft.", of its group.
KINDS = {"adapters.methods": "adapters", "parallel": "engines", "data.tasks": "tasks"}
# Modules beside the entries: the protocol and what it is built on.
NO_ENTRIES = ("base", "ranks", "rendezvous")


def names(pattern: str, layer: str) -> bool:
    """True if ``pattern`` is the end of the layer's name (whole parts), or fits all of it."""
    return f".{layer}".endswith(f".{pattern}") or fnmatch.fnmatchcase(layer, pattern)


def available(package: str) -> list[str]:
    """List the keys of registry ``scalepeft.<package>``, its extensions included."""
    found = {name for path in _paths(package) for name in _modules(path)}
    return sorted(found | _installed(package).keys())


def added(package: str) -> list[str]:
    """The keys of ``available`` that extensions have brought."""
    return sorted(set(available(package)) - set(_modules(_paths(package)[0])))


def extend(folder: str) -> None:
    """Add the entries of an extension folder to the registries, for the life of the process; of two
    of one name the first counts: the config of a resumed run names an older copy. Raises UserError:
    no such folder, nothing in it, or a name of ours or of an installed package.
    """
    places = {package: str(Path(folder, name).resolve()) for package, name in KINDS.items()}
    if not any(Path(place).is_dir() for place in places.values()):
        kinds = ", ".join(KINDS.values())
        raise UserError(f"extensions={folder}: no folder with {kinds} in it; each holds .py files")
    for package, place in places.items():
        paths = _paths(package)
        if place in paths:
            continue
        fixed = {*_modules(paths[0]), *_installed(package)}
        if taken := sorted(fixed & set(_modules(place))):
            raise UserError(f"{place}/{taken[0]}.py: the name '{taken[0]}' is taken; rename it")
        paths.append(place)
    _modules.cache_clear()


def extension_folders() -> list[Path]:
    """The folders that ``extend`` was given."""
    return [Path(place).parent for place in _paths("parallel")[1:]]


def find_class(package: str, name: str, kind: str, base: type[T]) -> type[T]:
    """Import entry ``name`` of registry ``scalepeft.<package>``; return its subclass of ``base``.
    Raises UserError: no such entry, or an extension that cannot be imported or defines no subclass.
    """
    if name not in available(package):
        raise unknown(kind, name, available(package))
    shipped = name in _modules(_paths(package)[0])
    path = f"scalepeft.{package}.{name}"
    path = path if shipped else _installed(package).get(name, path)
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever another's file may raise
        if shipped:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{kind} '{name}' cannot be imported from {path}: {reason}") from error
    classes = [found for found in vars(module).values() if isinstance(found, type)]
    for found in classes:
        if issubclass(found, base) and found.__module__ == module.__name__:
            return found
    raise UserError(f"{kind} '{name}': {module.__file__} defines no subclass of {base.__name__}")


def _paths(package: str) -> list[str]:
    # A package's own search path: a module of any folder in it is imported under our name.
    return importlib.import_module(f"scalepeft.{package}").__path__  # type: ignore[return-value]


@cache  # asked for each adapted layer
def _modules(path: str) -> list[str]:
    found = (module.name for module in pkgutil.iter_modules([path]))
    return [name for name in found if name not in NO_ENTRIES and not name.startswith("_")]


@cache
def _installed(package: str) -> dict[str, str]:
    """Entries of other installed packages: name -> module."""
    group = entry_points(group=f"scalepeft.{KINDS[package]}")
    return {entry.name: entry.value for entry in group}
