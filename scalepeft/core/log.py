"""Lines for the user, from rank 0."""

import sys

from scalepeft.core.text import visible


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(f"scalepeft: {visible(text)}", file=sys.stderr, flush=True)


LINE_SECONDS = 10.0  # without a terminal: at most one line in so many seconds
