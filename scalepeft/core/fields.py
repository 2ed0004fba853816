"""Field types of all config dataclasses, what a field decides, and their one-line errors."""

import dataclasses
from enum import Enum
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

from scalepeft.core.errors import UserError, nearest
from scalepeft.core.text import one_line

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # shifted by 32 bits into torch's 64-bit seed


class Decides(Enum):
    """What another value changes: a mark in a field's ``Annotated``, or its class's ``DECIDES``."""

    ROWS = "which rows there are, and their text"
    TOKENS = "the tokens and labels of a row"
    TRAINING = "what is learned from the tokens"
    LENGTH = "how much is trained on: a resumed run looks at rows and steps themselves"
    FILES = "where rows lie: they count by their content"
    PLACE = "where the base or the work lies: the base counts by its fingerprint"
    SPEED = "time and memory of a step"
    RECORDS = "what is saved, logged and fetched on the way"
    PREDICTIONS = "the answers of a trained model"
    SCORES = "what is made of the answers"
    NOTHING = "none of these: which stages are done, in which folder, in how many starts"


def marks_of(cls: type) -> dict[str, frozenset[Decides]]:
    """Field name -> its marks, or its class's ``DECIDES`` where it has none of its own."""
    default: frozenset[Decides] = frozenset(getattr(cls, "DECIDES", ()))
    hints = get_type_hints(cls, include_extras=True)
    notes = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(cls)}
    return {
        name: frozenset(note for note in found if isinstance(note, Decides)) or default
        for name, found in notes.items()
    }


def deciding(cls: type, *marks: Decides) -> list[str]:
    """Names of the fields with one of these marks, in their order."""
    return [name for name, found in marks_of(cls).items() if found & set(marks)]


def _build(cls: type, values: dict[str, Any], section: str) -> Any:
    names = [field.name for field in dataclasses.fields(cls)]
    for key in [key for key in values if key not in names][:1]:  # YAML reads ``no`` as a false key
        name, near = values.get("name"), nearest(str(key), names)
        raise UserError(
            f"{section}.{key}={values[key]}: no such key{f' of {name}' if name else ''}.{near}"
            f" Allowed: {', '.join(names)}"
            + (f"; {section}={name} replaces the whole section" if name and not near else "")
        )
    try:
        built = cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in (section, *first["loc"]))
        # Without a place: a setting that does not go with another, which the text names.
        value = f"={one_line(repr(first.get('input')), 100)}: " if first["loc"] else "."
        raise UserError(f"{path}{value}{first['msg'].removeprefix('Value error, ')}") from None
    for key, value in values.items():
        if isinstance(value, bool) and type(getattr(built, key)) in (int, float):  # true is no 1
            raise UserError(
                f"{section}.{key}={str(value).lower()}: Input should be a number, not true or false"
            )
    return built


# YAML reads these words as true and false.
ON_OFF = BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value)
STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
"""Of every config dataclass: an unknown key is an error, and so is a number that is not finite."""


def split_commas(value: object) -> object:
    """``a,b`` of the command line as a list."""
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


NameList = Annotated[list[str], BeforeValidator(split_commas)]
"""A list of names; ``a,b`` on the command line is the same as ``[a, b]``."""


def _once(names: list[str]) -> list[str]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"'{twice[0]}' is there twice; name each once")
    return names


Targets = Annotated[NameList, Field(min_length=1), AfterValidator(_once)]
"""A ``NameList`` of layers: at least one, and none twice."""

TextList = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
"""A list of texts, which may hold commas; one text alone is a list of it."""


def _layers(value: object) -> object:
    numbers = split_commas([value] if isinstance(value, int) else value)
    if value == "all":
        return value
    try:
        found = sorted({int(n) for n in numbers})  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        found = []
    if not found or found[0] < 0 or isinstance(value, bool):
        raise ValueError("expected 'all', or numbers of decoder blocks from 0, such as 0,1,5")
    return found


Layers = Annotated[Literal["all"] | list[int], BeforeValidator(_layers)]
"""``all``, or numbers of decoder blocks; ``0,3`` and ``5`` on the command line are lists too."""
