"""A picture as a file that remembers how it was made, the way Stable Diffusion tools read it back."""

import io
import re
import struct

import numpy as np
from isal import isal_zlib
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fulgurite import Picture, __version__

# PNG text holds no NUL, and other control characters break the tools that show it.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
LONGEST_COMMENT = 16_000  # characters: a JPEG's metadata must fit into 64 KiB


def parameters(picture: Picture) -> str:
    """The request and what became of it, as AUTOMATIC1111's web UI writes them. Nothing here depends on the clock."""
    request = picture.request
    lines = [readable(request.prompt)]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {readable(request.negative_prompt)}")
    lines.append(
        f"Steps: {picture.steps}, Sampler: Euler, CFG scale: {request.guidance:g}, Seed: {request.seed}, "
        f"Size: {request.width}x{request.height}, Model: {picture.model}, "
        f"Decoder: {request.decoder}, Version: Fulgurite {__version__}"
    )
    return "\n".join(lines)


def readable(text: str) -> str:
    """The text without what a PNG cannot hold: control characters and lone surrogates."""
    return CONTROL.sub(" ", text).encode("utf-8", "replace").decode("utf-8")


def file_bytes(picture: Picture, media_type: str) -> bytes:
    """The file, of one of the media types in FORMATS: the same request and seed give the same bytes."""
    if media_type == FORMATS["png"]:
        return png_bytes(picture)
    file = io.BytesIO()
    if media_type == FORMATS["jpeg"]:
        picture.image.save(file, "JPEG", quality=90, exif=user_comment(picture))
    else:
        picture.image.save(file, "WEBP", quality=90, method=2, exif=user_comment(picture))
    return file.getvalue()


def preview_bytes(image: Image.Image) -> bytes:
    """A JPEG of a few kilobytes."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return file.getvalue()


def user_comment(picture: Picture) -> Image.Exif:
    """The parameters where JPEG and WebP hold them; prompts too long for that are cut, the numbers kept."""
    text, exif = parameters(picture), Image.Exif()
    if len(text) > LONGEST_COMMENT:
        numbers = text.rpartition("\n")[2]
        text = f"{text[: LONGEST_COMMENT - len(numbers)]}...\n{numbers}"
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def png_bytes(picture: Picture) -> bytes:
    """The file: the same request and seed give the same bytes."""
    info = PngInfo()
    info.add_text("parameters", parameters(picture))
    header = struct.pack(">IIBBBBB", *picture.image.size, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    rows = isal_zlib.compress(upwards(np.asarray(picture.image)).data, 1)
    chunks = [(b"IHDR", header), *((name, data) for name, data, *_ in info.chunks), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, data) for name, data in chunks)


def upwards(pixels: np.ndarray) -> np.ndarray:
    """Pixels ``[H, W, 3]`` as PNG's filter 2 has them: each row less the one above it, and the filter's number first.

    With ISA-L's deflate this takes a tenth of Pillow's time, for files no larger (bench/png.py).
    """
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.full((height, 1 + width * channels), 2, np.uint8)
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", isal_zlib.crc32(name + data))
