"""Arguments from ``Options`` dataclasses."""

import argparse
import dataclasses
import importlib
from dataclasses import dataclass
from typing import Literal

import pytest

from scalepeft import arguments
from scalepeft.core import options
from scalepeft.core.fields import NameList, Positive


@dataclass
class Sample:
    """What there is.

    Attributes:
        what: a name without a flag
        settings: KEY=VALUE: over the
            file's
        a_number: N: of ``things``, 100 % of them
        needed: a text
        absent: one or none
        several: A,B: may be repeated
        quick: be quick
        look: do not look
        names: A,B: some
        count: more than 0
        inner: no argument
    """

    what: str
    settings: list[str]
    needed: str
    absent: Literal["one", "two"] | None
    a_number: int = 3
    several: tuple[str, ...] = ()
    quick: bool = False
    look: bool = True
    names: NameList | None = None
    count: Positive = 2
    inner: int = 5


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("sample", exit_on_error=False)
    options.add_arguments(made, Sample, positional=("what",), without=("inner",))
    return made


def test_values_have_the_types_and_defaults_of_the_fields(parser: argparse.ArgumentParser) -> None:
    assert vars(parser.parse_args(["x", "--needed", "y"])) == {
        "what": "x", "settings": [], "needed": "y", "absent": None, "a_number": 3, "several": [],
        "quick": False, "look": True, "names": None, "count": 2,
    }  # fmt: skip
    words = "x a=1 b=2 --needed y --absent two --a-number 4 --several p --several q --quick"
    words += " --no-look --names r,s --count 5"
    made = Sample(**vars(parser.parse_args(words.split())))
    assert made == Sample("x", ["a=1", "b=2"], "y", "two", 4, ["p", "q"], True, False, "r,s", 5)  # type: ignore[arg-type]


def test_help_is_the_docstrings(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    assert "--a-number N of things, 100 % of them (3)" in text
    assert "KEY=VALUE over the file's" in text
    assert "--absent {one,two} one or none" in text


@pytest.mark.parametrize("words", [["x"], ["x", "--needed", "y", "--absent", "three"]])
def test_what_is_needed_or_not_among_the_choices_is_refused(
    parser: argparse.ArgumentParser, words: list[str]
) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parser.parse_args(words)


@pytest.mark.parametrize("command", arguments.DECLARED)
def test_every_option_is_described(command: str) -> None:
    declared = importlib.import_module(f"scalepeft.{arguments.DECLARED[command][0]}").Options
    fields = {field.name for field in dataclasses.fields(declared)}
    assert options.described(declared).keys() == fields
