"""Task families, one per file; the file name is the name in ``data.name``."""

HELPERS = frozenset({"base", "bitext", "languages", "rows"})
"""Modules that are no tasks."""
