"""The networks against diffusers and transformers: names, shapes, and what they compute."""

import math
from dataclasses import replace

import pytest
import small_sdxl as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fulgurite.cards import card
from fulgurite.errors import RequestError
from fulgurite.models import VAE, CLIPTextEncoder, TinyDecoder, UNet
from fulgurite.models.layers import VectorLinear
from fulgurite.parameters import Parameters
from fulgurite.request import Request, plan

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LIGHTNING = card("bytedance/stable-diffusion-xl-lightning")


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def loaded(network: nn.Module, oracle: nn.Module) -> nn.Module:
    network.load_state_dict(small.published_names(oracle))
    return network.eval()


def test_a_request_runs_the_largest_schedule_that_it_allows_and_never_more():
    assert [LIGHTNING.steps_for(most) for most in (1, 3, 7, 20)] == [1, 2, 4, 8]
    eight = replace(LIGHTNING, schedules=(8,))
    assert plan(eight, Request("a fox", num_steps=8)).steps == 8
    with pytest.raises(RequestError, match="needs at least 8") as refused:
        plan(eight, Request("a fox", num_steps=7))
    assert refused.value.param == "num_steps"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "x"),
        ("prompt", None),
        ("negative_prompt", 7),
        ("width", 100),
        ("height", 0),
        ("width", 256.5),
        ("num_steps", 0),
        ("num_steps", 21),
        ("num_steps", "4"),
        ("guidance", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("decoder", "quick"),
    ],
)
def test_what_a_request_cannot_be_is_named_at_once(name, value):
    with pytest.raises(RequestError, match=f"^{name}: ") as refused:
        Request(**{"prompt": "a fox"} | {name: value})
    assert refused.value.param == name


def test_a_request_has_the_api_s_defaults_and_whole_numbers():
    assert vars(Request("a fox", seed=5)) == Parameters(prompt="a fox", seed=5).model_dump()
    assert Request("a fox").seed is None
    assert Request("a fox", negative_prompt=None, decoder=None) == Request("a fox")
    request = Request("a fox", width=512.0, num_steps=4.0)
    assert (repr(request.width), repr(request.num_steps)) == ("512", "4")


# At SDXL's sizes, on the meta device, where weights take no memory.


@pytest.mark.parametrize(
    ("ours", "oracle", "config", "parameters"),
    [
        (UNet, small.oracle_unet, LIGHTNING.unet, 2_567_463_684),
        (VAE, small.oracle_vae, LIGHTNING.vae, 83_653_863),
        (CLIPTextEncoder, small.oracle_text, LIGHTNING.text_encoders[0], 123_060_480),
        (CLIPTextEncoder, small.oracle_text, LIGHTNING.text_encoders[1], 694_659_840),
    ],
    ids=["unet", "vae", "text_encoder", "text_encoder_2"],
)
def test_full_size_names_and_shapes_are_the_published_ones(ours, oracle, config, parameters):
    with torch.device("meta"):
        network, wanted = ours(config), oracle(config)
    assert shapes(network.state_dict()) == shapes(small.published_names(wanted))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


# At small sizes, with random weights.


@pytest.fixture(scope="module")
def unets():
    torch.manual_seed(0)
    oracle = small.roughened(small.oracle_unet(small.UNET))
    return loaded(UNet(small.UNET), oracle), oracle


@torch.inference_mode()
def unet_outputs(unets, height, width, length, rows=3):
    ours, oracle = unets
    torch.manual_seed(height * 100 + width)
    x = torch.randn(rows, 4, height, width)
    timestep = torch.tensor([999, 499, 0][:rows])
    context, pooled = torch.randn(rows, length, 80), torch.randn(rows, 48)
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [256, 2048, 0, 0, 256, 2048], [777, 511, 13, 5, 300, 400]])
    sizes = sizes[:rows].float()
    wanted = oracle(
        x, timestep, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}, return_dict=False
    )[0]
    return ours(x, timestep, context, pooled, sizes), wanted, (x, timestep, context, pooled, sizes)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 9), (8, 13), (5, 7), (4, 32)])
@pytest.mark.parametrize("length", [77, 40])
def test_unet_agrees_with_different_rows(unets, height, width, length):
    result, wanted, _ = unet_outputs(unets, height, width, length)
    torch.testing.assert_close(result, wanted, **TOLERANCE)


def test_unet_rows_do_not_depend_on_their_batch(unets):
    together, _, arguments = unet_outputs(unets, 9, 12, 77)
    with torch.inference_mode():
        for row in range(3):
            alone = unets[0](*(argument[row : row + 1] for argument in arguments))
            torch.testing.assert_close(alone, together[row : row + 1], **TOLERANCE)


@pytest.mark.parametrize("depths", [(2,), (1, 2), (0, 0, 3, 1)])
def test_unets_of_other_depths_agree(depths):
    config = replace(
        small.UNET,
        block_out_channels=(32, 64, 64, 96)[: len(depths)],
        transformer_layers_per_block=depths,
        layers_per_block=1,
    )
    oracle = small.roughened(small.oracle_unet(config))
    result, wanted, _ = unet_outputs((loaded(UNet(config), oracle), oracle), 9, 10, 7)
    torch.testing.assert_close(result, wanted, **TOLERANCE)


@pytest.fixture(scope="module")
def vaes():
    oracle = small.roughened(small.oracle_vae(small.VAE))
    return loaded(VAE(small.VAE), oracle), oracle


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (4, 60), (29, 30)])
@torch.inference_mode()
def test_vae_encoder_agrees(vaes, height, width):
    ours, oracle = vaes
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    mean, log_variance = ours.encode(pixels)
    wanted = oracle.encode(pixels).latent_dist
    torch.testing.assert_close(mean, wanted.mean, **TOLERANCE)
    torch.testing.assert_close(log_variance, wanted.logvar, **TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 9)])
@torch.inference_mode()
def test_vae_decoder_agrees(vaes, height, width):
    ours, oracle = vaes
    latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.decode(latents), oracle.decode(latents, return_dict=False)[0], **TOLERANCE)


def decoder_half(oracle):
    return {name: tensor for name, tensor in oracle.state_dict().items() if not name.startswith("encoder.")}


def test_full_size_fast_decoder_is_the_published_ones_half():
    with torch.device("meta"):
        network, oracle = TinyDecoder(LIGHTNING.fast_decoder), small.oracle_fast_decoder(LIGHTNING.fast_decoder)
    assert shapes(network.state_dict()) == shapes(decoder_half(oracle))
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_222_531
    # madebyollin/taesdxl's file has 9,793,292 bytes: both halves in float32, and its header.
    weights = sum(parameter.numel() for parameter in oracle.parameters())
    assert 0 < 9_793_292 - 4 * weights < 20_000


@pytest.mark.parametrize("config", [small.FAST, LIGHTNING.fast_decoder], ids=["small", "full"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 9)])
@torch.inference_mode()
def test_fast_decoder_agrees(config, height, width):
    torch.manual_seed(0)
    oracle = small.oracle_fast_decoder(config)
    ours = TinyDecoder(config)
    ours.load_state_dict(decoder_half(oracle))
    latents = 3 * torch.randn(2, 4, height, width)  # where the bound is felt
    torch.testing.assert_close(ours(latents), oracle.decode(latents, return_dict=False)[0], **TOLERANCE)


def prompt_rows(config, lengths):
    """Token rows whose prompts end at different places, padded with the end token, as SDXL's are."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.full((len(lengths), config.max_position_embeddings), config.eos_token_id)
    for row, length in zip(rows, lengths, strict=True):
        row[0] = config.eos_token_id - 1
        row[1 : 1 + length] = torch.randint(0, config.eos_token_id - 1, (length,), generator=generator)
    return rows


@pytest.mark.parametrize("config", [small.FIRST, small.SECOND], ids=["first", "second"])
@pytest.mark.parametrize("padding", ["end", "other"])
@torch.inference_mode()
def test_text_encoders_agree_at_every_prompt_length(config, padding):
    oracle = small.roughened(small.oracle_text(config))
    ours = loaded(CLIPTextEncoder(config), oracle)
    lengths = [0, 1, 5, 40, 74, 75]
    ids = prompt_rows(config, lengths)
    if padding == "other":  # SDXL's second tokenizer pads with token 0
        for row, length in zip(ids, lengths, strict=True):
            row[length + 2 :] = 0
    hidden, pooled = ours(ids)
    wanted = oracle(ids, output_hidden_states=True)
    torch.testing.assert_close(hidden, wanted.hidden_states[-2], **TOLERANCE)
    wanted_pooled = wanted.text_embeds if config.projection_dim else wanted.pooler_output
    torch.testing.assert_close(pooled, wanted_pooled, **TOLERANCE)
    # Rows of another length, as models with fewer positions have them.
    torch.testing.assert_close(ours(ids[:2, :9])[0], hidden[:2, :9], **TOLERANCE)


@torch.inference_mode()
def test_the_end_of_a_prompt_is_found_where_published_configs_misname_it():
    """SDXL's published configs say eos_token_id = 2, and transformers then takes the highest id."""
    oracle = small.roughened(small.oracle_text(small.SECOND))
    ours = loaded(CLIPTextEncoder(small.SECOND), oracle)
    oracle.config.eos_token_id = oracle.text_model.config.eos_token_id = 2
    ids = prompt_rows(small.SECOND, [3, 20, 75])
    torch.testing.assert_close(ours(ids)[1], oracle(ids).text_embeds, **TOLERANCE)


@given(st.integers(2, 40))
@torch.inference_mode()
def test_a_vectors_bits_do_not_depend_on_how_many_are_beside_it(rows):
    torch.manual_seed(rows)
    layer, x = VectorLinear(384, 96), torch.randn(rows, 384)
    assert torch.equal(layer(x), torch.cat([layer(one) for one in x.split(1)]))
