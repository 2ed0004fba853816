"""Field types that all config dataclasses share, and their one-line validation errors."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from scalepeft.core.errors import UserError, nearest

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # shifted by 32 bits into torch's 64-bit seed


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _build(cls: type, values: dict[str, Any], section: str) -> Any:
    for key in values:
        if key not in _field_names(cls):
            name = f" of {values['name']}" if "name" in values else ""
            raise UserError(
                f"{section}.{key}={values[key]}: no such"
                f" key{name}.{nearest(str(key), _field_names(cls))} Allowed:"
                f" {', '.join(_field_names(cls))}"
            )
    try:
        built = cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a setting that does not go with another
            text = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{section}.{text}") from None
        path = ".".join(str(p) for p in (section, *first["loc"]))
        raise UserError(
            f"{path}={first.get('input')!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from None
    for key, value in values.items():
        if isinstance(value, bool) and getattr(built, key) is not value:  # true is no 1 here
            raise UserError(
                f"{section}.{key}={str(value).lower()}: Input should be a number, not true or false"
            )
    return built


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
