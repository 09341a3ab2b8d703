"""A picture as a PNG file that remembers how it was made, the way Stable Diffusion tools read it back."""

import io
import re

from PIL.PngImagePlugin import PngInfo

from fulgurite import Picture, __version__

# PNG text holds no NUL, and other control characters break the tools that show it.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def parameters(picture: Picture) -> str:
    """The request and what became of it, as AUTOMATIC1111's web UI writes them. Nothing here depends on the clock."""
    request = picture.request
    lines = [readable(request.prompt)]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {readable(request.negative_prompt)}")
    lines.append(
        f"Steps: {picture.steps}, Sampler: Euler, CFG scale: {request.guidance:g}, Seed: {request.seed}, "
        f"Size: {request.width}x{request.height}, Model: {picture.model}, Version: Fulgurite {__version__}"
    )
    return "\n".join(lines)


def readable(text: str) -> str:
    """The text without what a PNG cannot hold: control characters and lone surrogates."""
    return CONTROL.sub(" ", text).encode("utf-8", "replace").decode("utf-8")


def png_bytes(picture: Picture) -> bytes:
    """The file: the same request and seed give the same bytes."""
    info = PngInfo()
    info.add_text("parameters", parameters(picture))
    file = io.BytesIO()
    # Level 3: a third of the time that the default takes, for files a tenth larger.
    picture.image.save(file, "PNG", pnginfo=info, compress_level=3)
    return file.getvalue()
