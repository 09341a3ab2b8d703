"""What a picture costs on this machine, part by part: seconds, arithmetic, memory, money."""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from fulgurite.cards import Card
from fulgurite.models import VAE, CLIPTextEncoder, TinyDecoder, UNet
from fulgurite.pipeline import Pipeline, smallest_batch
from fulgurite.request import Picture, Request, plan

PARTS = ("text", "step", "decode", "to host", "encode")  # of a picture; a step is one of several
PICTURE = "picture"  # all of it, end to end
HOSTED_DOLLARS = 1.10  # a thousand pictures of the hosted API: its card's $0.0011 each


class Laps:
    """A stopwatch that takes the time of one part after the other, with all the work that a device still has of it."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self._started = self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, part: str, times: int = 1) -> None:
        """Everything since the last lap was this part, so many times over."""
        now = self._now()
        self.seconds[part] = (now - self._last) / times
        self.seconds[PICTURE] = now - self._started
        self._last = now


def draw_in_parts(pipeline: Pipeline, request: Request) -> tuple[Picture, dict[str, float]]:
    """Draws one picture as ``Pipeline.draw`` does, and encodes it as PNG.

    Returns the picture, and the seconds of each of PARTS and of PICTURE.
    """
    from fulgurite.picture_file import png_bytes  # here: all the rest measures without a PNG library too

    laps = Laps(pipeline.device)
    row = pipeline.start(request, pipeline.encode)
    laps.lap("text")
    while row.done < row.plan.steps:
        pipeline.step([row], smallest_batch(pipeline.card, pipeline.device, row.plan.latent_shape))
    laps.lap("step", row.plan.steps)
    pixels = pipeline.decode(row)
    laps.lap("decode")
    picture = pipeline.picture(row, pixels)
    laps.lap("to host")
    png_bytes(picture)
    laps.lap("encode")
    return picture, laps.seconds


def flop_counts(card: Card, request: Request) -> dict[str, int]:
    """Floating-point operations of the prompt, of one step, of the decode and of all the picture.

    A product and its sum are two. The decode is by the decoder asked for. Raises RequestError where there is none.
    Counted by torch over networks without weights, so nothing is computed; the plain ones: what a quicker way leaves
    out is counted all the same, as the ceiling asks what the same work could take at best.
    """
    to = plan(card, request)
    with torch.device("meta"), torch.inference_mode():
        encoders, unet = [CLIPTextEncoder(each) for each in card.text_encoders], UNet(card.unet)
        fast = request.decoder == "fast" and card.fast_decoder
        decode = TinyDecoder(fast) if fast else VAE(card.vae).decode
        tokens = torch.zeros(1, card.text_encoders[0].max_position_embeddings, dtype=torch.long)
        rows, latent = to.network_rows, torch.empty(1, *to.latent_shape)
        context = torch.empty(rows, tokens.shape[1], card.unet.cross_attention_dim)
        inputs = latent.expand(rows, -1, -1, -1), torch.empty(rows), context, torch.empty(rows, card.unet.pooled_dim)
        flops = {
            "text": sum(counted(partial(encoder, tokens)) for encoder in encoders),
            "step": counted(lambda: unet(*inputs, torch.empty(rows, 6))),
            "decode": counted(lambda: decode(latent)),
        }
    return flops | {PICTURE: flops["text"] + to.steps * flops["step"] + flops["decode"]}


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.inference_mode()
def matrix_ceiling(device: str | torch.device, dtype: torch.dtype) -> float:
    """The most floating-point operations a second that square matrix products reach here, of three sizes tried."""
    best = 0.0
    for side in (4096, 8192, 16384) if torch.device(device).type == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        a @ b
        for _ in range(3):
            laps = Laps(device)
            a @ b
            laps.lap(PICTURE)
            best = max(best, 2 * side**3 / laps.seconds[PICTURE])
    return best


def peak_memory(device: str | torch.device) -> int | None:
    """The most bytes that this process has held: on a GPU those of its tensors, else its pages, mapped files' too.

    None where the system does not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def dollars_a_thousand(seconds: float, dollars_an_hour: float) -> float:
    """What a thousand pictures of so many seconds cost on a machine that costs so much and does nothing else."""
    return 1000 * seconds / 3600 * dollars_an_hour
