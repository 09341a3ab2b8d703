"""Guidance: classifier-free for undistilled models, normalized attention guidance for distilled ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LIGHTNING, SPARK, needs_weights
from small_sdxl import UNET, roughened

from fulgurite import Pipeline, Request
from fulgurite.cards import card
from fulgurite.models import AttentionGuidance, UNet
from fulgurite.request import guidance_strength


def inputs(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(rows, UNET.in_channels, 8, 8, generator=generator),
        "timestep": torch.tensor([999, 400, 20, 750][:rows]),
        "context": torch.randn(rows, 7, UNET.cross_attention_dim, generator=generator),
        "pooled": torch.randn(rows, UNET.pooled_dim, generator=generator),
        "sizes": torch.full((rows, 6), 64.0),
    }


@pytest.fixture(scope="module")
def unet() -> UNet:
    network = UNet(UNET).eval()
    roughened(network)
    return network


@pytest.mark.parametrize("tau", [2.5, 1.0])
def test_attention_guidance_is_the_papers(tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, unwanted = torch.randn(2, 2, 5, 16, generator=generator)
    unwanted[0] *= 0.1  # here the ratio of the norms passes tau in no row, below in every one
    unwanted[0] += wanted[0]
    guided = AttentionGuidance(unwanted, torch.tensor([3.0, 3.0]), tau)(wanted, unwanted)

    # Equations 6 to 8 of arXiv 2505.21179; tau is 2.5 in its SDXL experiments.
    steered = wanted * 3 - unwanted * 2
    ratio = torch.norm(steered, p=1, dim=-1, keepdim=True) / torch.norm(wanted, p=1, dim=-1, keepdim=True)
    assert (ratio > tau).any()
    assert (ratio < tau).any()
    normed = torch.minimum(ratio, torch.tensor(tau)) / ratio * steered
    torch.testing.assert_close(guided, 0.5 * normed + 0.5 * wanted)


@torch.inference_mode()
def test_a_row_of_strength_one_is_not_changed_by_a_bit(unet: UNet) -> None:
    given = inputs(3)
    plain = unet(**given)
    guided = unet(**given, guidance=AttentionGuidance(given["context"].roll(1, 0), torch.tensor([1.0, 4.0, 1.0])))
    assert torch.equal(guided[[0, 2]], plain[[0, 2]])
    assert (guided[1] - plain[1]).abs().max() > 1e-5


@torch.inference_mode()
def test_rows_are_guided_each_by_its_own_prompt_and_strength(unet: UNet) -> None:
    given, strengths = inputs(3), torch.tensor([0.5, 3.0, 8.0])
    avoid = torch.randn(3, 7, UNET.cross_attention_dim, generator=torch.Generator().manual_seed(9))
    together = unet(**given, guidance=AttentionGuidance(avoid, strengths))
    for i in range(3):
        row = slice(i, i + 1)
        alone = unet(
            **{name: value[row] for name, value in given.items()},
            guidance=AttentionGuidance(avoid[row], strengths[row]),
        )
        torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_avoiding_the_prompt_itself_changes_nothing(unet: UNet) -> None:
    given = inputs(2)
    guided = unet(**given, guidance=AttentionGuidance(given["context"], torch.tensor([3.0, 9.0])))
    torch.testing.assert_close(guided, unet(**given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "negative", "guidance", "strength"),
    [
        (LIGHTNING, "", 7.5, 1.0),  # as distilled: one plain evaluation a step
        (LIGHTNING, "", 15.0, 2.0),
        (LIGHTNING, "blurry", 7.5, 3.0),
        (LIGHTNING, "blurry", 0.0, 1.0),
        (SPARK, "", 7.5, card(SPARK).guidance_strength),
        (SPARK, "", 0.0, 1.0),
    ],
)
def test_the_strength_that_the_apis_number_stands_for(
    model: str, negative: str, guidance: float, strength: float
) -> None:
    request = Request("a fox", negative_prompt=negative, guidance=guidance)
    assert guidance_strength(card(model), request) == pytest.approx(strength)


def test_a_distilled_model_draws_the_published_request_and_heeds_its_negative_prompt(tiny: Pipeline) -> None:
    distilled = Pipeline(replace(tiny.card, schedules=(1, 2, 4, 8)), tiny.networks)
    asked = Request("futuristic spacecraft", width=256, height=256, num_steps=4, seed=3)
    plain, blurry, zero, low = (
        distilled.draw(request)
        for request in (
            asked,
            replace(asked, negative_prompt="blurry, low quality"),
            replace(asked, negative_prompt="blurry, low quality", guidance=0),
            replace(asked, guidance=2.0),
        )
    )
    assert plain.image.tobytes() != blurry.image.tobytes()
    assert plain.image.tobytes() != low.image.tobytes()
    assert plain.image.tobytes() == zero.image.tobytes()
    shorter = Pipeline(replace(distilled.card, guidance_tau=0.5), tiny.networks)
    assert shorter.draw(replace(asked, negative_prompt="blurry, low quality")).image.tobytes() != blurry.image.tobytes()
    assert "negative_prompt beside a guidance of 0: neither had an effect" in zero.notes
    undistilled = tiny.draw(replace(asked, negative_prompt="blurry, low quality", guidance=0))
    assert "negative_prompt beside a guidance of 0: it had no effect" in undistilled.notes


@needs_weights
def test_a_negative_prompt_takes_away_the_flower_that_would_be_drawn() -> None:
    draw = Pipeline.load("fulgurite/spark-lightning", steps=4)

    def pictures(prompt: str, negative: str = "") -> np.ndarray:
        asked = Request(prompt, negative, width=256, height=256, num_steps=4, decoder="fast")
        return np.stack([np.asarray(draw.draw(replace(asked, seed=seed)).image, float) for seed in range(3)])

    flowers = {name: pictures(f"a {name}") for name in ("tulip", "rose", "sunflower")}

    def far(from_flower: str, negative: str) -> float:
        return float(np.abs(flowers[from_flower] - pictures("a flower", negative)).mean())

    without = {name: far(name, "") for name in flowers}
    drawn = min(without, key=without.__getitem__)
    assert far(drawn, drawn) > 1.3 * without[drawn]
    assert far(drawn, drawn) > 1.1 * far(drawn, "cat")


@torch.inference_mode()
def test_classifier_free_guidance_mixes_two_predictions(tiny: Pipeline) -> None:
    asked = Request("a fox", negative_prompt="a cat", width=256, height=256, num_steps=1, seed=3)
    seen: list[torch.Tensor] = []
    hook = tiny.networks.unet.register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        guided = tiny.draw(asked).image
        only = tiny.draw(replace(asked, negative_prompt="", guidance=0)).image
    finally:
        hook.remove()
    assert [len(out) for out in seen] == [2, 2]  # the second padded: bits are those of a batch of two
    assert not torch.equal(seen[0][0], seen[0][1])
    assert guided.tobytes() != only.tobytes()
