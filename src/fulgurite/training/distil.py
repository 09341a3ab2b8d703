"""Stage five: from a teacher of many steps to students of few.

Progressive adversarial diffusion distillation, SDXL-Lightning's method (Lin et al., arXiv 2402.13929): each student
learns to reach in one step where its teacher comes in several, then is the next one's teacher. The first learns from
the undistilled model under guidance, which it so takes into its weights, by mean squared error. The others learn from a
discriminator, first one that sees where the step began, then one that does not. Students are LoRA files on the
undistilled UNet; teachers are read with the loader that serves them.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fulgurite.cards import Card
from fulgurite.models import Tokenizer, UNet
from fulgurite.sampling import Schedule, euler_step, per_row, scale_input, trailing_schedule, train_sigmas
from fulgurite.training.discriminator import Discriminator, Noisy, judge_loss, student_loss
from fulgurite.training.latents import LatentSet
from fulgurite.training.loop import Stage
from fulgurite.training.low_rank import LoRA, save_lora
from fulgurite.training.scenes import caption, no_caption
from fulgurite.training.steps import Conditions, Guide, Sayer, denoised, on, seeded, walked
from fulgurite.weights.load import load_unet

JUDGED_AT = (10, 250, 500, 750)  # timesteps to whose noise latents are brought before they are judged, at random
JUDGES_SHARE = 0.1  # of the student's learning rate: the judge's whole UNet learns, the student's changes are small
SAVE_EVERY = 100  # updates


@dataclass(frozen=True)
class Distillation:
    """One student: whom it learns from, and how."""

    name: str  # of its file
    teacher: str | None  # another student; None: the undistilled model, guided
    teacher_steps: int
    steps: int  # the student's: a divisor of the teacher's
    objective: str  # "squared", "conditional" or "relaxed"
    start: str | None  # the student whose weights it begins with
    updates: int
    peak: float = 1e-3


@dataclass(frozen=True)
class Step:
    """One step of a student for every row: from ``x`` at ``sigma`` ``[B]`` to ``following`` ``[B]``."""

    x: Tensor
    sigma: Tensor
    timesteps: Tensor
    following: Tensor
    following_timesteps: Tensor  # 0 where the latent is clean
    reached: Tensor  # by the teacher, in several steps
    told: Conditions


def begun(clean: Tensor, noise: Tensor, first: Tensor, schedule: Schedule) -> Tensor:
    """Latents noised to where each row's step ``first`` ``[B]`` begins: at the very first, pure noise.

    That is what sampling starts from, where SDXL's schedule leaks some of the picture (arXiv 2305.08891).
    """
    x = clean + per_row(schedule.sigmas[first], clean) * noise
    return torch.where(per_row(first == 0, x), schedule.sigmas[0] * noise, x)


def landing(step: Step) -> Tensor:
    """The clean latent from which one Euler step of the student lands where its teacher came."""
    slope = (step.reached - step.x) / per_row(step.following - step.sigma, step.x)
    return step.x - per_row(step.sigma, step.x) * slope


def squared(clean: Tensor, step: Step) -> Tensor:
    """The squared error of a student's clean latent, weighted as that of its v is (arXiv 2202.00512)."""
    errors = (clean - landing(step)).square() * per_row(1 + step.sigma**-2, clean)
    return errors.mean()


def renoised(x: Tensor, step: Step, at: Tensor, noise: Tensor, sigmas: Tensor) -> Noisy:
    """Where a step ended, with noise added up to timesteps ``at`` ``[B]``; as it is where it has as much already."""
    at = torch.maximum(at, step.following_timesteps)
    sigma = torch.maximum(sigmas[at], step.following)
    more = (sigma**2 - step.following**2).clamp_min(0).sqrt()
    return Noisy(scale_input(x + per_row(more, x) * noise, sigma), at)


def adversarial(judge: Discriminator, clean: Tensor, step: Step, sigmas: Tensor) -> dict[str, Tensor]:
    """Both sides' losses on a student's clean latents; each reaches its own side's weights alone."""
    mine = euler_step(step.x, clean, step.sigma, step.following)
    at = torch.tensor(JUDGED_AT, device=mine.device)[torch.randint(len(JUDGED_AT), (len(mine),), device=mine.device)]
    noise = torch.randn_like(mine)
    begin = Noisy(scale_input(step.x, step.sigma), step.timesteps)
    told = step.told

    def judged(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            end = renoised(x, step, at, noise, sigmas)
            return judge(end, begin, told.context, told.pooled, told.sizes).float()

    judge.requires_grad_(False)
    fooled = student_loss(judged(mine))
    judge.requires_grad_(True)
    return {"adversarial": fooled, "judge": judge_loss(judged(step.reached), judged(mine.detach()))}


@dataclass(frozen=True)
class Ground:
    """What all students share: the undistilled model, data, and how large their changes may be."""

    card: Card
    unet: Path  # the undistilled UNet's file
    tokenizer: Tokenizer
    encoders: nn.ModuleDict
    latents: LatentSet
    rank: int
    convolutions: bool  # whether they are changed too
    batch: int
    device: str = "cpu"


def a_step(teacher: UNet, ground: Ground, sayer: Sayer, plan: Distillation, schedule: Schedule, number: int) -> Step:
    """Scenes at random, each noised to where one of the student's steps begins; its teacher walks to the end."""
    rng = seeded("distil", plan.name, number)
    clean, scenes = ground.latents.batch(ground.batch, rng)
    told = sayer([caption(scene, rng) for scene in scenes], ground.latents.size)
    guide = None
    if plan.teacher is None:
        away = sayer([no_caption(rng) for _ in scenes], ground.latents.size)
        guide = Guide(away, ground.card.guidance_strength)
    stride = plan.teacher_steps // plan.steps
    first = stride * torch.randint(plan.steps, (ground.batch,)).to(ground.device)
    x = begun(clean.to(ground.device), torch.randn(clean.shape).to(ground.device), first, schedule)
    reached = walked(teacher, x, first, stride, schedule, told, ground.card.prediction, guide)
    end = first + stride
    after = torch.cat([schedule.timesteps, schedule.timesteps.new_zeros(1)])[end]
    return Step(x, schedule.sigmas[first], schedule.timesteps[first], schedule.sigmas[end], after, reached, told)


def distil(plan: Distillation, ground: Ground, students: Path, folder: Path) -> Path:
    """Trains one student in ``folder``, going on from its checkpoint; writes the average to ``students`` as a file."""
    path = students / f"{plan.name}.safetensors"
    if path.exists():
        return path
    torch.manual_seed(0)
    teacher_file = students / f"{plan.teacher}.safetensors" if plan.teacher else None
    teacher, unet = (
        load_unet(ground.unet, ground.card, ground.device, torch.float32, file).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for file in (teacher_file, None)
    )
    networks = nn.ModuleDict({"lora": LoRA(unet, ground.rank, ground.convolutions).to(ground.device)})
    lora = networks["lora"]
    assert isinstance(lora, LoRA)
    if plan.start:
        lora.load(students / f"{plan.start}.safetensors")
    if plan.objective != "squared":
        networks["judge"] = Discriminator(deepcopy(unet), plan.objective == "conditional").to(ground.device)
    lora.attach(unet)
    shares = {"lora": 1.0, "judge": JUDGES_SHARE} if "judge" in networks else None
    stage = Stage(
        folder / plan.name, networks, plan.peak, plan.updates, decay=0.99, save_every=SAVE_EVERY, shares=shares
    )

    sayer = Sayer(ground.tokenizer, ground.encoders, ground.device)
    schedule = on(trailing_schedule(plan.teacher_steps), ground.device)
    sigmas = train_sigmas().to(ground.device)
    while stage.step < plan.updates:
        step = a_step(teacher, ground, sayer, plan, schedule, stage.step)
        clean = denoised(unet, step.x, step.sigma, step.timesteps, step.told, ground.card.prediction)
        if "judge" in networks:
            judge = networks["judge"]
            assert isinstance(judge, Discriminator)
            stage.update(adversarial(judge, clean, step, sigmas))
        else:
            stage.update({"squared": squared(clean, step)})
    average = stage.average
    assert isinstance(average, nn.ModuleDict)
    save_lora(average["lora"], path)
    return path
