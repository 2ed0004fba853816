"""The user-error type and the nearest name to a misspelled one."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake (exit code 2): what came, what is allowed and what to do."""


def refuse(problems: dict[str, object]) -> None:
    """Raise UserError with the first text that is true of what the user asked for."""
    for text, is_so in problems.items():
        if is_so:
            raise UserError(text)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist, with the near one and all that do."""
    allowed = sorted(allowed)
    return UserError(
        f"no {kind} '{name}'.{nearest(name, allowed)} Available: {', '.join(allowed) or 'none'}"
    )
