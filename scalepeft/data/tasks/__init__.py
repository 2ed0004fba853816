"""Task families, one per file; the file name is the name in ``data.name``."""
