"""A picture's way told as OpenAI's Images API tells it: partial images, then the picture."""

import asyncio
import base64
import io
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from fulgurite.records import Answer
from fulgurite.server.jobs import StepDone, made
from fulgurite.server.streaming import event

QUALITIES = ("low", "medium", "high", "xhigh", "max")  # that events may tell; auto stands for all else
# Programs read it of every picture; here none is billed by tokens.
NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def enlarged(preview: bytes, width: int, height: int, output_format: str) -> bytes:
    """A preview at the picture's size, cut to its shape where the network drew another."""
    with Image.open(io.BytesIO(preview)) as small:
        image = ImageOps.fit(small, (width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, output_format, compress_level=1, method=0)  # the quickest of PNG, and of WebP
    return file.getvalue()


@dataclass
class OpenAIDialect:
    """The events of one stream."""

    width: int
    height: int
    output_format: str
    quality: str | None
    partial_images: int  # at most
    sent: int = 0

    def queued(self, id: str, position: int | None, seconds: float) -> bytes:
        return b""  # OpenAI has no such event

    async def step(self, step: StepDone) -> bytes:
        # A job that this request joined may show more of its steps than it asked for.
        if step.preview is None or self.sent == self.partial_images:
            return b""
        content = await asyncio.to_thread(enlarged, step.preview, self.width, self.height, self.output_format)
        self.sent += 1
        return self.told("partial_image", content, {"partial_image_index": self.sent - 1})

    def done(self, answer: Answer) -> bytes:
        return self.told("completed", answer.content, {"usage": NO_TOKENS, "made": made(answer)})

    def told(self, kind: str, content: bytes, more: dict[str, Any]) -> bytes:
        name = f"image_generation.{kind}"
        common = {
            "type": name,
            "b64_json": base64.b64encode(content).decode(),
            "created_at": int(time.time()),
            "size": f"{self.width}x{self.height}",
            "quality": self.quality if self.quality in QUALITIES else "auto",
            "background": "opaque",
            "output_format": self.output_format,
        }
        return event(name, common | more)
