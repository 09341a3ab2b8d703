"""Stage five: the decoder taught on, with the encoder as it is: latents, and what was learned from them, stand.

What a UNet ends with is not what an encoder says: outlines are softer, plain areas uneven. So scenes' latents are
noised part of the way and walked back as serving walks, and the decoder learns to make of that what the scene's render
was: by pixels' errors, and in the end from a discriminator of patches besides (Rombach et al., arXiv 2112.10752,
section 3.1).
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from fulgurite.sampling import trailing_schedule
from fulgurite.training.discriminator import discriminator_loss, student_loss, unsteadiness
from fulgurite.training.distil import STEADY, Ground, begun, network
from fulgurite.training.drawing import Guide, Sayer, seeded, walked
from fulgurite.training.files import whole
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.latents import said, scene_at
from fulgurite.training.loop import Part, Stage
from fulgurite.training.precision import autocast
from fulgurite.training.scenes import no_caption, render
from fulgurite.training.sources import Sprites
from fulgurite.training.vae import reconstruction_losses, to_pixels

BATCH = 4
STEPS, BACK = 8, 4  # of the schedule; and how many of its last the latents are walked, at most
LATENT_NOISE = 0.05  # of unit scale, besides
ADVERSARIAL_AFTER = 0.55  # of the updates: before, the discriminator would learn what pixels' errors mend anyway
RISE = 300  # updates, over which what the discriminator asks for comes to weigh as much as pixels' errors
MATCHING = 5.0  # weight of that features match, beside that pictures are taken for renders
NEAR = 0.05  # noise, of renders, within which the discriminator is to say the same
PEAK, DISCRIMINATOR_PEAK = 5e-4, 4e-4  # learning rates


def as_drawn(ground: Ground, folder: Path, most: int) -> np.ndarray:
    """The first scenes' latents, of so many at most, as the undistilled UNet leaves them ``[N, C, h, w]``, float16.

    Made once, then read back from ``folder``.
    """
    latents = ground.latents.latents[:most]
    walks = STEPS, BACK, ground.batch, ground.card.guidance_strength
    made_of = fingerprint(latents, ground.unet, *ground.encoders, *walks)
    path = folder / f"drawn-{len(latents)}-{made_of}.npy"
    with PartialState().main_process_first():
        if not path.exists():
            with whole(path) as new:
                np.save(new, drawn_again(ground, latents))
    return np.load(path)


@torch.no_grad()
def drawn_again(ground: Ground, latents: np.ndarray) -> np.ndarray:
    """Latents of the first scenes, noised to where one of the last ``BACK`` steps begins and walked back, guided.

    In turns, batch by batch, of one step, of two and so on; then one batch as it is.
    """
    shown, card, device = ground.latents, ground.card, ground.run.device
    unet, sayer = network(ground, ground.unet.parent), Sayer(ground.tokenizers, ground.encoders, device)
    schedule, chunks = trailing_schedule(STEPS).to(device), []
    for start in range(0, len(latents), ground.batch):
        rng, back = seeded("drawn", start), (start // ground.batch + 1) % (BACK + 1)
        clean = torch.from_numpy(latents[start : start + ground.batch]).float().to(device)
        if back:
            told = sayer([said(scene, rng) for scene in shown.scenes[start : start + len(clean)]], shown.size)
            away = sayer([no_caption(rng) for _ in clean], shown.size)
            first = torch.full((len(clean),), STEPS - back, device=device)
            x = begun(clean, torch.randn(clean.shape).to(device), first, schedule)
            clean = walked(unet, x, first, back, schedule, told, card.prediction, Guide(away, card.guidance_strength))
        chunks.append(clean.half().cpu().numpy())
    return np.concatenate(chunks)


class PatchDiscriminator(nn.Module):
    """Tells renders' patches from the decoder's (PatchGAN: Isola et al., arXiv 1611.07004, section 3.2.2)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 192)) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after))
            for before, after in pairwise(widths)
        )
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of pictures ``[B, 3, H, W]``: a logit a patch ``[B, 1, H/16, W/16]``, above 0 for renders; and features."""
        features = [F.leaky_relu(self.conv_in(pictures), 0.2)]
        for layer in self.layers:
            features.append(F.leaky_relu(layer(features[-1]), 0.2))
        return self.conv_out(features[-1]), features


def adversarial(
    discriminator: PatchDiscriminator, renders: Tensor, again: Tensor, errors: Tensor, share: float
) -> dict[str, Tensor]:
    """Both sides' losses on decoded pictures ``again``; each reaches its own side's weights alone.

    The decoder's are that it be taken for renders, and that the discriminator find in it what it finds in the render
    (feature matching: arXiv 1711.11585, section 3.2). They move pictures by a share of what pixels' ``errors`` do, as
    in arXiv 2012.09841, section 3.2, but at the pixels. All in float32: in bfloat16 on a CPU a discriminator's
    gradients were at times not numbers.
    """
    shown = again.detach().requires_grad_()
    fooled, mine = discriminator(shown)
    with torch.no_grad():
        _, wanted = discriminator(renders)
    unlike = torch.stack([(a - b).abs().mean() for a, b in zip(mine, wanted, strict=True)]).mean()
    taken = student_loss([fooled])
    (slope,) = torch.autograd.grad(taken + MATCHING * unlike, shown)
    (asked,) = torch.autograd.grad(errors, again, retain_graph=True)
    slope *= share * asked.norm() / slope.norm().clamp_min(1e-12)
    near = renders + NEAR * torch.randn_like(renders)
    logits, _ = discriminator(torch.cat([renders, shown.detach(), near]))
    real, fake, still = logits.chunk(3)
    return {
        "adversarial": taken.detach() + ((again - shown.detach()) * slope).sum(),
        "discriminator": discriminator_loss([real], [fake]),
        "unsteady": STEADY * unsteadiness([real], [still]),
    }


def refine_decoder(drawn: np.ndarray, ground: Ground, sprites: Sprites, folder: Path, steps: int) -> None:
    """Trains the decoder of the ground's VAE, in place; in ``folder``, going on from its checkpoint.

    ``drawn``: latents of the ground's first scenes, those of ``as_drawn``. On whole pictures: group norms see all of a
    picture at once, so a decoder that knows crops alone gets colours wrong.
    """
    vae, run = ground.vae, ground.run
    torch.manual_seed(0)
    decoding = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_(True)
    discriminator, after = PatchDiscriminator(), int(ADVERSARIAL_AFTER * steps)
    networks = nn.ModuleDict({"decoding": decoding, "discriminator": discriminator})
    networks.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = {"decoding": Part(PEAK), "discriminator": Part(DISCRIMINATOR_PEAK, after)}
    stage = Stage(folder, networks, parts, steps, decay=0.998, run=run)
    while stage.step < steps:
        picks = seeded("decoder", stage.number).choices(range(len(drawn)), k=BATCH)
        scenes = [scene_at(sprites, ground.latents.size, number) for number in picks]
        pixels = to_pixels(np.stack([render(scene, sprites) for scene in scenes]))
        pixels = pixels.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        latents = torch.from_numpy(drawn[picks]).float()
        latents += LATENT_NOISE * torch.randn(latents.shape)
        with autocast(run.kind):
            again = vae.decode((latents / vae.config.scaling_factor).to(run.device)).float()
        losses = reconstruction_losses(pixels, again)
        if stage.step >= after:
            errors, share = torch.stack(list(losses.values())).sum(), min(1.0, (stage.step - after) / RISE)
            losses |= adversarial(discriminator, pixels, again, errors, share)
        stage.update(losses)
    decoding.load_state_dict(stage.average["decoding"].state_dict())
    vae.requires_grad_(False).eval()
