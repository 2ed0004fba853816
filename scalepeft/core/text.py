"""Durations, sizes and tables as people write them."""

import math
from collections.abc import Sequence
from functools import partial


def size(count: float, digits: int = 1) -> str:
    """``2.5 GiB``."""
    power = min(4, int(math.log2(max(count, 1)) // 10))
    number = f"{count / 1024**power:,.{digits if power else 0}f}"
    return f"{number} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    """``95.2 s``, ``12 min``, ``3 h 05 min``, ``2 d 04 h``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"


gib = partial(size, digits=2)


def table(rows: Sequence[Sequence[object]], indent: str = "  ", left: int = 1) -> list[str]:
    """Rows as aligned lines, the first ``left`` columns to the left; a short row ends in a note."""
    columns = max((len(row) for row in rows), default=0)
    full = [[str(cell) for cell in row] for row in rows if len(row) == columns]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for row in rows:
        rightmost = left if len(row) == columns else columns
        cells = [
            str(cell).ljust(width) if i < rightmost else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


# Explicit direction marks would turn round what stands beside them; Arabic and Hebrew text needs
# none of these.
TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C)
UNSEEN = {
    **{i: f"[U+{i:04X}]" for i in (*TURNING, *range(0x80, 0xA0))},
    **{i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\t\n"},
    **dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd"),
    **{0x7F: "\u2421", 0x2028: "\n", 0x2029: "\n"},
}
"""Code point -> what is shown in its place."""


def visible(text: str) -> str:
    """Text with its control characters made visible."""
    return text.replace("\r\n", "\n").translate(UNSEEN)


def plain(text: str) -> bool:
    """Whether a text can be a path, a name or a line: no control characters, and UTF-8."""
    return visible(text) == text and "\n" not in text and "\t" not in text


def one_line(text: object, limit: int = 300) -> str:
    """``str(text)`` as one printable line of at most ``limit`` characters."""
    line = visible(" ".join(str(text)[: 10 * limit].split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."
