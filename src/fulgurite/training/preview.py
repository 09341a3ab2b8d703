"""The card's ``preview_rgb``: a linear map from a latent to its cells' colours, for previews without a decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulgurite.training.latents import LatentSet, scene_at
from fulgurite.training.scenes import render
from fulgurite.training.sources import Sprites
from fulgurite.training.vae import to_pixels

SCENES = 500


def fit_preview(latents: Tensor, pixels: Tensor) -> tuple[Tensor, float]:
    """Least squares from latents ``[N, C, h, w]`` to pixels ``[N, 3, H, W]``, averaged over each cell.

    Returns the map ``[C + 1, 3]``, its last row the constant, and the share of the cells' variance that it explains.
    """
    cells = F.interpolate(pixels, latents.shape[2:], mode="area")
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1).movedim(1, -1).flatten(0, 2)
    wanted = cells.movedim(1, -1).flatten(0, 2)
    found = torch.linalg.lstsq(known, wanted).solution
    return found, 1 - float((wanted - known @ found).var(dim=0).sum() / wanted.var(dim=0).sum())


def preview_lines(latents: LatentSet, sprites: Sprites) -> str:
    """The map as the card has it, with a comment on what it is worth."""
    some = torch.from_numpy(latents.latents[:SCENES]).float()
    scenes = [scene_at(sprites, latents.size, number) for number in range(len(some))]
    pixels = torch.cat([to_pixels(render(scene, sprites)[None]) for scene in scenes])
    found, explained = fit_preview(some, pixels)
    height, width = some.shape[2:]
    rows = "".join(f"    [{', '.join(f'{value:.3f}' for value in row)}],\n" for row in found.tolist())
    comment = f"# Least squares over {len(some)} scenes of the recipe, by which {explained:.0%} of what is in a"
    return f"{comment} {width}x{height} picture is explained.\npreview_rgb = [\n{rows}]\n"
