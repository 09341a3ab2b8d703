"""The decoder taught on: what it learns from is what the UNet leaves, and each side of it learns by its own losses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ground import small_ground, small_sprites

from fulgurite.sampling import trailing_schedule
from fulgurite.training import decoder
from fulgurite.training.decoder import (
    BACK,
    JUDGED_AFTER,
    JUDGES_SHARE,
    STEPS,
    PictureJudge,
    adversarial,
    as_drawn,
    refine_decoder,
)
from fulgurite.training.distil import Ground
from fulgurite.training.latents import LatentSet, scene_at
from fulgurite.training.loop import Run, TimeIsUpError
from fulgurite.training.vae import reconstruction_losses


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
    drawn = as_drawn(ground, tmp_path / "drawn")
    assert (drawn.shape, drawn.dtype) == (ground.latents.latents.shape, np.float16)
    np.testing.assert_array_equal(drawn[-2:], ground.latents.latents[-2:])  # as it is
    assert not (drawn[:-2] == ground.latents.latents[:-2]).all(axis=(1, 2, 3)).any()
    sigmas = trailing_schedule(STEPS).sigmas
    for back, (first, count, spread, strength, context) in enumerate(walks, 1):
        assert (first, count, strength) == ([STEPS - back] * 2, back, ground.card.guidance_strength)
        assert spread == pytest.approx(float((1 + sigmas[STEPS - back] ** 2) ** 0.5), rel=0.1)  # latents' is 1
        assert context == (2, 24, 80)
    assert len(walks) == BACK
    np.testing.assert_array_equal(as_drawn(ground, tmp_path / "drawn"), drawn)
    assert len(walks) == BACK
    as_drawn(replace(ground, vae=small_ground(tmp_path, 1).vae.requires_grad_(False).apply(blank)), tmp_path / "drawn")
    assert len(walks) == 2 * BACK  # of another encoder


def blank(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.zeros_(parameter)


def test_each_side_learns_by_its_own_loss() -> None:
    torch.manual_seed(0)
    judge, renders = PictureJudge(), torch.rand(2, 3, 64, 64) * 2 - 1
    again = (renders + 0.3 * torch.randn_like(renders)).requires_grad_()
    errors = reconstruction_losses(renders, again)["squared"]
    losses = adversarial(judge, renders, again, errors)
    (asked,) = torch.autograd.grad(errors, again, retain_graph=True)
    (wanted,) = torch.autograd.grad(losses["adversarial"], again)
    assert wanted.norm() == pytest.approx(JUDGES_SHARE * asked.norm().item(), rel=1e-3)
    assert all(parameter.grad is None for parameter in judge.parameters())
    (losses["judge"] + losses["unsteady"]).backward()
    assert again.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in judge.parameters())


def test_a_judge_comes_to_tell_renders_from_what_is_blurred() -> None:
    torch.manual_seed(0)
    judge = PictureJudge((8, 16, 16))
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    for _ in range(30):
        renders = (torch.rand(4, 3, 8, 8) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
        again = torch.nn.functional.avg_pool2d(renders, 5, 1, 2).requires_grad_()
        losses = adversarial(judge, renders, again, again.square().mean())
        (losses["judge"] + losses["unsteady"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert judge(renders)[0].mean() > 0.5
    assert judge(again)[0].mean() < -0.5


def test_the_decoder_learns_on_and_goes_on_where_it_stopped(ground: Ground, tmp_path: Path) -> None:
    """From the latents of scenes alike, what they are can be learned; the encoder stays, and so do latents."""
    sprites, encoder = small_sprites(), {name: x.clone() for name, x in ground.vae.encoder.state_dict().items()}
    scenes = [scene_at(sprites, ground.latents.size, number) for number in range(10)]
    drawn = np.random.default_rng(0).standard_normal((10, 4, 16, 16)).astype(np.float16)
    ground = replace(ground, latents=LatentSet(ground.latents.size, drawn, scenes))
    with pytest.raises(TimeIsUpError):
        refine_decoder(drawn, replace(ground, run=Run(until=0)), sprites, tmp_path / "decoder", 100)
    vae = refine_decoder(drawn, ground, sprites, tmp_path / "decoder", 100)
    log = [json.loads(line) for line in (tmp_path / "decoder/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [50, 100]
    assert ["judge" in row for row in log] == [False, True]
    assert 50 < JUDGED_AFTER * 100 < 100
    assert log[1]["squared"] < 0.8 * log[0]["squared"]
    assert all(torch.equal(x, encoder[name]) for name, x in vae.encoder.state_dict().items())
