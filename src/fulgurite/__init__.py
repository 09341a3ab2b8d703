"""Fulgurite: SDXL-Lightning as a service you own."""

from typing import Any

__all__ = ["Picture", "Pipeline", "Request"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes a second to import: `fulgurite --help` should not wait for it.
    if name in __all__:
        from fulgurite import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
