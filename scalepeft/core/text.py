"""Durations and sizes as people write them."""

import math


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
