"""HTTP: the hosted API. Knows the engine and the ledger by small protocols, so that fake ones test it."""

from fulgurite.server.app import create_app
from fulgurite.server.envelope import JSONLines
from fulgurite.server.listening import server_for, url_of
from fulgurite.server.protocol import Engine, Ledger
from fulgurite.server.service import demo_notice

__all__ = ["Engine", "JSONLines", "Ledger", "create_app", "demo_notice", "server_for", "url_of"]
