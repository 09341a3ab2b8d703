"""The same work in OpenVINO: diffusers' networks converted, and as little as possible around them."""

import io
from collections.abc import Callable, Sequence

import openvino
import torch
from openvino.frontend.pytorch import patch_model
from PIL import Image
from torch import Tensor, nn

from fulgurite.benchmark import Laps
from fulgurite.pipeline import size_conditioning
from fulgurite.request import plan
from fulgurite.sampling import starting_noise
from peers.diffusers_way import pipeline
from peers.works import Work

Tensors = Sequence[Tensor]
SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}  # OpenVINO's own choice, where it can


class Call(nn.Module):
    """A function over a network, as a network that can be traced."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensors]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Tensors:
        return self.call(self.network, *inputs)


def converted(network: nn.Module, call: Callable[..., Tensors], inputs: Tensors) -> Callable[..., list[Tensor]]:
    """The function as OpenVINO runs it, for exactly these shapes; float32 at its doors whatever is inside.

    The network is of no use afterwards.
    """
    getattr(patch_model, "__make_16bit_traceable")(network)  # so that weights in half precision stay so
    model = openvino.convert_model(Call(network, call), example_input=tuple(inputs))
    model.reshape({port: list(tensor.shape) for port, tensor in zip(model.inputs, inputs, strict=True)})
    run = openvino.compile_model(model, "CPU", SETTINGS)

    def ready(*given: Tensor) -> list[Tensor]:
        found = run([tensor.numpy() for tensor in given])
        return [torch.from_numpy(found[i]) for i in range(len(found))]

    return ready


def encode(network: nn.Module, ids: Tensor) -> Tensors:
    found = network(ids, output_hidden_states=True)
    return found.hidden_states[-2], found[0]


def predict(network: nn.Module, x: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor, sizes: Tensor) -> Tensors:
    return network(x, timestep, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}, return_dict=False)


def decode(network: nn.Module, latents: Tensor) -> Tensors:
    return network.decode(latents, return_dict=False)


class OpenVINOWay:
    @torch.no_grad()
    def __init__(self, work: Work) -> None:
        pipe, self.work, self.to = pipeline(work, torch.bfloat16), work, plan(work.card, work.request)
        self.tokenizers, self.scheduler = (pipe.tokenizer, pipe.tokenizer_2), pipe.scheduler
        self.image_processor, self.scale = pipe.image_processor, pipe.vae.config.scaling_factor
        self.sizes = size_conditioning((work.request.width, work.request.height))[None]
        ids, latent = self.ids(0), torch.randn(1, *self.to.latent_shape)
        states, pooled = torch.randn(1, ids.shape[1], work.card.unet.cross_attention_dim), work.card.unet.pooled_dim
        self.encoders = [converted(encoder, encode, [ids]) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        # Each network goes as soon as OpenVINO has its own copy.
        pipe.text_encoder = pipe.text_encoder_2 = None
        self.decode = converted(pipe.vae, decode, [latent])
        pipe.vae = None
        inputs = [latent, torch.tensor(1.0), states, torch.randn(1, pooled), self.sizes]
        self.predict = converted(pipe.unet, predict, inputs)
        pipe.unet = None

    def ids(self, encoder: int) -> Tensor:
        tokenizer = self.tokenizers[encoder]
        return tokenizer(
            self.work.request.prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    @torch.no_grad()
    def draw(self) -> tuple[Image.Image, dict[str, float]]:
        laps = Laps()
        encoded = [encoder(self.ids(i)) for i, encoder in enumerate(self.encoders)]
        states, pooled = torch.cat([found[0] for found in encoded], dim=-1), encoded[1][1]
        laps.lap("text")
        self.scheduler.set_timesteps(self.to.steps)
        latents = starting_noise(self.work.request.seed, self.to.latent_shape, 1.0)[None]
        latents = latents * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            x = self.scheduler.scale_model_input(latents, timestep)
            prediction = self.predict(x, timestep, states, pooled, self.sizes)[0]
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        laps.lap("step", self.to.steps)
        pixels = self.decode(latents / self.scale)[0]
        laps.lap("decode")
        image = self.image_processor.postprocess(pixels, "pil")[0]
        laps.lap("to host")
        image.save(io.BytesIO(), "PNG")
        laps.lap("encode")
        return image, laps.seconds
