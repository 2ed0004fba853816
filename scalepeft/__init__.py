"""Exact orthogonal and structured adapters for LLaMA-class models, 4-bit, sharded, preemptible."""

from typing import Any

__version__ = "0.1.0"
# Name -> module of adapters/, imported on first use: signals are taken over before torch is loaded.
_PUBLIC = {
    **dict.fromkeys(("adapt", "inject", "load_adapter", "save_adapter"), "inject"),
    "effective_weight": "merged_weight",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(f"scalepeft.adapters.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'scalepeft' has no attribute {name!r}")
