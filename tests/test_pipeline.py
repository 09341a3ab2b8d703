"""The whole way from prompt to pixels, beside diffusers' pipeline with the same weights and the same noise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_sdxl as small
import torch
from conftest import SPARK, needs_weights
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from fulgurite.cards import Card, card
from fulgurite.errors import RequestError
from fulgurite.pipeline import Pipeline, as_large_as_asked
from fulgurite.sampling import starting_noise
from fulgurite.weights import load_networks

WIDTH, HEIGHT, SEED = 264, 256, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small.saved_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def oracle(folder) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def loaded(card: Card) -> Pipeline:
    return Pipeline(card, load_networks(card, 4, "cpu", torch.float32))


def drawn_by(oracle: StableDiffusionXLPipeline, steps: int, **guidance: object) -> np.ndarray:
    """Pixels ``[H, W, 3]`` in 0..1."""
    cell = oracle.vae_scale_factor
    noise = starting_noise(SEED, (4, HEIGHT // cell, WIDTH // cell), 1.0)[None]
    size = {"width": WIDTH, "height": HEIGHT}
    return oracle("a red fox", latents=noise, num_inference_steps=steps, output_type="np", **size, **guidance).images[0]


def pixels(pipeline: Pipeline, steps: int, **parameters: object) -> np.ndarray:
    picture = pipeline("a red fox", width=WIDTH, height=HEIGHT, num_steps=steps, seed=SEED, **parameters)
    return np.asarray(picture.image) / 255


def assert_alike(found: np.ndarray, wanted: np.ndarray) -> None:
    """Within a rounding of 8 bits and what float32 leaves; of pictures that are not plain."""
    assert wanted.std() > 0.02
    assert np.abs(found - wanted).max() < 1 / 255


@needs_weights
def test_a_pipeline_draws_with_the_schedule_that_it_was_loaded_for():
    draw = Pipeline.load("fulgurite/spark-lightning", steps=5)
    assert draw("a red fox", seed=SEED).steps == 4
    with pytest.raises(RequestError, match="needs at least 4"):
        draw("a red fox", num_steps=2)


@pytest.mark.parametrize("side", [56, 104, 112])
def test_a_native_picture_covers_every_size(side):
    """Rounding makes what is cut out of some sizes' pictures larger than the picture, by a hair."""
    of_model, image = replace(card(SPARK), native_shapes=((side, side),)), Image.new("RGB", (side, side))
    for asked in range(side + 1, side + 40):
        assert as_large_as_asked(image, asked, asked, of_model).size == (asked, asked)


def test_a_distilled_model_draws_what_diffusers_draws(folder, oracle):
    pipeline = loaded(small.local_card(folder))
    assert_alike(pixels(pipeline, steps=4), drawn_by(oracle, steps=4, guidance_scale=0.0))


@pytest.mark.parametrize("negative_prompt", [None, "a cat"])
@pytest.mark.parametrize("zeros", [True, False])
def test_an_undistilled_model_draws_what_diffusers_draws(folder, oracle, negative_prompt, zeros):
    """Where there is no negative prompt SDXL is guided away from zeros, other models from an empty prompt's states."""
    oracle.register_to_config(force_zeros_for_empty_prompt=zeros)
    card = small.local_card(folder)
    pipeline = loaded(replace(card, schedules=(), guidance_strength=6.0, force_zeros_for_empty_prompt=zeros))
    found = pixels(pipeline, steps=5, negative_prompt=negative_prompt or "")
    wanted = drawn_by(oracle, steps=5, guidance_scale=6.0, negative_prompt=negative_prompt)
    assert_alike(found, wanted)
    other = drawn_by(oracle, steps=5, guidance_scale=6.0, negative_prompt="a fox")
    assert np.abs(other - wanted).max() > 2 / 255  # so much does what it is guided away from change
