"""Sharding engines, one per file; the file name is the name in ``engine.name``."""
