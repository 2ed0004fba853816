"""Lines for the user, from rank 0."""

import sys


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(f"scalepeft: {text}", file=sys.stderr, flush=True)


LINE_SECONDS = 10.0  # without a terminal: at most one line in so many seconds
