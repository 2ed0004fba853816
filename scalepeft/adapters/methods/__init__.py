"""Adapter methods, one paper per file; the file name is the name in ``adapter.name``."""
