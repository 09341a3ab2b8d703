"""HTTP: the hosted API. Knows the engine by a small protocol, so that a fake one tests it."""

from fulgurite.server.app import DEMO, create_app, demo_notice
from fulgurite.server.key import KEY_FILE, api_key
from fulgurite.server.protocol import Engine

__all__ = ["DEMO", "KEY_FILE", "Engine", "api_key", "create_app", "demo_notice"]
