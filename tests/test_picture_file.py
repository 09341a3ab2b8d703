"""Pictures as files: what our PNG writer writes, Pillow reads."""

import io

import numpy as np
import pytest
from conftest import SPARK
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fulgurite import Picture, Request
from fulgurite.picture_file import parameters, png_bytes


def picture(pixels: np.ndarray, prompt: str = "a red fox") -> Picture:
    image = Image.fromarray(pixels)
    return Picture(image, Request(prompt, seed=1), SPARK, 4, image.size, 0.1, ())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.text(min_size=2, max_size=30))
def test_pillow_reads_the_same_pixels_and_words(width: int, height: int, seed: int, prompt: str) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    made = picture(pixels, prompt)
    with Image.open(io.BytesIO(png_bytes(made))) as read:
        read.load()  # checks every checksum
        assert (np.asarray(read) == pixels).all()
        assert read.mode == "RGB"
        assert read.info["parameters"] == parameters(made)


def test_a_broken_file_is_noticed() -> None:
    """That the reader above would notice."""
    file = bytearray(png_bytes(picture(np.zeros((8, 8, 3), np.uint8))))
    file[-20] ^= 1
    with pytest.raises((OSError, SyntaxError)), Image.open(io.BytesIO(bytes(file))) as read:
        read.load()
