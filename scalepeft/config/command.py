"""``scalepeft config``: the resolved settings of a run, or a reference of every key."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined

from scalepeft.config import files
from scalepeft.config.schema import NAMED, PLAIN, config_class, dump
from scalepeft.core import registry
from scalepeft.core.errors import unknown
from scalepeft.core.fields import marks_of
from scalepeft.core.options import described

TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool"}
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def run(settings: list[str], reference: str | None = None) -> None:
    """Print a config as YAML, or the ``reference`` of a section (empty: of all) if not None."""
    if reference is None:
        print(dump(files.load(*files.config_first(settings))[0]), end="")
    else:
        print(reference_page(reference), end="")


def reference_page(section: str = "") -> str:
    """Every key of a section, or of all, with type, default and meaning, in Markdown."""
    sections = [*PLAIN, *NAMED]
    if section and section not in sections:
        raise unknown("section", section, sections)
    lines = ["# Settings", "", "Printed by `scalepeft config --reference`."]
    for name in [section] if section else sections:
        if name in PLAIN:
            lines += _table(name, name, PLAIN[name])
            continue
        package, *_, base = NAMED[name]
        lines += _table(name, f"{name}: keys of every one", base)
        for entry in registry.available(package):
            cls = config_class(name, entry)
            same = [k for k in marks_of(base) if _default(cls, k) == _default(base, k)]
            lines += _table(name, f"{name}.name={entry}", cls, without=["name", *same])
    return "\n".join(lines) + "\n"


def _table(section: str, title: str, cls: type, without: Sequence[str] = ()) -> list[str]:
    about, types = described(cls), TypeAdapter(cls).json_schema()["properties"]
    decided = {k: ", ".join(sorted(m.name.lower() for m in v)) for k, v in marks_of(cls).items()}
    rows = [
        (f"`{section}.{k}`", _type(types[k]), _default(cls, k), decides, about.get(k, ""))
        for k, decides in decided.items()
        if k not in without
    ]
    cells = [("key", "type", "default", "decides", "meaning"), ("---",) * 5, *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return ["", f"## {title}", "", *(lines if rows else ["No keys of its own."])]


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words, with the limits of a number."""
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if values := schema.get("enum") or [schema[k] for k in ("const",) if k in schema]:
        return " or ".join(f"`{value}`" for value in values)
    kind = schema.get("type", "any")  # an extension's field may be anything
    if kind == "array" and "items" in schema:
        return f"list of {_type(schema['items'])}"
    limits = [f"{sign} {schema[word]}" for word, sign in LIMITS.items() if word in schema]
    return " ".join([TYPES.get(kind, kind), ", ".join(limits)]).rstrip()


def _default(cls: Any, name: str) -> str:
    field = cls.__pydantic_fields__[name]
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return ""
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"
