"""Durations, sizes and tables as people write them."""

import math
from collections.abc import Sequence


def size(count: int) -> str:
    """``2.5 GiB``."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


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


def gib(size: float) -> str:
    """Bytes in the unit that reads best."""
    power = min(3, max(0, int(math.log2(max(size, 1)) // 10)))
    return f"{size / 1024**power:,.2f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def table(rows: Sequence[Sequence[object]], indent: str = "  ", left: int = 1) -> list[str]:
    """Rows of cells, the header among them, as aligned lines: the first ``left`` columns to the
    left, the others to the right. A short row keeps its last cell unpadded (a remark).
    """
    columns = max((len(row) for row in rows), default=0)
    full = [[str(cell) for cell in row] for row in rows]
    widths = [
        max((len(row[i]) for row in full if i < len(row) and (len(row) == columns)), default=0)
        for i in range(columns)
    ]
    lines = []
    for row in full:
        cells = [
            cell.ljust(width) if i < left or len(row) < columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def _unseen() -> dict[int, str]:
    """Code point -> what is shown in its place."""
    # Explicit direction marks would turn round what stands beside them; Arabic and Hebrew text
    # needs none of these.
    turning = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C)
    found = {i: f"[U+{i:04X}]" for i in (*turning, *range(0x80, 0xA0))}
    found |= {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\t\n"}
    found |= dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
    return found | {0x7F: "\u2421", 0x2028: "\n", 0x2029: "\n"}


UNSEEN = _unseen()


def visible(text: str) -> str:
    """Text with its control characters made visible."""
    return text.replace("\r\n", "\n").translate(UNSEEN)
