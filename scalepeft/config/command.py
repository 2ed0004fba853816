"""``scalepeft config``: the resolved settings of a run, or a reference of every key."""

import dataclasses
import inspect
import re
from typing import Any, get_type_hints

from pydantic.fields import FieldInfo

from scalepeft.config import files
from scalepeft.config.schema import NAMED, PLAIN, config_class, dump
from scalepeft.core import registry
from scalepeft.core.errors import unknown
from scalepeft.core.fields import _field_names, marks_of


def run(settings: list[str], reference: str | None = None) -> None:
    """Print the config of ``[CONFIG] KEY=VALUE ...`` as YAML, or the reference.

    Args:
        settings: a config, then settings over it.
        reference: a section; empty for all of them; None for the resolved config.

    Raises:
        UserError: a setting that is none, an unknown section.
    """
    if reference is not None:
        print(reference_page(reference or None), end="")
        return
    config, _ = files.load(*files.config_first(settings))
    print(dump(config), end="")


def reference_page(section: str | None = None) -> str:
    """Every key with type, default and meaning, in Markdown; of one section, or of all.

    Raises:
        UserError: no such section.
    """
    sections = [*PLAIN, *NAMED]
    if section is not None and section not in sections:
        raise unknown("section", section, sections)
    lines = ["# Settings", "", "Printed by `scalepeft config --reference`."]
    for name in sections if section is None else [section]:
        if name in PLAIN:
            lines += _table(name, name, PLAIN[name], [])
            continue
        package, _, _, base = NAMED[name]
        lines += _table(name, f"{name}: keys of every one", base, [])
        for entry in registry.available(package):
            cls = config_class(name, entry)
            changed = [k for k in _field_names(base) if _default(cls, k) != _default(base, k)]
            lines += _table(name, f"{name}.name={entry}", cls, _same(base, changed))
    return "\n".join(lines) + "\n"


def _same(base: type, changed: list[str]) -> list[str]:
    return [name for name in _field_names(base) if name not in changed or name == "name"]


def _table(section: str, title: str, cls: type, skipped: list[str]) -> list[str]:
    about, decided = _about(cls), marks_of(cls)
    hints = get_type_hints(cls, include_extras=True)
    rows = [
        f"| `{section}.{name}` | {_type(hints[name])} | {_default(cls, name)} |"
        f" {', '.join(sorted(m.name.lower() for m in decided[name]))} | {about.get(name, '')} |"
        for name in _field_names(cls)
        if name not in skipped
    ]
    header = ["| key | type | default | decides | meaning |", "|---|---|---|---|---|"]
    return ["", f"## {title}", "", *([*header, *rows] if rows else ["No keys of its own."])]


def _type(hint: Any) -> str:
    plain = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
    text = inspect.formatannotation(_bare(plain)).replace("typing.", "")
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace(", ", " or "), text)
    text = re.sub(r"Optional\[(.*)\]", r"\1 or null", text)
    text = text.replace("|", "or").replace("None", "null").replace("'", "`")
    return text + _limits(hint)


def _bare(hint: Any) -> Any:
    """A type without its notes."""
    return get_type_hints(type("_", (), {"__annotations__": {"hint": hint}}))["hint"]


def _limits(hint: Any) -> str:
    """`` >= 1`` of a number's type, also inside of ``... | None``."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(limit, name)}"
        for note in getattr(hint, "__metadata__", ())
        for limit in getattr(note, "metadata", ())
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    if not found:
        inner = (*getattr(hint, "__args__", ()), getattr(hint, "__origin__", None))
        return next((text for part in inner if part is not None and (text := _limits(part))), "")
    return " " + ", ".join(found)


def _default(cls: type, name: str) -> str:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    value: Any = field.default
    if isinstance(value, FieldInfo):
        value = value.get_default(call_default_factory=True, validated_data={})
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return ""
    text = {None: "null", True: "true", False: "false"}.get(value) if _plain(value) else None
    return "`" + (text or repr(value)).replace("|", "\\|") + "`"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _about(cls: type) -> dict[str, str]:
    """Field -> its lines of the ``Attributes:`` docstrings of the class and those above it."""
    found: dict[str, str] = {}
    for above in reversed(cls.__mro__):
        _, _, listed = (inspect.cleandoc(above.__doc__ or "")).partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w+: )", "\n" + listed.split("\n\n")[0]):
            name, colon, text = entry.strip().partition(": ")
            if colon and name.isidentifier():
                found[name] = " ".join(text.replace("|", "\\|").split())
    return found
