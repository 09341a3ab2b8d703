"""The whole way from prompt to pixels, a stage at a time, to be read top to bottom."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fulgurite.cards import Card, card, pull_command
from fulgurite.errors import NotFiniteError, NotPulledError, WeightsError
from fulgurite.kernels import cpu, float8, int8
from fulgurite.kernels.fused import fuse
from fulgurite.kernels.graphs import GRAPHED, GraphedEncoder, GraphedUNet, GraphedVAE, Memory
from fulgurite.kernels.nvidia import why_not_triton
from fulgurite.kernels.recordings import Workspace
from fulgurite.models import AttentionGuidance
from fulgurite.models.unet import weights_in
from fulgurite.request import Decoder, OnStep, Picture, Plan, Preview, Request, notes, plan
from fulgurite.sampling import (
    TRAIN_STEPS,
    Schedule,
    euler_step,
    per_row,
    scale_input,
    starting_noise,
    to_denoised,
    trailing_schedule,
)
from fulgurite.weights import Networks, load_networks

MANY = 1 << 30  # weights of a UNet, above which a CPU keeps them in half precision
PREVIEW_SIDE = 128  # pixels, of a preview's longer side
Encoded = tuple[Tensor, Tensor]  # a prompt's states [S, D] and its pooled state [P]


@dataclass
class Row:
    """One picture on its way, which ``Pipeline.step`` moves on."""

    request: Request  # with its seed filled in
    plan: Plan
    schedule: Schedule
    contexts: Tensor  # [1 or 2, S, any]: what is wanted and, guided, what is not, as the network has read it
    pooled: Tensor  # [1 or 2, P]
    sizes: Tensor  # [6]
    x: Tensor  # the noisy latent [C, h, w], in float32 whatever the network's precision
    started: float  # by time.perf_counter
    done: int = 0  # steps
    denoised: Tensor | None = None  # the clean latent [C, h, w], as the last step saw it


class Pipeline:
    """A model, ready to draw.

    >>> from fulgurite import Pipeline
    >>> draw = Pipeline.load("fulgurite/spark")
    >>> picture = draw("a red rocket", width=256, height=256, num_steps=2, seed=7)
    >>> picture.image.size, picture.steps
    ((256, 256), 2)
    """

    def __init__(self, card: Card, networks: Networks, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.card, self.networks = card, networks
        self.device, self.dtype = torch.device(device), dtype
        # Decoders are convolutions, which are quicker so: on a CPU 1.6 to 2 times. On a GPU torch's group norms turn
        # pictures around for it, in half as much time again as a decode without.
        for decoder in (networks.vae if self.device.type != "cuda" else None, networks.fast_decoder):
            if decoder:
                decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(
        cls,
        model: str,
        *,
        steps: int = 20,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        eight_bits: bool = False,
        triton: bool | None = None,
        graphs: Memory | None = None,
        like: Networks | None = None,
    ) -> "Pipeline":
        """Loads a model by its id, with the checkpoint for the largest schedule within ``steps``: it has that alone.

        Without a ``dtype`` it is the device's usual one, and a CPU that computes in float32 keeps the weights of large
        models in half precision, to which those published in more are rounded. With ``eight_bits`` large layers are,
        which is less exact: on a CPU integers, in the UNet and the decoder, on a GPU floating point, in the UNet alone.
        ``triton``: on a GPU, whether by the Triton kernels; None is wherever they can run. ``graphs``: the memory of
        networks' graphs; without it a CPU has its own, and a GPU draws without. The text encoders and the VAE of
        ``like``, another checkpoint of the same model, are used again. Raises UnknownModelError, NotPulledError or
        WeightsError.
        """
        of_model, kept = card(model), dtype
        dtype = dtype or usual_dtype(device, eight_bits)
        steps = of_model.steps_for(steps)
        networks = load_networks(of_model, steps, device, dtype, like, kept or kept_dtype(of_model, device, dtype))
        if of_model.schedules:
            of_model = replace(of_model, schedules=(steps,))
        pipeline = cls(of_model, networks, device, dtype)
        pipeline.accelerate(eight_bits, triton, graphs)
        return pipeline

    def accelerate(self, eight_bits: bool = False, triton: bool | None = None, graphs: Memory | None = None) -> None:
        """Puts the device's faster layers in place of the plain ones, and graphs: from now on networks can only draw.

        The arguments are those of ``load``. What another checkpoint shares with this one is so already.
        """
        networks = self.networks
        fuse(networks.unet)
        if self.device.type != "cpu":
            if eight_bits:
                float8.accelerate(networks.unet)
            if triton if triton is not None else not why_not_triton(str(self.device)):
                from fulgurite.kernels import cuda  # here: it imports Triton, which not every machine has

                cuda.accelerate(networks.unet)
                cuda.accelerate(networks.vae)
        elif self.dtype == torch.float32 or (self.dtype == torch.bfloat16 and cpu.has_bfloat16()):
            if eight_bits:
                int8.accelerate(networks.unet)
            if not isinstance(networks.vae, GRAPHED):
                networks.vae.encoder = None  # type: ignore[assignment]  # which drawing does not need
                if eight_bits:
                    int8.accelerate(networks.vae.decoder)
            for network in (networks.unet, networks.vae, networks.fast_decoder, *networks.text_encoders):
                if network:
                    cpu.accelerate(network)
            graphs = graphs or Workspace()
        if graphs:
            self.networks = graphed(networks, graphs)

    def __call__(self, prompt: str, *, on_step: OnStep | None = None, **parameters: Any) -> Picture:
        """Draws one picture; ``parameters`` are those of Request."""
        return self.draw(Request(prompt, **parameters), on_step)

    def draw(self, request: Request, on_step: OnStep | None = None) -> Picture:
        """Draws what is asked for."""
        row = self.start(request, self.encode)
        while row.done < row.plan.steps:
            self.step([row], smallest_batch(self.card, self.device, row.plan.latent_shape))
            if on_step:
                on_step(row.done, row.plan.steps, self.preview(row))
        return self.finish(row)

    @torch.inference_mode()
    def encode(self, prompt: str) -> Encoded:
        """A prompt to both encoders' states side by side ``[S, D1 + D2]`` and the second's pooled state ``[P]``."""
        states = []
        for tokenizer, encoder in zip(self.networks.tokenizers, self.networks.text_encoders, strict=True):
            hidden, pooled = encoder(tokenizer([prompt]).to(self.device))
            states.append(hidden[0])
        return torch.cat(states, dim=-1), pooled[0]

    @torch.inference_mode()
    def start(self, request: Request, encode: Callable[[str], Encoded]) -> Row:
        """A request's row before its first step: noise, and what the network is told about it."""
        started = time.perf_counter()
        request, to = request.seeded(), plan(self.card, request)
        assert request.seed is not None
        if request.decoder == "fast" and not self.networks.fast_decoder:
            raise no_fast_decoder(self.card, to.steps)
        schedule = trailing_schedule(to.steps)
        encoded = [encode(request.prompt)]
        if to.strength != 1:
            zeros = self.card.force_zeros_for_empty_prompt and not self.card.schedules and not request.negative_prompt
            encoded.append(zeros_like(encoded[0]) if zeros else encode(request.negative_prompt))
        contexts, pooled = zip(*encoded, strict=True)
        sizes = size_conditioning(to.drawn_size if self.card.native_shapes else (request.width, request.height))
        noise = starting_noise(request.seed, to.latent_shape, float(schedule.sigmas[0]))
        return Row(
            request,
            to,
            schedule.to(self.device),
            self.networks.unet.read(torch.stack(contexts)),
            torch.stack(pooled),
            sizes.to(self.device),
            noise.to(self.device),
            started,
        )

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], batch: int) -> None:
        """Moves rows of one latent shape on by a step each, wherever each is in its schedule.

        The network runs on ``batch`` rows, those that are missing filled up, so that its kernels are the same ones
        whoever shares the batch. If this raises, no row has moved.
        """
        x = torch.stack([row.x for row in rows])
        sigma = torch.stack([row.schedule.sigmas[row.done] for row in rows])
        next_sigma = torch.stack([row.schedule.sigmas[row.done + 1] for row in rows])
        prediction = self._predict(rows, scale_input(x, sigma).to(self.dtype), batch)
        denoised = to_denoised(prediction, x, sigma, self.networks.prediction)
        x = euler_step(x, denoised, sigma, next_sigma)
        for row, row_x, row_denoised in zip(rows, x, denoised, strict=True):
            row.x, row.denoised, row.done = row_x, row_denoised, row.done + 1

    def _predict(self, rows: Sequence[Row], x: Tensor, batch: int) -> Tensor:
        """The network's predictions ``[B, C, h, w]`` in float32, guided where that is asked for.

        Unless it is, nothing is copied from the host: on a GPU this would wait for the step before.
        """
        distilled = bool(self.card.schedules)
        guided = [i for i, row in enumerate(rows) if row.plan.strength != 1]
        second = {} if distilled else {i: len(rows) + place for place, i in enumerate(guided)}
        entries = [(i, 0) for i in range(len(rows))] + [(i, 1) for i in second]  # row, prompt
        entries += entries[:1] * (batch - len(entries))
        told = [rows[i] for i, _ in entries]

        timesteps = torch.stack([row.schedule.timesteps[row.done] for row in told])
        contexts = torch.stack([rows[i].contexts[prompt] for i, prompt in entries])
        pooled = torch.stack([rows[i].pooled[prompt] for i, prompt in entries])
        sizes = torch.stack([row.sizes for row in told])
        guidance = None
        if distilled and guided:
            avoided = torch.stack([row.contexts[-1] for row in told])
            strength = torch.tensor([row.plan.strength for row in told], device=self.device)
            guidance = AttentionGuidance(avoided, strength, self.card.guidance_tau)
        inputs = torch.stack([x[i] for i, _ in entries])
        found = self.networks.unet(inputs, timesteps, contexts, pooled, sizes, guidance).float()

        wanted = found[: len(rows)]
        if not second:
            return wanted
        # Classifier-free guidance (Ho and Salimans, arXiv 2207.12598). What is predicted is linear in the clean
        # latent for every kind of prediction, so guiding the one guides the other.
        unwanted = found[[second.get(i, i) for i in range(len(rows))]]
        strength = per_row(torch.tensor([row.plan.strength for row in rows], device=self.device), wanted)
        return torch.where(strength == 1, wanted, unwanted + strength * (wanted - unwanted))

    def finish(self, row: Row) -> Picture:
        """The picture of a row whose steps are done. Raises NotFiniteError."""
        return self.picture(row, self.decode(row))

    @torch.inference_mode()
    def decode(self, row: Row) -> Tensor:
        """A row's latent to pixels ``[3, H, W]``, about -1..1, on the device in float32. Raises NotFiniteError."""
        # One at a time: on a CPU a decode costs the same a picture in any batch, and in a batch its bits may differ.
        pixels = self._decoded(row.x[None], row.request.decoder)[0]
        if not pixels.isfinite().all():
            raise NotFiniteError(no_numbers(self.dtype))
        return pixels

    def picture(self, row: Row, pixels: Tensor) -> Picture:
        """A row's pixels ``[3, H, W]`` as the picture that was asked for, and how it was made."""
        return Picture(
            image=as_large_as_asked(to_image(pixels), row.request.width, row.request.height, self.card),
            request=row.request,
            model=self.card.id,
            steps=row.plan.steps,
            drawn_size=row.plan.drawn_size,
            seconds=time.perf_counter() - row.started,
            notes=notes(self.card, row.request, row.plan, self.networks.tokenizers),
        )

    def _decoded(self, latents: Tensor, decoder: Decoder) -> Tensor:
        """Clean latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``, about -1..1, in float32."""
        if decoder == "fast":
            assert self.networks.fast_decoder
            return self.networks.fast_decoder(latents.to(self.dtype)).float()
        vae = self.networks.vae
        return vae.decode((latents / vae.config.scaling_factor).to(self.dtype)).float()

    def preview(self, row: Row) -> Preview:
        """The picture as a row's last step saw it; drawn when it is called."""
        assert row.denoised is not None
        return partial(self._preview, row.denoised)

    @torch.inference_mode()
    def _preview(self, latent: Tensor) -> Image.Image | None:
        """A clean latent ``[C, h, w]`` as a small picture: by the fast decoder, else by the card's linear map."""
        if self.networks.fast_decoder:
            return reduced(to_image(self._decoded(latent[None], "fast")[0]))
        return linear_preview(latent, self.card.preview_rgb)

    @torch.inference_mode()
    def agrees(self, latent_size: tuple[int, int], parts: Sequence[int]) -> bool:
        """Whether one batch gives every row the same bits as the batches of ``parts`` rows that it is cut into.

        Found out with random rows: which kernels run depends on shapes alone, not on what is in them. Of a distilled
        model every other row is guided, as any may be; guided or not, it runs the kernels that it runs beside such.
        """
        numbers, size, config = torch.Generator().manual_seed(0), sum(parts), self.card.unet
        states = size, self.networks.tokenizers[0].length, config.cross_attention_dim
        inputs = [
            torch.randn(size, config.in_channels, *latent_size, generator=numbers).to(self.dtype),
            torch.randint(TRAIN_STEPS, (size,), generator=numbers),
            torch.randn(states, generator=numbers).to(self.dtype),
            torch.randn(size, config.pooled_dim, generator=numbers).to(self.dtype),
            torch.randint(256, 2048, (size, 6), generator=numbers).float(),
            torch.randn(states, generator=numbers).to(self.dtype),
            1.0 + torch.arange(size) % 2,
        ]
        x, timesteps, context, pooled, sizes, avoided, strength = (values.to(self.device) for values in inputs)
        unet = self.networks.unet
        unet = unet.unet if isinstance(unet, GraphedUNet) else unet  # graphs of what may never be drawn would be kept
        read = unet.read
        inputs = [x, timesteps, read(context), pooled, sizes, read(avoided), strength]

        def evaluate(*rows: Tensor) -> Tensor:
            *inputs, avoided, strength = rows
            guidance = AttentionGuidance(avoided, strength, self.card.guidance_tau) if self.card.schedules else None
            return unet(*inputs, guidance)

        cut = zip(*(values.split(list(parts)) for values in inputs), strict=True)
        return torch.equal(evaluate(*inputs), torch.cat([evaluate(*part) for part in cut]))


def graphed(networks: Networks, memory: Memory) -> Networks:
    """The networks as graphs that share this memory; those that are such already stay as they are."""
    encoders = tuple(
        network if isinstance(network, GraphedEncoder) else GraphedEncoder(network, memory)
        for network in networks.text_encoders
    )
    vae, unet = networks.vae, GraphedUNet(networks.unet, memory)
    vae = vae if isinstance(vae, GraphedVAE) else GraphedVAE(vae, memory)  # type: ignore[assignment]
    return replace(networks, unet=unet, vae=vae, text_encoders=encoders)  # type: ignore[arg-type]


def usual_dtype(device: str, eight_bits: bool = False) -> torch.dtype:
    """What a device computes fastest in without harm: half the bits, where its processor has instructions for them."""
    if device.startswith("cuda"):
        return torch.bfloat16 if eight_bits else torch.float16  # of 8 bits not all GPUs give float16
    return torch.bfloat16 if cpu.has_bfloat16() else torch.float32


def kept_dtype(card: Card, device: str, dtype: torch.dtype) -> torch.dtype:
    """What a model's UNet and text encoders are kept in, to be computed with in ``dtype``."""
    halves = torch.device(device).type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return cpu.HALF if halves and weights_in(card.unet) > MANY else dtype


def zeros_like(encoded: Encoded) -> Encoded:
    """What diffusers has in the place of a negative prompt that is not given. Here "" is none, too."""
    states, pooled = encoded
    return torch.zeros_like(states), torch.zeros_like(pooled)


def no_numbers(dtype: torch.dtype) -> str:
    """What may be done about a picture of infinities."""
    told = "The network gave no numbers for this picture. Ask for another seed or fewer steps."
    if dtype == torch.float16:
        told += (
            " If none of a model's pictures has any, its VAE may need a wider range, as SDXL's own does: set "
            "precision to bfloat16 or float32, or name another file in its card, as vae_file."
        )
    return told


def no_fast_decoder(card: Card, steps: int) -> WeightsError:
    """Why a model that has a fast decoder cannot use it: its weights are older than that, or somebody's own."""
    if card.weights.source == "hub":
        return NotPulledError(
            f"The fast decoder of {card.id} is not on this machine: `{pull_command(card, steps)}` fetches what is "
            "missing (with --lora where the LoRA files are used); then start again."
        )
    return WeightsError(
        f"The weights of {card.id} are without a fast decoder: put it into the folder fast_decoder beside vae, "
        "or name its file in the card, as `fast_decoder_file`."
    )


def smallest_batch(card: Card, device: torch.device, latent_shape: tuple[int, int, int]) -> int:
    """The network's rows when one picture is drawn alone, by which its bits are fixed.

    An undistilled model has two, for guidance. A GPU is not busy with a few small rows, and its kernels are others in
    larger batches, so there it is the power of two that comes to one 1024x1024 picture of SDXL, and at most 16.
    """
    rows = 1 if card.schedules else 2
    if device.type == "cuda":
        fill = min(16, max(1, 16384 // (latent_shape[1] * latent_shape[2])))
        rows = max(rows, 1 << fill.bit_length() - 1)
    return rows


def size_conditioning(size: tuple[int, int]) -> Tensor:
    """SDXL's six numbers for a picture that is neither cropped nor scaled, ``[6]``."""
    width, height = size
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels ``[3, H, W]`` in -1..1 to a picture."""
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())  # turned around where it is quicker


def linear_preview(latent: Tensor, rgb: tuple[tuple[float, ...], ...]) -> Image.Image | None:
    """A clean latent ``[C, h, w]`` as a small picture, by the card's linear map instead of a decoder."""
    if not rgb:
        return None
    weights = torch.tensor(rgb)
    pixels = torch.einsum("chw,cd->dhw", latent.float().cpu(), weights[:-1]) + weights[-1][:, None, None]
    return reduced(to_image(pixels))


def reduced(image: Image.Image) -> Image.Image:
    """The picture at a preview's size."""
    scale = PREVIEW_SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def as_large_as_asked(image: Image.Image, width: int, height: int, card: Card) -> Image.Image:
    """The picture at the size asked for: cropped where the network drew that size, else resampled to cover it."""
    if not card.native_shapes:
        return image.crop((0, 0, width, height))
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    shown = min(width / scale, image.width), min(height / scale, image.height)  # which rounding may make larger
    left, top = (image.width - shown[0]) / 2, (image.height - shown[1]) / 2
    box = (left, top, left + shown[0], top + shown[1])
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
