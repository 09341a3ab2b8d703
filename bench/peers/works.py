"""The works that are measured: whose networks, with which weights, and the picture that they are to draw."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from fulgurite import Request
from fulgurite.cards import Card, card
from fulgurite.models import VAE, CLIPTextEncoder, TinyDecoder, Tokenizer, UNet
from fulgurite.weights import Networks, load_networks

PROMPT, SEED = "futuristic spacecraft", 12345
TOKENIZER = Path(str(resources.files("fulgurite") / "embedded" / "spark" / "tokenizer"))


@dataclass(frozen=True)
class Work:
    """A picture to draw, by networks that every way has the same weights of."""

    card: Card
    request: Request
    load: Callable[["Work", torch.dtype], Networks]

    def networks(self, dtype: torch.dtype) -> Networks:
        return self.load(self, dtype)


def real_weights(work: Work, dtype: torch.dtype) -> Networks:
    return load_networks(work.card, work.request.num_steps, "cpu", dtype)


def random_weights(work: Work, dtype: torch.dtype, device: str = "cpu", seed: int = SEED) -> Networks:
    """Networks as they are before training, drawn in bfloat16 so that every precision has the same weights."""

    def drawn(build: Callable[[], nn.Module]) -> nn.Module:
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                return build().to(dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    torch.manual_seed(seed)
    first, second = work.card.text_encoders
    tokenizer = Tokenizer.from_folder(TOKENIZER, first.max_position_embeddings)
    return Networks(
        tokenizers=(tokenizer, tokenizer),
        text_encoders=(drawn(lambda: CLIPTextEncoder(first)), drawn(lambda: CLIPTextEncoder(second))),
        unet=drawn(lambda: UNet(work.card.unet)),
        vae=drawn(lambda: VAE(work.card.vae)),
        prediction=work.card.prediction,
        fast_decoder=drawn(lambda: TinyDecoder(tiny)) if (tiny := work.card.fast_decoder) else None,
    )


def spark(steps: int = 4) -> Work:
    """The embedded model, whose pictures can also be compared."""
    request = Request(PROMPT, width=256, height=256, num_steps=steps, seed=SEED)
    return Work(card("fulgurite/spark-lightning"), request, real_weights)


def sdxl(side: int, steps: int = 1) -> Work:
    """SDXL's sizes with random weights, for time alone. The tokenizer is the embedded one, its end token too."""
    lightning = card("bytedance/stable-diffusion-xl-lightning")
    end = card("fulgurite/spark").text_encoders[0].eos_token_id
    first, second = (replace(config, eos_token_id=end) for config in lightning.text_encoders)
    of_model = replace(lightning, text_encoders=(first, second))
    return Work(of_model, Request(PROMPT, width=side, height=side, num_steps=steps, seed=SEED), random_weights)


WORKS: dict[str, Callable[..., Work]] = {
    "spark": spark,
    "sdxl-512": lambda steps=1: sdxl(512, steps),
    "sdxl-1024": lambda steps=1: sdxl(1024, steps),
}
