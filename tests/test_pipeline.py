"""The whole way from prompt to pixels, beside diffusers' pipeline with the same weights and the same noise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_sdxl as small
import torch
from diffusers import StableDiffusionXLPipeline

from fulgurite.cards import Card
from fulgurite.pipeline import Pipeline
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
