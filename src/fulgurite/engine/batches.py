"""How many rows a step's batch may have, such that each picture is the same to the bit whoever shares it.

Kernels are chosen by shape, so a row's bits may depend on the number of rows beside it. The smallest batch, that of a
picture drawn alone, is right by definition. A larger one is used once it was found to give the same bits.
"""

from collections.abc import Callable, Sequence

MOST_ROWS = 16
LADDER = (1, 2, 3, 4, 6, 8, 12, 16)  # padding is a third at most


class Batches:
    """The batch sizes for one model and latent shape.

    ``exact``: only those that were found to have the right bits; else bits may differ, and nothing is padded.
    """

    def __init__(self, smallest: int, most: int, exact: bool) -> None:
        self._untried = [size for size in LADDER if size > smallest and size % smallest == 0 and size <= most]
        self._proven = [smallest]
        if not exact:
            self._proven, self._untried = list(range(1, max(smallest, most) + 1)), []

    @property
    def capacity(self) -> int:
        """The rows that the next step may have."""
        return max(self._proven + self._untried)

    def smaller(self, size: int) -> bool:
        """Learns that a size does not fit into memory. False: there is no smaller one."""
        if size == self._proven[0]:
            return False
        self._proven = [proven for proven in self._proven if proven < size]
        self._untried = []
        return True

    def size_for(self, rows: int, agrees: Callable[[Sequence[int]], bool]) -> int:
        """The batch to run for so many rows; fewer than they are, where no larger one is right.

        ``agrees`` says whether a batch has the bits of those it is cut into, given their sizes. It is not kept: it
        holds a checkpoint, which may be evicted.
        """
        while self._untried and self._proven[-1] < rows:
            size = self._untried.pop(0)
            if agrees(self._parts(size)):
                self._proven.append(size)
            else:
                self._untried = []
        return next((size for size in self._proven if size >= rows), self._proven[-1])

    def _parts(self, size: int) -> list[int]:
        parts: list[int] = []
        while left := size - sum(parts):
            parts.append(max(proven for proven in self._proven if proven <= left))
        return parts


def most_rows(cuda: bool, latent_shape: tuple[int, int, int]) -> int:
    """Beyond which more rows only make a step longer: a CPU is busy with 64x64 latent pixels, a GPU with 256x256."""
    return min(MOST_ROWS, (65536 if cuda else 4096) // (latent_shape[1] * latent_shape[2]))
