"""The decoder taught on: what it learns from is what the UNet leaves, and each side of it learns by its own losses."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ground import small_ground, small_sprites
from small_sdxl import FAST

from fulgurite.models import TinyDecoder
from fulgurite.sampling import trailing_schedule
from fulgurite.training import decoder, recipe
from fulgurite.training.decoder import (
    BACK,
    STEPS,
    PatchDiscriminator,
    adversarial,
    as_drawn,
    refine_decoder,
)
from fulgurite.training.distil import Ground
from fulgurite.training.loop import Run, TimeIsUpError
from fulgurite.training.vae import reconstruction_losses
from fulgurite.weights.load import load_vae


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return small_ground(tmp_path, count=2 * (BACK + 1), side=16)


def test_latents_are_walked_back_from_each_of_the_last_steps_and_made_once(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []

    def walked(unet, x, first, count, schedule, to, kind, guide):
        walks.append((first.tolist(), count, float(x.std()), guide.strength, tuple(to.context.shape)))
        return x + 1

    monkeypatch.setattr(decoder, "walked", walked)
    drawn = as_drawn(ground, tmp_path / "drawn", 100)
    assert (drawn.shape, drawn.dtype) == (ground.latents.latents.shape, np.float16)
    np.testing.assert_array_equal(drawn[-2:], ground.latents.latents[-2:])  # as it is
    assert not (drawn[:-2] == ground.latents.latents[:-2]).all(axis=(1, 2, 3)).any()
    sigmas = trailing_schedule(STEPS).sigmas
    for back, (first, count, spread, strength, context) in enumerate(walks, 1):
        assert (first, count, strength) == ([STEPS - back] * 2, back, ground.card.guidance_strength)
        assert spread == pytest.approx(float((1 + sigmas[STEPS - back] ** 2) ** 0.5), rel=0.1)  # latents' is 1
        assert context == (2, 24, 80)
    assert len(walks) == BACK
    np.testing.assert_array_equal(as_drawn(ground, tmp_path / "drawn", 100), drawn)
    with torch.no_grad():
        ground.vae.decoder.conv_in.weight.zero_()
    as_drawn(ground, tmp_path / "drawn", 100)
    assert len(walks) == BACK  # not of the decoder
    with torch.no_grad():
        next(ground.encoders[0].parameters()).zero_()
    as_drawn(ground, tmp_path / "drawn", 100)
    assert len(walks) == 2 * BACK  # but of the text encoders


def test_each_side_learns_by_its_own_loss() -> None:
    torch.manual_seed(0)
    discriminator, renders = PatchDiscriminator(), torch.rand(2, 3, 64, 64) * 2 - 1
    again = (renders + 0.3 * torch.randn_like(renders)).requires_grad_()
    errors = reconstruction_losses(renders, again)["squared"]
    losses = adversarial(discriminator, renders, again, errors, 0.5)
    (asked,) = torch.autograd.grad(errors, again, retain_graph=True)
    losses["adversarial"].backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    slope, again.grad = again.grad, None
    assert slope.norm() == pytest.approx(0.5 * asked.norm().item(), rel=1e-3)
    nearer = (again - 0.02 * slope / slope.abs().max()).detach().requires_grad_()
    assert adversarial(discriminator, renders, nearer, nearer.sum(), 0.5)["adversarial"] < losses["adversarial"]
    (losses["discriminator"] + losses["unsteady"]).backward()
    assert again.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in discriminator.parameters())


def test_a_discriminator_comes_to_tell_renders_from_what_is_blurred() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator((8, 16, 16))
    optimizer = torch.optim.AdamW(discriminator.parameters(), 3e-3)
    for _ in range(30):
        renders = (torch.rand(4, 3, 8, 8) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
        again = torch.nn.functional.avg_pool2d(renders, 5, 1, 2).requires_grad_()
        losses = adversarial(discriminator, renders, again, again.square().mean(), 1.0)
        (losses["discriminator"] + losses["unsteady"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert discriminator(renders)[0].mean() > 0.5
    assert discriminator(again)[0].mean() < -0.5


def test_a_decoder_that_stopped_goes_on_to_the_same_one_beside_the_same_encoder(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops once before there is a discriminator, and once after."""
    drawn, before = ground.latents.latents, deepcopy(ground.vae)
    whole = replace(ground, vae=deepcopy(before))
    refine_decoder(drawn, whole, small_sprites(), tmp_path / "whole", 6)
    over = iter([False, True, False, False, True, False])
    monkeypatch.setattr(Run, "over", lambda run: next(over))
    for at in (2, 5):
        with pytest.raises(TimeIsUpError, match=f"at step {at} of 6"):
            refine_decoder(drawn, replace(ground, vae=deepcopy(before)), small_sprites(), tmp_path / "parts", 6)
    refine_decoder(drawn, ground, small_sprites(), tmp_path / "parts", 6)
    weights = whole.vae.state_dict()
    for name, tensor in ground.vae.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        learns = name.startswith(("decoder", "post_quant_conv"))
        assert torch.equal(tensor, before.state_dict()[name]) != learns, name


def test_a_decoder_learns_what_scenes_look_like(ground: Ground, tmp_path: Path) -> None:
    """At first by itself, then against a discriminator."""
    refine_decoder(ground.latents.latents, ground, small_sprites(), tmp_path / "decoder", 100)
    log = [json.loads(line) for line in (tmp_path / "decoder/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [50, 100]
    assert ["discriminator" in row for row in log] == [False, True]
    assert log[1]["squared"] < 0.8 * log[0]["squared"]


def test_the_fast_decoder_learns_from_the_decoder_as_it_came_to_be(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are written beside the model, and neither is taken for what another decoder came to be."""
    taught: list[Path] = []
    monkeypatch.setattr(recipe, "refine_decoder", lambda drawn, ground, *_: ground.vae.decoder.apply(blank))

    def train_fast_decoder(drawn, vae, config, folder, steps, run):
        assert not vae.decoder.conv_out.weight.any() or not taught
        taught.append(folder)
        return TinyDecoder(config)

    monkeypatch.setattr(recipe, "train_fast_decoder", train_fast_decoder)
    config = replace(ground.card, fast_decoder=FAST)
    ground, preset = replace(ground, card=config), recipe.PRESETS["cpu"]
    recipe.fast_decoder(tmp_path, tmp_path / "out", preset, ground, as_drawn(ground, tmp_path / "drawn", 100))
    recipe.decoders(tmp_path, tmp_path / "out", preset, ground, small_sprites())
    assert len(set(taught)) == 2
    written = load_vae(tmp_path / "out/vae/diffusion_pytorch_model.safetensors", ground.card, "cpu", torch.float32)
    assert not written.decoder.conv_out.weight.any()
    assert written.encoder.conv_out.weight.any()
    assert (tmp_path / "out/fast_decoder/diffusion_pytorch_model.safetensors").exists()


def blank(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.zeros_(parameter)
