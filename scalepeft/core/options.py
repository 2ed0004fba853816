"""Arguments of a command from its ``Options`` dataclass: name, type, default and help."""

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Container
from typing import Annotated, Any


def described(cls: type) -> dict[str, str]:
    """Field -> its lines of the ``Attributes:`` docstrings of the class and those above it."""
    about: dict[str, str] = {}
    for above in reversed(cls.__mro__):
        _, _, listed = inspect.cleandoc(above.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w+: )", "\n" + listed.split("\n\n")[0]):
            name, colon, text = entry.strip().partition(": ")
            if colon and name.isidentifier():
                about[name] = " ".join(text.split())
    return about


def add_arguments(
    command: argparse.ArgumentParser, cls: type, positional: Container[str] = (),
    without: Container[str] = (),
) -> None:  # fmt: skip
    """Add ``--field-name`` for each field; ``NAME: `` before its help is its metavar."""
    about, hints = described(cls), typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        hint, default = hints[field.name], field.default
        inside, unset = typing.get_args(hint), default is dataclasses.MISSING
        kind = inside[0] if type(None) in inside else hint
        optional = kind is not hint
        if typing.get_origin(kind) is Annotated:  # a list is one text, which its validator splits
            kind = typing.get_args(kind)[0]
            kind = str if typing.get_origin(kind) is list else kind
        metavar = re.match(r"([\w.]*[A-Z][A-Z,=]*): ", about.get(field.name, ""))
        text = about.get(field.name, "").removeprefix(metavar[0] if metavar else "")
        words: dict[str, Any] = {"metavar": metavar[1]} if metavar else {}
        name = "--" + field.name.replace("_", "-")
        if field.name == "settings":
            name, words = "settings", {"nargs": "*", "metavar": "[CONFIG] KEY=VALUE", **words}
        elif kind is bool:
            name = name.replace("--", "--no-") if default is True else name
            words |= {"dest": field.name, "action": f"store_{default is not True}".lower()}
        elif typing.get_origin(kind) in (list, tuple):
            words |= {"action": "append", "default": []}
        else:
            choices = typing.get_args(kind)
            words |= {"choices": choices} if choices else {"type": kind}
            words["default"] = None if unset else default
            text += f" ({default})" if words["default"] else ""
            if field.name in positional:
                name = field.name
            else:
                words["required"] = unset and not optional
        command.add_argument(name, help=text.replace("``", "").replace("%", "%%"), **words)
