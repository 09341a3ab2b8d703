"""The samplers against diffusers' EulerDiscreteScheduler, step by step."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from fulgurite.sampling import (
    euler_step,
    scale_input,
    starting_noise,
    to_denoised,
    trailing_schedule,
    train_sigmas,
)

KINDS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def oracle(kind: str, steps: int) -> EulerDiscreteScheduler:
    """SDXL's published scheduler with trailing timesteps, as Lightning's model card asks for."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=KINDS[kind],
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 20, 30, 999, 1000])
def test_the_trailing_schedule_agrees(steps):
    schedule, wanted = trailing_schedule(steps), oracle("epsilon", steps)
    assert schedule.timesteps.tolist() == wanted.timesteps.tolist()
    torch.testing.assert_close(schedule.sigmas, wanted.sigmas, atol=1e-6, rtol=1e-6)
    assert float(schedule.sigmas[0]) == pytest.approx(float(wanted.init_noise_sigma), rel=1e-6)


def test_the_schedules_of_lightning():
    assert trailing_schedule(1).timesteps.tolist() == [999]
    assert trailing_schedule(4).timesteps.tolist() == [999, 749, 499, 249]
    assert trailing_schedule(8).timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_schedules_that_cannot_be_are_refused(steps):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        trailing_schedule(steps)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_agrees(kind, steps):
    """The network is a fixed random function of its input: what it says does not matter, only what is made of it."""
    generator = torch.Generator().manual_seed(steps)
    mix = torch.randn(4, 4, generator=generator) / 2
    schedule, scheduler = trailing_schedule(steps), oracle(kind, steps)
    ours = theirs = torch.randn(2, 4, 6, 5, generator=generator) * schedule.sigmas[0]

    for i, timestep in enumerate(scheduler.timesteps):
        sigma, next_sigma = schedule.sigmas[i].expand(2), schedule.sigmas[i + 1].expand(2)
        scaled = scale_input(ours, sigma)
        torch.testing.assert_close(scaled, scheduler.scale_model_input(theirs, timestep), atol=1e-6, rtol=1e-6)

        prediction = torch.einsum("oc,bchw->bohw", mix, scaled).tanh()
        ours = euler_step(ours, to_denoised(prediction, ours, sigma, kind), sigma, next_sigma)
        largest = float(theirs.abs().max())  # the first latents are near 40, where float32 itself is 4e-6 apart
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, atol=1e-6 * max(1, largest), rtol=1e-6)


def test_another_kind_of_prediction_is_refused():
    with pytest.raises(ValueError, match='"epsilon", "v" or "x0", not \'v_prediction\''):
        to_denoised(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1), "v_prediction")


def test_rows_of_one_batch_may_be_at_different_steps():
    generator = torch.Generator().manual_seed(0)
    x, prediction = torch.randn(3, 4, 5, 6, generator=generator), torch.randn(3, 4, 5, 6, generator=generator)
    sigma, next_sigma = torch.tensor([14.6, 3.0, 0.2]), torch.tensor([5.0, 0.0, 0.1])
    for kind in KINDS:
        together = euler_step(x, to_denoised(prediction, x, sigma, kind), sigma, next_sigma)
        for row in range(3):
            r = slice(row, row + 1)
            denoised = to_denoised(prediction[r], x[r], sigma[r], kind)
            torch.testing.assert_close(euler_step(x[r], denoised, sigma[r], next_sigma[r]), together[r])


def test_the_last_step_ends_on_the_denoised_latent():
    x, denoised = torch.randn(2, 3, 4, 5).unbind()
    sigma = torch.tensor([2.0, 2.0, 2.0])
    torch.testing.assert_close(euler_step(x, denoised, sigma, torch.zeros(3)), denoised, atol=1e-6, rtol=1e-6)


def test_noise_levels_rise_with_the_timestep():
    sigmas = train_sigmas()
    assert sigmas.shape == (1000,)
    assert (sigmas.diff() > 0).all()


def test_starting_noise_depends_on_the_seed_alone():
    first = starting_noise(7, (4, 8, 8), 2.0)
    torch.manual_seed(123)
    torch.randn(5)
    assert torch.equal(first, starting_noise(7, (4, 8, 8), 2.0))
    assert not torch.equal(first, starting_noise(8, (4, 8, 8), 2.0))
    assert torch.equal(first * 2, starting_noise(7, (4, 8, 8), 4.0))
    assert starting_noise(2**64 - 1, (1, 2, 2), 1.0).isfinite().all()


def test_starting_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    starting_noise(7, (4, 8, 8), 1.0)
    assert torch.equal(before, torch.get_rng_state())
