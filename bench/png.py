"""How long a 1024x1024 PNG takes to encode, ours beside Pillow's zlib levels: python bench/png.py

Two pictures: a smooth one, as the embedded model draws, and the same under noise, which compresses as photographs do.
"""

import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from fulgurite import Picture, Pipeline, Request
from fulgurite.picture_file import png_bytes

ROUNDS = 7


def pillow(image: Image.Image, level: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=level)
    return file.getvalue()


def median_seconds(encode: Callable[[], bytes]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        encode()
        times.append(time.perf_counter() - started)
    return sorted(times)[ROUNDS // 2]


def main() -> None:
    smooth = Pipeline.load("fulgurite/spark")("futuristic spacecraft", seed=12345).image
    noise = np.random.default_rng(0).normal(0, 6, (1024, 1024, 3))
    noisy = Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))
    for name, image in (("smooth", smooth), ("noisy", noisy)):
        picture = Picture(
            image, Request("futuristic spacecraft", seed=12345), "fulgurite/spark", 20, image.size, 1.0, ()
        )
        encoders: dict[str, Callable[[], bytes]] = {"ours": lambda picture=picture: png_bytes(picture)}
        encoders |= {f"Pillow, level {n}": lambda image=image, n=n: pillow(image, n) for n in (1, 3, 6)}
        for encoder, encode in encoders.items():
            print(
                f"{name:7} {encoder:16} {1e3 * median_seconds(encode):6.1f} ms {len(encode()) // 1000:5} kB", flush=True
            )


if __name__ == "__main__":
    main()
