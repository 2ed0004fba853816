"""Task families, one per file; the file name is the name in ``data.name``."""

HELPERS = frozenset(
    {
        "answers",
        "base",
        "bitext",
        "equivalence",
        "hendrycks",
        "languages",
        "leaks",
        "problems",
        "rows",
    }
)
"""Modules that are no tasks."""
