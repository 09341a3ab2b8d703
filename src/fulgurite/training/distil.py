"""Stage six: from a teacher of many steps to students of few.

Progressive adversarial diffusion distillation, SDXL-Lightning's method (Lin et al., arXiv 2402.13929): each student
learns to reach in one step where its teacher comes in several, then is the next one's teacher. The first learns from
the undistilled model under guidance, which it so takes into its weights, by mean squared error. The others learn from a
discriminator, first one that sees where the step began, then one that does not; the small model's of one step from one
that compares it with data. Students are LoRA files on the undistilled UNet; teachers are read with the loader that
serves them.
"""

import gc
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fulgurite.cards import Card
from fulgurite.errors import WeightsError
from fulgurite.kernels.cpu import accelerate_training
from fulgurite.models import VAE, Tokenizer, UNet
from fulgurite.models.unet import ResnetBlock, TransformerBlock
from fulgurite.pipeline import to_image
from fulgurite.sampling import Schedule, euler_step, per_row, scale_input, trailing_schedule, train_sigmas
from fulgurite.training.discriminator import Discriminator, Noisy, discriminator_loss, student_loss, unsteadiness
from fulgurite.training.drawing import Conditions, Guide, Sayer, decoded, denoised, drawn, seeded, walked
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.latents import LatentSet, said
from fulgurite.training.loop import ADAM, HERE, Adam, Part, Run, Stage, save_network
from fulgurite.training.low_rank import LoRA
from fulgurite.training.precision import autocast
from fulgurite.training.scenes import no_caption
from fulgurite.weights.load import load_unet

NEAR = 0.1  # noise on what is real, within which the discriminator is to say the same
STEADY = 10.0  # weight of that it does
SAVE_EVERY = 100  # updates
SHEET_EVERY = 200  # updates
SHEET = 8  # pictures
FEW = 64  # latents that stand for all


@dataclass(frozen=True)
class Adversary:
    """The discriminator that a student learns against: what it looks at, how it learns."""

    at: tuple[int, ...] = (0,)  # timesteps to whose noise latents are brought before that, one at random
    resolutions: int | None = None  # that it looks at, from the finest; None: all of the UNet's
    peak: float | None = None  # learning rate of its UNet, where that is not the student's
    heads: float | None = None  # of its heads, where that is not its UNet's
    ahead: int = 0  # updates in which it learns alone, before the student's first
    turns: int = 1  # updates of its own for each of the student's


@dataclass(frozen=True)
class Distillation:
    """One student: whom it learns from, and how."""

    name: str  # of its file
    teacher: str | None  # another student; None: the undistilled model, guided
    teacher_steps: int
    steps: int  # the student's: a divisor of the teacher's
    objective: str  # "squared", "conditional" or "relaxed"; "data": of the last step alone, and data is what is real
    start: str | None  # the student whose weights it begins with
    updates: int
    peak: float
    rank: int | None  # of its changes, which are a LoRA file; None: the whole UNet learns, and is a file
    upon: str | None = None  # the student whose changes lie beneath its own, and its teacher's
    guidance: float | None = None  # the undistilled teacher's strength, where that is not its card's
    prediction: str | None = None  # what the student predicts, where that is not what the undistilled model does
    begins: int | None = None  # so many timesteps, evenly apart, at which it learns to begin; None: those of its steps
    adversary: Adversary = Adversary()
    adam: Adam = ADAM
    edges: bool = True  # small changes are those of the first and last convolutions and of the embeddings, too
    share: float = 1.0  # of the way from its start's weights to what it learned, where it ends (arXiv 2109.01903)

    def __post_init__(self) -> None:
        """Raises ValueError where teacher and student would not arrive at the same timesteps."""
        places = self.places
        if self.teacher_steps % self.steps or any(places % n for n in (self.teacher_steps, self.begins or self.steps)):
            told = f"{self.steps} steps of {self.teacher_steps}, begun at {self.begins} timesteps"
            raise ValueError(f"{self.name}: {told}: they have no timesteps in common")

    @property
    def places(self) -> int:
        """How many timesteps there are at which a step of the student or of its teacher begins."""
        return max(self.teacher_steps, self.begins or 0)


@dataclass(frozen=True)
class Step:
    """One step of a student for every row: from ``x`` at ``sigma`` ``[B]`` to ``following`` ``[B]``."""

    x: Tensor
    sigma: Tensor
    timesteps: Tensor
    following: Tensor
    following_timesteps: Tensor  # 0 where the latent is clean
    reached: Tensor  # by the teacher, in several steps; or data
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


def adversarial(
    discriminator: Discriminator, clean: Tensor, step: Step, sigmas: Tensor, timesteps: Sequence[int]
) -> dict[str, Tensor]:
    """Both sides' losses on a student's clean latents, looked at with the noise of one of the timesteps.

    Each reaches its own side's weights alone. Where no gradient is wanted of the latents, the discriminator's alone.
    """
    shown = clean.detach().requires_grad_()
    mine = euler_step(step.x, shown, step.sigma, step.following)
    choice = torch.randint(len(timesteps), (len(mine),), device=mine.device)
    at = torch.tensor(timesteps, device=mine.device)[choice]
    noise = torch.randn_like(mine)
    begin = Noisy(scale_input(step.x, step.sigma), step.timesteps)
    told = step.told

    def logits(x: Tensor, off: Tensor | float = 0.0) -> list[Tensor]:
        with autocast(x.device.type):
            end = renoised(x, step, at, noise, sigmas)
            end = Noisy(end.x + off, end.timesteps)
            return discriminator(end, begin, told.context, told.pooled, told.sizes)

    losses = {}
    if clean.requires_grad:
        fooled = student_loss(logits(mine))
        (slope,) = torch.autograd.grad(fooled, shown)
        losses["adversarial"] = fooled.detach() + ((clean - shown.detach()) * slope).sum()
    real = logits(step.reached)
    losses["discriminator"] = discriminator_loss(real, logits(mine.detach()))
    losses["unsteady"] = STEADY * unsteadiness(real, logits(step.reached, NEAR * torch.randn_like(mine)))
    return losses


@dataclass(frozen=True)
class Ground:
    """What all students share: the undistilled model, data, and how large their changes may be."""

    card: Card
    unet: Path  # the undistilled UNet's file
    tokenizers: tuple[Tokenizer, Tokenizer]
    encoders: Sequence[nn.Module]  # of text
    vae: VAE  # for sheets of samples
    latents: LatentSet
    batch: int
    run: Run = HERE
    dtype: torch.dtype = torch.float32  # of all that does not learn
    checkpointing: bool = False  # activations computed twice rather than kept: SDXL's do not fit otherwise
    gathered: int = 1  # batches to an update


def student_file(students: Path, name: str, whole: bool, prediction: str | None = None) -> Path:
    """As SDXL-Lightning names its files: ``4step_lora.safetensors``, ``1step_unet_x0.safetensors``.

    The loader goes by the last part, so that a student that predicts the clean latent is served as it was trained.
    """
    kind, x0 = "unet" if whole else "lora", "_x0" * (prediction == "x0")
    return students / f"{name}{'step' * name.isdigit()}_{kind}{x0}.safetensors"


def existing(students: Path, name: str, whole: bool) -> Path | None:
    """The student's file of a kind, whatever it predicts, if there is one."""
    files = (student_file(students, name, whole, prediction) for prediction in (None, "x0"))
    return next((file for file in files if file.exists()), None)


def finished_student(students: Path, name: str) -> tuple[Path, bool]:
    """A student's file, and whether that is a whole UNet."""
    for whole in (True, False):
        if path := existing(students, name, whole):
            return path, whole
    raise WeightsError(f"There is no student {name} in {students}.")


def network(ground: Ground, students: Path, *names: str | None, dtype: torch.dtype | None = None) -> UNet:
    """The undistilled UNet with these students' changes, one upon the other; a whole UNet replaces what is beneath."""
    path, loras = ground.unet, list[Path]()
    for name in dict.fromkeys(name for name in names if name):
        file, whole = finished_student(students, name)
        if whole:
            path, loras = file, []
        else:
            loras.append(file)
    unet = load_unet(path, ground.card, ground.run.device, dtype or ground.dtype, loras)
    if ground.run.kind == "cpu":
        accelerate_training(unet)
    return unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def scenes_told(ground: Ground, sayer: Sayer, rng: random.Random) -> tuple[Tensor, Conditions]:
    """Scenes at random: their latents ``[B, C, h, w]``, and what is told of them."""
    clean, scenes = ground.latents.batch(ground.batch, rng)
    return clean.to(ground.run.device), sayer([said(scene, rng) for scene in scenes], ground.latents.size)


def a_step(teacher: UNet, ground: Ground, sayer: Sayer, plan: Distillation, schedule: Schedule, number: int) -> Step:
    """Scenes at random, each noised to where one of the student's steps begins; the teacher walks to the end.

    ``schedule`` is of the plan's ``places``. From each beginning a step is as long as the student's, or ends at the
    clean latent.
    """
    rng, device = seeded("distil", plan.name, number), ground.run.device
    clean, told = scenes_told(ground, sayer, rng)
    places, begins = plan.places, plan.begins or plan.steps
    first = places // begins * torch.randint(begins, (ground.batch,)).to(device)
    last = (first + places // plan.steps).clamp_max(places)
    x = begun(clean, torch.randn(clean.shape).to(device), first, schedule)
    guide = None
    if plan.teacher is None:
        if ground.card.force_zeros_for_empty_prompt:
            away = told.nothing()
        else:
            away = sayer([no_caption(rng) for _ in clean], ground.latents.size)
        guide = Guide(away, plan.guidance or ground.card.guidance_strength)
    count, stride = plan.teacher_steps // plan.steps, places // plan.teacher_steps
    reached = walked(teacher, x, first, count, schedule, told, ground.card.prediction, guide, stride=stride)
    timesteps = torch.cat([schedule.timesteps, schedule.timesteps.new_zeros(1)])
    return Step(x, schedule.sigmas[first], timesteps[first], schedule.sigmas[last], timesteps[last], reached, told)


def a_last_step(
    student: UNet, ground: Ground, sayer: Sayer, plan: Distillation, schedule: Schedule, number: int
) -> Step:
    """The last step of what the student draws of captions at random, beside scenes of those captions.

    It begins where its own steps lead from pure noise, as a picture's does (backward simulation: Yin et al., arXiv
    2405.14867).
    """
    rng, device = seeded("distil", plan.name, number), ground.run.device
    clean, told = scenes_told(ground, sayer, rng)
    first = torch.zeros(ground.batch, dtype=torch.long, device=device)
    x = schedule.sigmas[0] * torch.randn(clean.shape).to(device)
    x = walked(student, x, first, plan.steps - 1, schedule, told, plan.prediction or ground.card.prediction, None)
    sigma, timesteps = schedule.sigmas[first - 2], schedule.timesteps[first - 1]
    return Step(x, sigma, timesteps, torch.zeros_like(sigma), torch.zeros_like(timesteps), clean, told)


def distil(plan: Distillation, ground: Ground, students: Path, folder: Path) -> Path:
    """Trains one student in ``folder``, going on from its checkpoint; writes the average to ``students`` as a file.

    Where ``students`` has that file already, that is the student.
    """
    path = student_file(students, plan.name, plan.rank is None, plan.prediction)
    if path.exists():
        return path
    torch.manual_seed(0)
    gc.collect()  # of the stage before: its networks hold themselves, and a GPU has no room for both
    torch.cuda.empty_cache()
    device, adversary = ground.run.device, plan.adversary
    folder = folder / f"{plan.name}-{made_of(plan, ground, students)}"
    unet, networks, discriminator = learning(plan, ground, students)
    if plan.objective == "data":
        next_step = partial(a_last_step, unet)
    else:
        next_step = partial(a_step, network(ground, students, plan.upon, plan.teacher))
    beginning = deepcopy(networks["student"]) if plan.share < 1 else None
    parts = {"student": Part(plan.peak, adversary.ahead)}
    if discriminator:
        peak = adversary.peak or plan.peak
        parts |= {"discriminator.unet": Part(peak), "discriminator.heads": Part(adversary.heads or peak)}
    stage = Stage(
        folder,
        networks,
        parts,
        plan.updates,
        decay=0.99 ** (1 / adversary.turns),
        save_every=SAVE_EVERY,
        adam=plan.adam,
        run=ground.run,
        gathered=ground.gathered,
        averaged=["student"],
    )

    sayer = Sayer(ground.tokenizers, ground.encoders, device)
    schedule = trailing_schedule(plan.places).to(device)
    sigmas, predicted = train_sigmas().to(device), plan.prediction or ground.card.prediction
    while stage.step < plan.updates:
        step = next_step(ground, sayer, plan, schedule, stage.number)
        learns = discriminator is None or (stage.step >= adversary.ahead and stage.step % adversary.turns == 0)
        with torch.set_grad_enabled(learns):
            clean = denoised(unet, step.x, step.sigma, step.timesteps, step.told, predicted)
        if discriminator:
            stage.update(adversarial(discriminator, clean, step, sigmas, adversary.at))
        else:
            stage.update({"squared": squared(clean, step)})
        if stage.due(SHEET_EVERY):
            sheet(unet, ground, sayer, plan, folder / f"sheet-{stage.step:06d}.jpg")
    average = stage.average
    assert isinstance(average, nn.ModuleDict)
    if beginning:
        with torch.no_grad():
            for learned, first in zip(average["student"].parameters(), beginning.parameters(), strict=True):
                learned.lerp_(first, 1 - plan.share)
    if stage.processes.is_main_process:
        save_network(average["student"], path)
    stage.processes.wait_for_everyone()
    return path


def made_of(plan: Distillation, ground: Ground, students: Path) -> str:
    """A fingerprint of all that a student comes from, so that no other's checkpoint is gone on from."""
    names = sorted({name for name in (plan.teacher, plan.start, plan.upon) if name})
    files = [ground.unet, *(finished_student(students, name)[0] for name in names)]
    numbers = ground.latents.latents[:FEW]
    return fingerprint(replace(plan, updates=0), ground.card.prediction, numbers, *ground.encoders, *files)


def learning(plan: Distillation, ground: Ground, students: Path) -> tuple[UNet, nn.ModuleDict, Discriminator | None]:
    """The student's UNet, all that learns, by name, and the discriminator, where the student learns against one."""
    if plan.rank is None:
        unet = network(ground, students, plan.upon, plan.start, dtype=torch.float32)
        networks = nn.ModuleDict({"student": unet.requires_grad_(True)})
    else:
        unet = network(ground, students, plan.upon)
        lora = LoRA(unet, plan.rank, plan.edges).to(ground.run.device)
        if plan.start:
            lora.load(finished_student(students, plan.start)[0])
        lora.attach(unet)
        networks = nn.ModuleDict({"student": lora})
    discriminator = None
    if plan.objective != "squared":
        eyes = network(ground, students, dtype=torch.float32).requires_grad_(True)
        discriminator = Discriminator(eyes, plan.objective == "conditional", plan.adversary.resolutions)
        networks["discriminator"] = discriminator.to(ground.run.device)
    if ground.checkpointing:
        checkpoint_blocks(nn.ModuleList([unet, networks]))
    return unet, networks, discriminator


def checkpoint_blocks(network: nn.Module) -> None:
    """From here on each block's activations are computed again on the way back (Chen et al., arXiv 1604.06174).

    Each is found once, also where two of the network's parts share it.
    """
    for module in network.modules():
        if isinstance(module, ResnetBlock | TransformerBlock):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def sheet(unet: UNet, ground: Ground, sayer: Sayer, plan: Distillation, path: Path) -> None:
    """Eight of the data's captions as the student draws them now, each from the noise of its own number."""
    rng = random.Random("sheet")
    scenes = ground.latents.batch(SHEET, rng)[1]
    card = replace(ground.card, prediction=plan.prediction or ground.card.prediction)
    told = sayer([said(scene, rng) for scene in scenes], ground.latents.size)
    latents = drawn(unet, card, ground.latents.size, told, None, range(SHEET), plan.steps)
    to_image(torch.cat(list(decoded(ground.vae, latents).cpu()), dim=2)).save(path)
