"""Merged checkpoints and adapters for other systems."""
