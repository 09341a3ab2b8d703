"""Engines on several devices and machines, as replicas on Ray Serve; to the server they are one engine.

The server itself stays one process: it answers over a thousand requests a second (README). Ray comes with the extra
``cluster``.
"""

from fulgurite.cluster.deployment import open_cluster
from fulgurite.cluster.engine import ClusterEngine

__all__ = ["ClusterEngine", "open_cluster"]
