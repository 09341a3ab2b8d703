"""HTTP: the hosted API. Knows the engine by a small protocol, so that a fake one tests it."""

from fulgurite.server.app import create_app
from fulgurite.server.key import api_key
from fulgurite.server.protocol import Engine

__all__ = ["Engine", "api_key", "create_app"]
