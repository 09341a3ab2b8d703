"""HTTP: the hosted API. Knows the engine and the ledger by small protocols, so that fake ones test it."""

from fulgurite.server.app import create_app
from fulgurite.server.envelope import JSONLines
from fulgurite.server.listening import listen, server_for, url_of
from fulgurite.server.protocol import Engine, Ledger
from fulgurite.server.service import check_settings, demo_notices

__all__ = [
    "Engine",
    "JSONLines",
    "Ledger",
    "check_settings",
    "create_app",
    "demo_notices",
    "listen",
    "server_for",
    "url_of",
]
