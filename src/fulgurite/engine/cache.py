"""Encoded prompts, kept within a bound in bytes: a repeated prompt costs no text encoding."""

from collections import OrderedDict
from collections.abc import Callable

from fulgurite.pipeline import Encoded


class PromptCache:
    """The least recently used goes first. One thread's."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[str, str], Encoded] = OrderedDict()
        self.bytes = self.hits = 0

    def get(self, model: str, encode: Callable[[str], Encoded], prompt: str) -> Encoded:
        """The model's encoding of a prompt, by ``encode`` if it is not kept."""
        name = model, prompt
        if name in self._kept:
            self.hits += 1
            self._kept.move_to_end(name)
            return self._kept[name]
        found = self._kept[name] = encode(prompt)
        self.bytes += size(found)
        while self.bytes > self._most_bytes:
            self.bytes -= size(self._kept.popitem(last=False)[1])
        return found


def size(encoded: Encoded) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in encoded)
