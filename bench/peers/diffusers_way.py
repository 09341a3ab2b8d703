"""The same work in diffusers: its own pipeline, called at its own seams so that the parts can be told apart."""

import io
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from fulgurite.benchmark import Laps
from fulgurite.request import plan
from fulgurite.sampling import starting_noise
from peers.works import TOKENIZER, Work

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import small_sdxl as oracle  # the tests' translation of our configurations into diffusers' and transformers'

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def filled(network: nn.Module, ours: nn.Module) -> Any:
    """diffusers' network with our tensors themselves: no second copy of them is made."""
    tensors = ours.state_dict()
    if isinstance(network, CLIPTextModel):  # which has the published names less their first part
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def pipeline(work: Work, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    networks = work.networks(dtype)
    first, second = (
        filled(oracle.oracle_text(config), ours)
        for config, ours in zip(work.card.text_encoders, networks.text_encoders, strict=True)
    )
    with torch.device("meta"):
        unet, vae = oracle.oracle_unet(work.card.unet), oracle.oracle_vae(work.card.vae)
    length = work.card.text_encoders[0].max_position_embeddings
    tokenizers = [CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=length) for _ in range(2)]
    made = StableDiffusionXLPipeline(
        vae=filled(vae, networks.vae),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=filled(unet, networks.unet),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="trailing",
            prediction_type=PREDICTIONS[networks.prediction],
        ),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


class DiffusersWay:
    """As its users run it; ``channels_last`` and ``compiled`` as its guides to speed say."""

    def __init__(
        self,
        work: Work,
        dtype: torch.dtype,
        *,
        device: str = "cpu",
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        self.work, self.dtype, self.device, self.pipe = work, dtype, device, pipeline(work, dtype).to(device)
        if channels_last:
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)
        if compiled:
            self.pipe.fuse_qkv_projections()
            mode = "reduce-overhead" if device == "cuda" else None  # by graphs, which a CPU does not have
            self.pipe.unet = torch.compile(self.pipe.unet, fullgraph=True, mode=mode)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, fullgraph=True, mode=mode)

    @torch.no_grad()
    def draw(self) -> tuple[Image.Image, dict[str, float]]:
        request, pipe, to = self.work.request, self.pipe, plan(self.work.card, self.work.request)
        laps = Laps(self.device)
        states, _, pooled, _ = pipe.encode_prompt(request.prompt, do_classifier_free_guidance=False)
        laps.lap("text")
        latents = pipe(
            prompt_embeds=states,
            pooled_prompt_embeds=pooled,
            width=request.width,
            height=request.height,
            num_inference_steps=to.steps,
            guidance_scale=0.0,
            latents=starting_noise(request.seed, to.latent_shape, 1.0)[None].to(self.device, self.dtype),
            output_type="latent",
        ).images
        laps.lap("step", to.steps)
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        laps.lap("decode")
        image = pipe.image_processor.postprocess(pixels.detach(), "pil")[0]
        laps.lap("to host")
        image.save(io.BytesIO(), "PNG")
        laps.lap("encode")
        return image, laps.seconds
