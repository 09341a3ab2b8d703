"""Fulgurite: SDXL-Lightning as a service you own."""

from typing import Any

__all__ = ["APIError", "AsyncClient", "Client", "Picture", "Pipeline", "Request"]
__version__ = "0.1.0"

MODULE_OF = {
    "APIError": "client",
    "AsyncClient": "client",
    "Client": "client",
    "Picture": "request",
    "Pipeline": "pipeline",
    "Request": "request",
}


def __getattr__(name: str) -> Any:
    # torch takes a second to import: `fulgurite --help` should not wait for it.
    if name in MODULE_OF:
        from importlib import import_module

        return getattr(import_module(f"fulgurite.{MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
