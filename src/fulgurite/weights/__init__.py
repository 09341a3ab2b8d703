"""Files to networks."""

from fulgurite.weights.load import load_networks
from fulgurite.weights.networks import Networks

__all__ = ["Networks", "load_networks"]
