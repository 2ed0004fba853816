"""Names to modules: a registry is a folder, a key is a file name. Also what all configs and errors
share.
"""

import fnmatch
import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from scalepeft.core.errors import unknown

T = TypeVar("T")


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
