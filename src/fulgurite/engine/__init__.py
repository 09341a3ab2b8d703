"""Jobs to pictures: one thread that owns the weights and the device, and draws all jobs together step by step."""

from fulgurite.engine.engine import Engine
from fulgurite.engine.loading import Loader
from fulgurite.engine.opening import Say, open_engine, warm_up
from fulgurite.engine.runner import Load, Runner, Stages

__all__ = ["Engine", "Load", "Loader", "Runner", "Say", "Stages", "open_engine", "warm_up"]
