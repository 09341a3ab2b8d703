"""Pipelines as the engine loads them: on this machine's device, each checkpoint once."""

import torch

from fulgurite.cards import card
from fulgurite.errors import FulguriteError
from fulgurite.pipeline import Pipeline


class Loader:
    """Gives the pipeline for a model and a number of steps; keeps what it has loaded."""

    def __init__(self, device: str = "auto") -> None:
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            why = str(error).partition("\n")[0]
            raise FulguriteError(f"FULGURITE_DEVICE: cannot compute on {self.device!r} here: {why}") from None
        self.dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        self._loaded: dict[tuple[str, int], Pipeline] = {}

    def __call__(self, model: str, steps: int) -> Pipeline:
        of_model = card(model)
        # Without schedules one checkpoint draws any number of steps.
        key = model, of_model.steps_for(steps) if of_model.schedules else 0
        if key not in self._loaded:
            self._loaded[key] = Pipeline.load(model, steps=steps, device=self.device, dtype=self.dtype)
        return self._loaded[key]
