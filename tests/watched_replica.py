"""A replica whose engine can be asked what it does; in a file of its own, since Ray's workers import it."""

from fulgurite.cluster.replica import Replica


class WatchedReplica(Replica):
    def stats(self) -> dict[str, int]:
        return self.engine.stats()
