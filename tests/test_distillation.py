"""Distillation's parts: steps as the sampler makes them, objectives, the discriminator, LoRA files, runs that go on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_weights
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from small_ground import CARD, small_ground
from small_sdxl import UNET, oracle_unet, roughened
from torch import nn

from fulgurite import Pipeline
from fulgurite.cards import card
from fulgurite.models import UNet
from fulgurite.pipeline import Row
from fulgurite.request import Plan, Request
from fulgurite.sampling import euler_step, starting_noise, trailing_schedule, train_sigmas
from fulgurite.training import distil as distillation
from fulgurite.training.discriminator import Discriminator, Noisy, discriminator_loss, student_loss, unsteadiness
from fulgurite.training.distil import (
    Adversary,
    Distillation,
    Ground,
    Step,
    a_last_step,
    a_step,
    adversarial,
    begun,
    distil,
    landing,
    network,
    renoised,
    squared,
)
from fulgurite.training.drawing import Conditions, Guide, Sayer, denoised, seeded, walked
from fulgurite.training.evaluation.reader import Reader
from fulgurite.training.evaluation.scores import found, frechet, score
from fulgurite.training.loop import Adam, Run, Stage, TimeIsUpError, save_network
from fulgurite.training.low_rank import EDGES, LoRA
from fulgurite.training.plans import QUICK, SDXL, SMALL
from fulgurite.weights import load_networks
from fulgurite.weights.load import load_unet

SQUARED = Distillation("4", None, 8, 4, "squared", None, updates=4, peak=1e-3, rank=2)


def conditions(rows: int) -> Conditions:
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(rows, 5, UNET.cross_attention_dim, generator=generator)
    return Conditions(context, torch.randn(rows, UNET.pooled_dim, generator=generator), torch.full((rows, 6), 64.0))


def a_random_step(rows: int = 3) -> Step:
    """Of a four-step student, from its steps 0, 1 and 3."""
    torch.manual_seed(0)
    schedule, first = trailing_schedule(4), torch.tensor([0, 1, 3])[:rows]
    after = torch.cat([schedule.timesteps, torch.zeros(1, dtype=torch.long)])
    return Step(
        torch.randn(rows, 4, 8, 8), schedule.sigmas[first], schedule.timesteps[first], schedule.sigmas[first + 1],
        after[first + 1], torch.randn(rows, 4, 8, 8), conditions(rows),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return small_ground(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_a_teacher_walks_as_the_pipeline_draws(tiny: Pipeline, strength: float) -> None:
    """With a network that is plain arithmetic, so that precision plays no part."""

    class Arithmetic(nn.Module):
        def forward(self, x, timestep, context, pooled, sizes, guidance=None):
            return 0.4 * x + context.mean(dim=(1, 2))[:, None, None, None] + timestep[:, None, None, None] / 1000

    schedule = trailing_schedule(4)
    noise = starting_noise(5, (4, 8, 8), float(schedule.sigmas[0]))
    both = torch.randn(2, 3, 16)
    sizes, pooled = torch.full((1, 6), 64.0), torch.randn(2, 16)
    unet = Arithmetic()
    pipeline = Pipeline(tiny.card, replace(tiny.networks, unet=unet))
    plan = Plan(4, strength, (64, 64), tuple(noise.shape), 2)
    row = Row(Request("fox"), plan, schedule, both, pooled, sizes[0], noise, 0.0)
    for _ in range(4):
        pipeline.step([row], 2)
    drawn = row.x[None]

    wanted, away = (Conditions(both[i : i + 1], pooled[i : i + 1], sizes) for i in (0, 1))
    guide = Guide(away, strength) if strength != 1 else None
    first = torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(walked(unet, noise[None], first, 4, schedule, wanted, "v", guide), drawn)


def test_a_student_that_lands_where_its_teacher_came_has_no_error() -> None:
    step = a_random_step()
    there = euler_step(step.x, landing(step), step.sigma, step.following)
    torch.testing.assert_close(there, step.reached, atol=1e-4, rtol=1e-4)
    assert squared(landing(step), step) == 0
    assert squared(landing(step) + 1, step) > 1


def test_steps_begin_at_their_noise_and_the_first_at_pure_noise() -> None:
    schedule, first = trailing_schedule(4), torch.tensor([0, 2])
    clean, noise = torch.full((2, 4, 8, 8), 5.0), torch.randn(2, 4, 8, 8)
    x = begun(clean, noise, first, schedule)
    assert torch.equal(x[0], schedule.sigmas[0] * noise[0])
    torch.testing.assert_close(x[1] - schedule.sigmas[2] * noise[1], clean[1], atol=1e-4, rtol=1e-4)


def test_noise_is_added_up_to_a_timestep_and_never_taken_away() -> None:
    sigmas, following = train_sigmas(), torch.tensor([0, 249])
    step = replace(
        a_random_step(2), following=torch.stack([torch.zeros(()), sigmas[249]]), following_timesteps=following
    )
    x = torch.randn(2, 4, 64, 64) * torch.tensor([0.0, float(sigmas[249])]).view(2, 1, 1, 1)
    low = renoised(x, step, torch.tensor([10, 10]), torch.randn_like(x), sigmas)
    assert low.timesteps.tolist() == [10, 249]
    torch.testing.assert_close(low.x[1], x[1] / (1 + sigmas[249] ** 2) ** 0.5)
    high = renoised(x, step, torch.tensor([750, 750]), torch.randn_like(x), sigmas)
    expected = sigmas[750] / (1 + sigmas[750] ** 2) ** 0.5
    assert high.x.std(dim=(1, 2, 3)).numpy() == pytest.approx([float(expected)] * 2, rel=0.03)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("resolutions", [None, 1])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (12, 20)])
def test_the_discriminator_gives_each_place_a_logit(
    size: tuple[int, int], resolutions: int | None, conditional: bool
) -> None:
    discriminator = Discriminator(UNet(UNET), conditional, resolutions)
    parts = {name.split(".")[1] for name, _ in discriminator.unet.named_parameters(prefix="unet")}
    assert "up_blocks" not in parts
    assert ("mid_block" in parts) == (resolutions is None)
    told, timesteps = conditions(2), torch.tensor([10, 999])
    end, begin, other = (Noisy(torch.randn(2, 4, *size), timesteps) for _ in range(3))
    logits = discriminator(end, begin, told.context, told.pooled, told.sizes)
    height, width = size
    sizes = [(2, 1, height >> level, width >> level) for level in range(resolutions or len(UNET.block_out_channels))]
    assert [tuple(places.shape) for places in logits] == sizes
    elsewhere = discriminator(end, other, told.context, told.pooled, told.sizes)
    for here, there in zip(logits, elsewhere, strict=True):
        assert torch.equal(here, there) != conditional  # the relaxed one does not know where the step began


def test_each_sides_loss_reaches_its_own_weights() -> None:
    discriminator, step = Discriminator(roughened(UNet(UNET)), True), a_random_step()
    clean = torch.randn(3, 4, 8, 8, requires_grad=True)
    losses = adversarial(discriminator, clean, step, train_sigmas(), (10, 500))
    losses["adversarial"].backward()
    assert clean.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    before, clean.grad = clean.grad, None
    (losses["discriminator"] + losses["unsteady"]).backward()
    assert clean.grad is None
    assert before.shape == (3, 4, 8, 8)
    assert all(head.layers[0].weight.grad.abs().sum() > 0 for head in discriminator.heads)
    assert discriminator.unet.conv_in.weight.grad.abs().sum() > 0
    alone = adversarial(discriminator, clean.detach(), step, train_sigmas(), (10,))
    assert set(alone) == {"discriminator", "unsteady"}  # its turn alone


def test_a_discriminator_is_best_off_telling_them_apart() -> None:
    sure, unsure = ([torch.full((4, 1, size, size), logit) for size in (4, 2)] for logit in (9.0, 0.0))
    wrong = [-places for places in sure]
    assert (
        discriminator_loss(sure, wrong) < 0.001 < discriminator_loss(unsure, unsure) < discriminator_loss(wrong, sure)
    )
    assert student_loss(sure) < 0.001 < student_loss(unsure) < student_loss(wrong)
    assert unsteadiness(sure, sure) == 0
    assert unsteadiness(sure, unsure) == 81


def test_a_discriminator_learns_to_tell_a_student_that_stays_as_it_is() -> None:
    torch.manual_seed(0)
    discriminator, step = Discriminator(roughened(UNet(UNET)), False), a_random_step()
    clean, optimizer = (
        torch.full((3, 4, 8, 8), 5.0, requires_grad=True),
        torch.optim.Adam(discriminator.parameters(), 1e-3),
    )
    losses = []
    for _ in range(60):
        loss = adversarial(discriminator, clean, step, train_sigmas(), (10, 500))["discriminator"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 1  # 1.386 says nothing


def test_a_lora_is_read_back_as_it_was_trained(ground: Ground, tmp_path: Path) -> None:
    unet = load_unet(ground.unet, CARD, "cpu", torch.float32)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), *vars(conditions(2)).values()
    plain = unet(*inputs)
    lora = LoRA(unet, 2)
    lora.attach(unet)
    torch.testing.assert_close(unet(*inputs), plain)  # nothing is changed at first
    roughened(lora)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(parameter.half())
    save_network(lora, tmp_path / "lora.safetensors")
    merged = load_unet(ground.unet, CARD, "cpu", torch.float32, [tmp_path / "lora.safetensors"])
    changed = unet(*inputs)
    torch.testing.assert_close(merged(*inputs), changed, atol=1e-4, rtol=1e-4)
    assert (changed - plain).abs().max() > 0.01
    again = LoRA(UNet(UNET), 2)
    again.load(tmp_path / "lora.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lora.parameters(), strict=True))


def test_a_run_that_stopped_goes_on_to_the_same_student(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distil(SQUARED, ground, tmp_path / "students", tmp_path / "whole")
    monkeypatch.setattr(distillation, "SAVE_EVERY", 1)

    def stops(*arguments: object) -> Step:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return a_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(distillation, "a_step", stops)
    with pytest.raises(KeyboardInterrupt):
        distil(SQUARED, ground, tmp_path / "again", tmp_path / "parts")
    monkeypatch.setattr(distillation, "a_step", a_step)
    parts = distil(SQUARED, ground, tmp_path / "again", tmp_path / "parts")
    first, second = load_file(whole), load_file(parts)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_discriminator_learns_alone_at_first_and_in_its_turns(ground: Ground, tmp_path: Path) -> None:
    adversary = Adversary(at=(10,), resolutions=1, peak=1e-3, ahead=50, turns=2)
    plan = replace(
        SQUARED, name="1", teacher_steps=1, steps=1, objective="data", updates=50, adversary=adversary, adam=Adam(0.5)
    )
    changes = []
    for updates in (50, 51, 52):
        distil(replace(plan, updates=updates), ground, tmp_path / str(updates), tmp_path / "work")
        (checkpoint,) = (tmp_path / "work").glob("1-*/checkpoint.pt")
        state = torch.load(checkpoint)["networks"]
        changes.append(torch.cat([t.flatten() for name, t in state.items() if name.endswith("lora_up.weight")]))
    (log,) = (json.loads(line) for line in checkpoint.with_name("log.jsonl").read_text().splitlines())
    assert log["discriminator"] < 1  # 1.386 says nothing
    assert "adversarial" not in log
    assert not changes[0].any()
    assert changes[1].any()
    assert torch.equal(changes[1], changes[2])


def test_a_student_may_end_part_of_the_way_from_where_it_began(ground: Ground, tmp_path: Path) -> None:
    ends = {}
    for share in (1.0, 0.5):
        students, work = tmp_path / f"students {share}", tmp_path / f"work {share}"
        begun_with = load_file(distil(SQUARED, ground, students, work))
        plan = replace(SQUARED, name="on", start="4", peak=1e-2, share=share)
        ends[share] = load_file(distil(plan, ground, students, work))
    whole, half = ends[1.0], ends[0.5]
    assert any(not torch.equal(tensor, begun_with[name]) for name, tensor in whole.items())
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (begun_with[name] + whole[name]) / 2, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_step_is_that_of_a_picture_and_data_its_example(ground: Ground, steps: int) -> None:
    plan = replace(SQUARED, objective="data", teacher_steps=steps, steps=steps)
    sayer, schedule = Sayer(ground.tokenizers, ground.encoders, "cpu"), trailing_schedule(steps)
    student = load_unet(ground.unet, CARD, "cpu", torch.float32)
    step = a_last_step(student, ground, sayer, plan, schedule, 3)
    seeded("distil", plan.name, 3)
    noise, first = schedule.sigmas[0] * torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        clean = denoised(student, step.x, step.sigma, step.timesteps, step.told, "v")
    ended = euler_step(step.x, clean, step.sigma, step.following)
    torch.testing.assert_close(ended, walked(student, noise, first, steps, schedule, step.told, "v", None))
    data = torch.from_numpy(ground.latents.latents).float()
    assert all(any(torch.equal(x, scene) for scene in data) for x in step.reached)
    assert step.following_timesteps.tolist() == [0, 0]


@pytest.mark.parametrize("objective", ["conditional", "relaxed", "data"])
def test_a_student_of_a_student_learns_against_a_discriminator(ground: Ground, tmp_path: Path, objective: str) -> None:
    distil(SQUARED, ground, tmp_path, tmp_path / "work")
    plan = Distillation("2", "4", 4, 2, objective, "4", updates=2, peak=1e-2, rank=2)
    before, after = (
        load_file(tmp_path / "4step_lora.safetensors"),
        load_file(distil(plan, ground, tmp_path, tmp_path / "work")),
    )
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_small_changes_are_merged_and_the_whole_unet_learns_on(ground: Ground, tmp_path: Path) -> None:
    """A LoRA upon a LoRA, then all weights, then a LoRA upon those: the file of each is what the next begins with."""
    plans = (
        SQUARED,
        replace(SQUARED, name="upon", teacher="4", teacher_steps=4, steps=2, upon="4"),
        replace(SQUARED, name="2", teacher="4", teacher_steps=4, steps=2, upon="4", start="upon", rank=None),
        replace(SQUARED, name="1", teacher="2", teacher_steps=2, steps=1, upon="2", objective="relaxed"),
    )
    for plan in plans:
        distil(plan, ground, tmp_path, tmp_path / "work")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [
        "1step_lora.safetensors",
        "2step_unet.safetensors",
        "4step_lora.safetensors",
        "upon_lora.safetensors",
    ]
    base, four, both, whole, one = (
        network(ground, tmp_path, *names).state_dict() for names in ((), ("4",), ("4", "upon"), ("4", "2"), ("2", "1"))
    )
    merged, learned = (sum((a[n] - b[n]).abs().sum() for n in a) for a, b in ((both, four), (whole, both)))
    assert merged > 0
    assert learned > 0
    assert any(not torch.equal(whole[name], both[name]) for name in whole if "norm" in name)  # a LoRA has no norms
    assert any(not torch.equal(one[name], whole[name]) for name in whole)
    assert any(not torch.equal(four[name], base[name]) for name in base)


def test_a_student_may_predict_the_clean_latent_where_its_teacher_predicts_noise(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And blocks computed twice, to spare memory, learn the same."""
    monkeypatch.setattr(distillation, "SHEET_EVERY", 2)
    noise = replace(ground, card=replace(CARD, prediction="epsilon"))
    plan = replace(SQUARED, name="1", teacher_steps=2, steps=1, prediction="x0", rank=None)
    once = load_file(distil(plan, noise, tmp_path / "once", tmp_path / "a"))
    twice = load_file(distil(plan, replace(noise, checkpointing=True), tmp_path / "twice", tmp_path / "b"))
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, atol=2e-3, rtol=2e-3)
    (sheet,) = (tmp_path / "a").glob("1-*/sheet-000004.jpg")
    with Image.open(sheet) as drawn:
        assert drawn.size == (8 * 32, 32)


def test_nothing_is_gone_on_from_that_learned_from_others(ground: Ground, tmp_path: Path) -> None:
    """In one folder of work, students of another undistilled model, other data or another plan begin anew."""
    first = load_file(distil(SQUARED, ground, tmp_path / "first", tmp_path / "work"))
    unet = UNet(UNET)
    roughened(unet)
    save_network(unet, tmp_path / "other.safetensors")
    data = replace(ground.latents, latents=ground.latents.latents + np.float16(1))
    others = (
        (SQUARED, replace(ground, unet=tmp_path / "other.safetensors")),
        (SQUARED, replace(ground, latents=data)),
        (replace(SQUARED, peak=2 * SQUARED.peak), ground),
    )
    for i, (plan, other) in enumerate(others):
        found = load_file(distil(plan, other, tmp_path / str(i), tmp_path / "work"))
        assert any(not torch.equal(found[name], tensor) for name, tensor in first.items())
    again = load_file(distil(SQUARED, ground, tmp_path / "again", tmp_path / "work"))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_batches_that_are_gathered_learn_what_one_large_batch_does(tmp_path: Path) -> None:
    """And nothing is averaged that is not asked for."""
    rows = torch.randn(4, 8)
    ends = []
    for gathered in (1, 2):
        torch.manual_seed(0)
        networks = nn.ModuleDict({"one": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
        stage = Stage(tmp_path / str(gathered), networks, 1e-2, 3, 0.9, gathered=gathered, averaged=["one"])
        numbers = []
        while stage.step < 3:
            for part in rows.chunk(gathered):
                numbers.append(stage.number)
                out = networks["other"](networks["one"](part))
                stage.update({"squared": out.square().mean()})
        assert numbers == list(range(3 * gathered))
        assert list(stage.average) == ["one"]
        ends.append(torch.cat([p.flatten() for p in networks.parameters()]))
    torch.testing.assert_close(*ends)


def test_small_changes_without_edges_draw_in_diffusers_as_here(tmp_path: Path) -> None:
    unet, theirs = roughened(UNet(UNET)), oracle_unet(UNET)
    theirs.load_state_dict(unet.state_dict())
    lora = LoRA(unet, 2, edges=False)
    assert not [name for name in lora if name.startswith(tuple(f"lora_unet_{edge}" for edge in EDGES))]
    roughened(lora)
    save_network(lora, tmp_path / "lora.safetensors")
    lora.load(tmp_path / "lora.safetensors")
    x, timesteps, told = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), conditions(2)
    plain = unet(x, timesteps, *vars(told).values())
    lora.attach(unet)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        tmp_path, weight_name="lora.safetensors", unet_config=theirs.config
    )
    theirs.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    assert sum("lora_A" in dict(module.named_children()) for module in theirs.modules()) == len(lora)
    added = {"text_embeds": told.pooled, "time_ids": told.sizes}
    wanted = theirs(x, timesteps, told.context, added_cond_kwargs=added).sample
    found = unet(x, timesteps, *vars(told).values())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert (found - plain).abs().max() > 0.01


def test_guided_away_from_nothing(ground: Ground) -> None:
    """SDXL is told zeros where there is no prompt: away from these, a step is as classifier-free guidance has it."""
    sayer, schedule = Sayer(ground.tokenizers, ground.encoders, "cpu"), trailing_schedule(8)
    unet = load_unet(ground.unet, CARD, "cpu", torch.float32)
    plan = replace(SQUARED, teacher=None, teacher_steps=8, steps=8, guidance=3.0)
    card = replace(CARD, force_zeros_for_empty_prompt=True)
    step = a_step(unet, replace(ground, card=card), sayer, plan, schedule, 0)
    nothing = replace(step.told, context=0 * step.told.context, pooled=0 * step.told.pooled)
    with torch.no_grad():
        wanted, unwanted = (
            denoised(unet, step.x, step.sigma, step.timesteps, told, "v") for told in (step.told, nothing)
        )
    guided = euler_step(step.x, unwanted + 3 * (wanted - unwanted), step.sigma, step.following)
    torch.testing.assert_close(step.reached, guided, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("steps", "teacher_steps"), [(1, 2), (1, 4), (2, 4), (2, 8)])
def test_students_of_few_steps_learn_at_four_timesteps(ground: Ground, steps: int, teacher_steps: int) -> None:
    """From each they go as far as a step of theirs is long, or to the clean latent, and so does their teacher."""
    sayer, unet = Sayer(ground.tokenizers, ground.encoders, "cpu"), load_unet(ground.unet, CARD, "cpu", torch.float32)
    plan = replace(SQUARED, teacher="4", teacher_steps=teacher_steps, steps=steps, begins=4)
    step = a_step(unet, replace(ground, batch=16), sayer, plan, trailing_schedule(plan.places), 0)
    begins, length = step.timesteps + 1, 1000 // steps
    assert set(begins.tolist()) == {250, 500, 750, 1000}
    ends = (begins - length).clamp_min(0)
    assert torch.equal(step.following_timesteps, (ends - 1).clamp_min(0))
    sigmas = torch.cat([torch.zeros(1), train_sigmas()])
    torch.testing.assert_close(step.following, sigmas[ends])
    for row in range(16):
        x, at, told = step.x[row, None], int(begins[row]), step.told.picked(slice(row, row + 1))
        while at > ends[row]:
            to = max(0, at - 1000 // teacher_steps)
            sigma, next_sigma = sigmas[at, None], sigmas[to, None]
            with torch.no_grad():
                clean = denoised(unet, x, sigma, torch.tensor([at - 1]), told, CARD.prediction)
            x, at = euler_step(x, clean, sigma, next_sigma), to
        torch.testing.assert_close(step.reached[row, None], x, atol=0.05, rtol=0.05)


def test_a_plan_whose_steps_do_not_meet_is_refused() -> None:
    for wrong in ({"teacher_steps": 2, "steps": 1, "begins": 3}, {"teacher_steps": 8, "steps": 3}):
        with pytest.raises(ValueError, match=r"^4: \d steps of \d, .* no timesteps in common$"):
            replace(SQUARED, **wrong)


def test_a_run_whose_time_is_up_keeps_what_it_did(ground: Ground, tmp_path: Path) -> None:
    late = replace(ground, run=Run(until=0))
    for step in range(1, 4):
        with pytest.raises(TimeIsUpError, match=f"at step {step} of 4"):
            distil(SQUARED, late, tmp_path / "late", tmp_path / "work")
    late = load_file(distil(SQUARED, late, tmp_path / "late", tmp_path / "work"))
    whole = load_file(distil(SQUARED, ground, tmp_path / "whole", tmp_path / "other"))
    assert all(torch.equal(tensor, late[name]) for name, tensor in whole.items())


def test_guidance_is_in_the_first_teachers_steps_alone(ground: Ground) -> None:
    sayer = Sayer(ground.tokenizers, ground.encoders, "cpu")
    unet, schedule = load_unet(ground.unet, CARD, "cpu", torch.float32), trailing_schedule(8)
    guided, plain = (
        a_step(unet, ground, sayer, replace(SQUARED, teacher=teacher), schedule, 0) for teacher in (None, "8")
    )
    assert torch.equal(guided.told.context, plain.told.context)
    assert not torch.equal(guided.reached, plain.reached)


@pytest.mark.parametrize("plans", [SMALL, SDXL, QUICK], ids=["small", "sdxl", "quick"])
def test_a_plan_names_students_that_are_there_by_then(plans: tuple[Distillation, ...]) -> None:
    done: set[str] = set()
    for plan in plans:
        assert {plan.teacher, plan.start, plan.upon} - {None} <= done
        assert plan.teacher_steps % plan.steps == 0
        assert set(trailing_schedule(plan.steps).timesteps.tolist()) <= set(
            trailing_schedule(plan.teacher_steps).timesteps.tolist()
        )
        done.add(plan.name)
    assert {"8", "4", "2", "1"} <= done or {"guided", "1"} <= done


def test_distances_are_those_of_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20_000, 4))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, 2 * a + 3) == pytest.approx(4 * (3**2 + 1), rel=0.02)


def test_retrieval_is_one_for_the_right_captions_and_chance_for_any() -> None:
    rows = 300
    captions = [str(i) for i in range(rows)]
    assert found(torch.eye(rows), captions).mean() == 1
    assert found(torch.randn(rows, rows, generator=torch.Generator().manual_seed(0)), captions).mean() < 0.05
    alike = torch.eye(rows)
    alike[0, 1] = alike[1, 0] = 1  # two of the same caption are not told apart, and need not be
    assert found(alike, ["0", "0", *captions[2:]], among=rows).mean() == 1
    assert found(alike, captions, among=rows).sum() == rows - 2
    reference = np.random.default_rng(1).standard_normal((rows, 2, 4))
    features = reference + np.array([[3.0], [0.0]])  # whole pictures differ, close up they do not
    result = score("some", features, np.arange(rows) % 2, reference)
    assert result.retrieval == pytest.approx((0.5, 1.96 * (0.25 / rows) ** 0.5))
    assert (result.distance[0], result.close_up[0]) == (pytest.approx(4 * 3**2), pytest.approx(0, abs=1e-6))
    assert min(result.distance[1], result.close_up[1]) > 0


def test_the_reader_puts_pictures_and_captions_in_one_space() -> None:
    reader = Reader().eval()
    pictures, captions = reader.pictures(torch.randn(3, 3, 64, 64)), reader.captions(["a fox", "a rocket"])
    assert reader.likeness(pictures, captions).shape == (3, 2)


@needs_weights
def test_the_students_inside_the_package_draw_in_their_steps() -> None:
    of_model = card("fulgurite/spark-lightning")
    base = load_networks(card("fulgurite/spark"), 20, "cpu", torch.float32).unet.state_dict()
    for steps in of_model.schedules:
        pipeline = Pipeline.load(of_model.id, steps=steps)
        picture = pipeline("a red rocket", width=256, height=256, num_steps=steps, seed=7)
        assert (picture.steps, picture.image.size) == (steps, (256, 256))
        changed = load_networks(of_model, steps, "cpu", torch.float32).unet.state_dict()
        assert any(not torch.equal(changed[n], tensor) for n, tensor in base.items())
