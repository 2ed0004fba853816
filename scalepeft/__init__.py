"""Exact orthogonal and structured adapters for LLaMA-class models, 4-bit, sharded, preemptible."""

from typing import Any

__version__ = "0.1.0"
# Imported on first use: ``python -m scalepeft`` takes over the signals before torch is loaded.
_PUBLIC = {
    "adapt": "scalepeft.adapters.inject",
    "effective_weight": "scalepeft.adapters.merged_weight",
    "inject": "scalepeft.adapters.inject",
    "load_adapter": "scalepeft.adapters.inject",
    "save_adapter": "scalepeft.adapters.inject",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'scalepeft' has no attribute {name!r}")
