"""Jobs to pictures: one thread that owns the weights and the device."""

from fulgurite.engine.engine import Drawer, Engine, Load
from fulgurite.engine.loading import Loader

__all__ = ["Drawer", "Engine", "Load", "Loader"]
