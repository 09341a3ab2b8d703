"""Fulgurite: SDXL-Lightning as a service you own."""

from typing import Any

__all__ = ["APIError", "AsyncClient", "Client", "Picture", "Pipeline", "Request"]
__version__ = "0.1.0"

OF_CLIENT = {"APIError", "AsyncClient", "Client"}


def __getattr__(name: str) -> Any:
    # torch takes a second to import: `fulgurite --help` should not wait for it.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("fulgurite.client" if name in OF_CLIENT else "fulgurite.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
