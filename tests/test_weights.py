"""Checkpoints in the layouts that people publish, against what diffusers loads from the same files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_sdxl as small
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fulgurite import Pipeline, Request
from fulgurite.cards import Weights
from fulgurite.errors import RequestError, WeightsError
from fulgurite.weights import Networks, load_networks
from fulgurite.weights.load import load_folder

Tensors = dict[str, Tensor]


def load(card, dtype: torch.dtype = torch.float32) -> Networks:
    return load_networks(card, 4, "cpu", dtype)


def assert_equal(network: nn.Module, oracle: nn.Module, atol: float = 0.0) -> None:
    """Every tensor of the network is that of the oracle."""
    wanted, found = small.published_names(oracle), network.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype), atol=atol, rtol=0, msg=name)


def assert_all_equal(networks: Networks, pipeline: StableDiffusionXLPipeline) -> None:
    assert_equal(networks.text_encoders[0], pipeline.text_encoder)
    assert_equal(networks.text_encoders[1], pipeline.text_encoder_2)
    assert_equal(networks.unet, pipeline.unet)
    assert_equal(networks.vae, pipeline.vae)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small SDXL as diffusers writes it; its tokenizers as transformers wrote them when SDXL was published."""
    return small.saved_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pipeline(folder) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


# Folders.


def test_a_folder_as_diffusers_writes_it(folder, pipeline):
    networks = load(small.local_card(folder))
    assert_all_equal(networks, pipeline)
    assert networks.prediction == "epsilon"
    assert networks.tokenizers[0].pad == networks.tokenizers[0].end
    assert networks.tokenizers[1].pad == 0
    assert not any(p.requires_grad for p in networks.unet.parameters())
    assert not networks.unet.training


def published(folder: Path, tmp_path: Path) -> Path:
    """The folder as SDXL's authors published theirs: in half precision, with buffers and full names."""
    for place in ("text_encoder", "text_encoder_2", "unet", "vae"):
        [path] = (folder / place).glob("*.safetensors")
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        if place == "text_encoder":
            tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        (tmp_path / place).mkdir()
        save_file(tensors, tmp_path / place / path.name.replace(".safetensors", ".fp16.safetensors"))
    for place in ("tokenizer", "tokenizer_2"):
        (tmp_path / place).symlink_to(folder / place)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_published_folder_in_half_precision(folder, pipeline, tmp_path, dtype):
    networks = load_folder(published(folder, tmp_path), small.small_card(), "cpu", dtype)
    assert {p.dtype for p in networks.unet.parameters()} == {dtype}
    for network, oracle in ((networks.unet, pipeline.unet), (networks.text_encoders[0], pipeline.text_encoder)):
        wanted = small.published_names(oracle)
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, wanted[name].half().to(dtype)), name


def test_one_tokenizer_serves_both_encoders(folder, tmp_path):
    path = published(folder, tmp_path)
    (path / "tokenizer_2").unlink()
    first, second = load(small.local_card(path)).tokenizers
    assert first.encode("a red fox") == second.encode("a red fox")


def test_a_sharded_network(folder, pipeline, tmp_path):
    path = published(folder, tmp_path)
    pipeline.unet.save_pretrained(path / "unet", max_shard_size="500KB")
    (path / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    assert len(list((path / "unet").glob("*-of-*.safetensors"))) > 1
    assert_equal(load(small.local_card(path)).unet, pipeline.unet)


def test_the_embedded_folder(folder, pipeline, tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded/tiny").symlink_to(folder)
    monkeypatch.setattr("fulgurite.weights.load.resources.files", lambda package: tmp_path)
    card = small.small_card(id="fulgurite/tiny", weights=Weights(source="embedded", path="tiny"))
    assert_all_equal(load(card), pipeline)


def test_the_vae_under_its_old_names(folder, pipeline, tmp_path):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, tmp_path / "vae.safetensors")
    assert_equal(load(small.local_card(folder, vae_file=tmp_path / "vae.safetensors")).vae, pipeline.vae)


# Lightning's UNets.


@pytest.mark.parametrize(
    ("name", "prediction"),
    [("sdxl_lightning_4step_unet.safetensors", "epsilon"), ("sdxl_lightning_1step_unet_x0.safetensors", "x0")],
)
def test_a_lightning_unet_beside_the_base_model(folder, pipeline, tmp_path, name, prediction):
    """Loaded by diffusers as Lightning's model card says: a state dict into the base model's UNet."""
    distilled = small.roughened(small.oracle_unet(small.UNET), seed=9)
    save_file({name: tensor.half() for name, tensor in distilled.state_dict().items()}, tmp_path / name)
    oracle = UNet2DConditionModel.from_config(folder / "unet")
    oracle.load_state_dict(load_file(tmp_path / name))

    networks = load(small.local_card(folder, unet_file=tmp_path / name))
    assert_equal(networks.unet, oracle)
    assert_equal(networks.vae, pipeline.vae)
    assert networks.prediction == prediction


# Whole single files in the original layout.


def original_layout(pipeline: StableDiffusionXLPipeline) -> Tensors:
    """A single file's tensors. What diffusers loads from them says whether this is right."""
    from fulgurite.weights import original

    parts = [
        (pipeline.unet, lambda names: original.unet_keys(names, small.UNET)),
        (pipeline.vae, lambda names: original.vae_keys(names, small.VAE)),
        (pipeline.text_encoder, lambda names: original.text_keys(names, small.FIRST, second=False)),
        (pipeline.text_encoder_2, lambda names: original.text_keys(names, small.SECOND, second=True)),
    ]
    found: dict[str, list[Tensor]] = {}
    for network, keys_of in parts:
        tensors = small.published_names(network)
        for ours, (theirs, _) in keys_of(sorted(tensors, key=qkv_order)).items():
            found.setdefault(theirs, []).append(tensors[ours])
    whole = {name: torch.cat(pieces) for name, pieces in found.items()}
    for name, tensor in whole.items():
        if ".mid.attn_1." in name and tensor.ndim == 2:
            whole[name] = tensor[:, :, None, None].contiguous()
    projection = "conditioner.embedders.1.model.text_projection"
    whole[projection] = whole[projection].t().contiguous()
    return whole


def qkv_order(name: str) -> tuple[str, int]:
    """Query, key, value: as open_clip fuses them."""
    for i, letter in enumerate("qkv"):
        name = name.replace(f".{letter}_proj.", f".{i}_proj.")
    return name, 0


LEFTOVERS = {
    "model_ema.decay": torch.tensor(0.9999),
    "alphas_cumprod": torch.ones(1000),
    "denoiser.sigmas": torch.ones(1000),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "conditioner.embedders.1.model.logit_scale": torch.tensor(100.0),
    "first_stage_model.loss.logvar": torch.tensor(0.0),
}


@pytest.fixture(scope="module")
def single_file(pipeline, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("single") / "sdxl_lightning_4step.safetensors"
    save_file(original_layout(pipeline) | LEFTOVERS, path)
    return path


def test_diffusers_loads_the_single_file_that_we_load(single_file, folder, pipeline):
    oracle = StableDiffusionXLPipeline.from_single_file(single_file, config=str(folder), local_files_only=True)
    networks = load(small.local_card(single_file, tokenizers=folder))
    assert_all_equal(networks, oracle)
    assert_all_equal(networks, pipeline)


def test_both_draw_the_same_latents_from_it(single_file, folder):
    """The whole way through the text encoders and the UNet, since equal tensors may still be used differently."""
    oracle = StableDiffusionXLPipeline.from_single_file(single_file, config=str(folder), local_files_only=True)
    networks = load(small.local_card(single_file, tokenizers=folder))
    prompt = "a red fox" * 30
    with torch.inference_mode():
        context, _, pooled, _ = oracle.encode_prompt(prompt, do_classifier_free_guidance=False)
        states = [
            encoder(tokenizer([prompt]))
            for tokenizer, encoder in zip(networks.tokenizers, networks.text_encoders, strict=True)
        ]
        torch.testing.assert_close(torch.cat([states[0][0], states[1][0]], dim=-1), context, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states[1][1], pooled, atol=1e-5, rtol=1e-5)


def test_a_single_file_with_lightnings_unet_and_another_vae(single_file, folder, pipeline, tmp_path):
    unet, vae = small.roughened(small.oracle_unet(small.UNET), 7), small.roughened(small.oracle_vae(small.VAE), 8)
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    files = {"unet_file": tmp_path / "unet.safetensors", "vae_file": tmp_path / "vae.safetensors"}
    networks = load(small.local_card(single_file, tokenizers=folder, **files))
    assert_equal(networks.unet, unet)
    assert_equal(networks.vae, vae)
    assert_equal(networks.text_encoders[1], pipeline.text_encoder_2)


def test_a_unet_without_attention_at_an_upsampled_level(tmp_path):
    """There the upsampler has another number in its block; SDXL's own UNet has only the other kind."""
    from fulgurite.weights import original

    config = replace(small.UNET, transformer_layers_per_block=(0, 0, 1))
    oracle = small.roughened(small.oracle_unet(config))
    keys = original.unet_keys(list(oracle.state_dict()), config)
    tensors = {theirs: oracle.state_dict()[ours].clone() for ours, (theirs, _) in keys.items()}
    assert len(tensors) == len(keys)
    save_file(tensors, tmp_path / "unet.safetensors")
    oracle.save_config(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_single_file(
        tmp_path / "unet.safetensors", config=str(tmp_path), subfolder="unet", local_files_only=True
    )
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, oracle.state_dict()[name]), name


# Fast decoders.


def test_a_fast_decoder_beside_the_vae_or_in_a_file_of_its_own(folder, tmp_path):
    """The encoder's half of the published file is left out."""
    oracle = small.roughened(small.oracle_fast_decoder(small.FAST))
    path = published(folder, tmp_path)
    assert load(small.local_card(path)).fast_decoder is None
    oracle.save_pretrained(path / "fast_decoder")
    file = path / "fast_decoder/diffusion_pytorch_model.safetensors"
    assert any(name.startswith("encoder.") for name in load_file(file))
    latents = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    wanted = oracle.decode(latents, return_dict=False)[0]
    for card in (small.local_card(path), small.local_card(folder, fast_decoder_file=file)):
        decoder = load(card).fast_decoder
        assert len(decoder.state_dict()) == sum(name.startswith("decoder.") for name in load_file(file))
        torch.testing.assert_close(decoder(latents), wanted, atol=1e-5, rtol=1e-5)
    assert load(replace(small.local_card(path), fast_decoder=None)).fast_decoder is None


def test_pixels_come_of_the_fast_decoder_as_diffusers_makes_them(folder, pipeline, tmp_path):
    """The latents that the two decoders are given differ by the VAE's scale."""
    oracle = small.roughened(small.oracle_fast_decoder(small.FAST))
    path = published(folder, tmp_path)
    oracle.save_pretrained(path / "fast_decoder")
    draw = Pipeline(small.local_card(path), load(small.local_card(path)))
    row = draw.start(Request("a red fox", width=256, height=256, num_steps=1, seed=1, decoder="fast"), draw.encode)
    row.x = torch.randn(row.x.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pixels = oracle.decode(row.x[None] / oracle.config.scaling_factor, return_dict=False)[0]
    [wanted] = pipeline.image_processor.postprocess(pixels, output_type="np") * 255
    assert abs(np.asarray(draw.finish(row).image) - wanted).max() <= 0.5 + 1e-3


def test_without_a_fast_decoder_its_pictures_are_refused(folder):
    draw = Pipeline(small.local_card(folder), load(small.local_card(folder)))
    with pytest.raises(WeightsError, match="without a fast decoder: put it into the folder fast_decoder"):
        draw("a red fox", decoder="fast")
    none = Pipeline(replace(small.local_card(folder), fast_decoder=None), draw.networks)
    with pytest.raises(RequestError, match=r"decoder: .* has no 'fast' one, only 'full'"):
        none("a red fox", decoder="fast")


# LoRA.

LORA_MODULES = (
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.0.time_emb_proj",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.upsamplers.0.conv",
    "up_blocks.2.resnets.2.conv2",
)


def low_rank(weight: Tensor, seed: int, rank: int = 4) -> tuple[Tensor, Tensor]:
    """A random change's two halves, of a matrix or of a convolution."""
    generator = torch.Generator().manual_seed(seed)
    pixel = [1] * (weight.ndim - 2)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.1
    return down, torch.randn(weight.shape[0], rank, *pixel, generator=generator) * 0.1


def peft_names(module: str) -> tuple[str, str, str]:
    return f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight", ""


def older_diffusers_names(module: str) -> tuple[str, str, str]:
    return f"unet.{module}.lora.down.weight", f"unet.{module}.lora.up.weight", ""


def kohya_names(module: str) -> tuple[str, str, str]:
    base = "lora_unet_" + module.replace(".", "_")
    return f"{base}.lora_down.weight", f"{base}.lora_up.weight", f"{base}.alpha"


def kohya_original_names(module: str) -> tuple[str, str, str]:
    from fulgurite.weights import original

    return kohya_names(original.translated(module, original.unet_modules(small.UNET)))


def lora_tensors(unet: nn.Module, names: Callable[[str], tuple[str, str, str]]) -> Tensors:
    tensors, weights = {}, unet.state_dict()
    for i, module in enumerate(LORA_MODULES):
        down_name, up_name, alpha_name = names(module)
        tensors[down_name], tensors[up_name] = low_rank(weights[f"{module}.weight"], seed=i)
        if alpha_name:
            tensors[alpha_name] = torch.tensor(2.0)
    return tensors


ALL_NAMES = [peft_names, older_diffusers_names, kohya_names, kohya_original_names]


@pytest.mark.parametrize("names", ALL_NAMES, ids=lambda names: names.__name__)
def test_a_lora_merges_as_diffusers_fuses_it(folder, tmp_path, names):
    oracle = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    before = {name: tensor.clone() for name, tensor in oracle.unet.state_dict().items()}
    path = tmp_path / "sdxl_lightning_4step_lora.safetensors"
    save_file(lora_tensors(oracle.unet, names), path)
    oracle.load_lora_weights(path)
    oracle.fuse_lora()
    oracle.unload_lora_weights()
    changed = [name for name, tensor in oracle.unet.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(LORA_MODULES)

    networks = load(small.local_card(folder, lora_file=path))
    assert_equal(networks.unet, oracle.unet, atol=1e-6)
    assert_equal(networks.vae, oracle.vae)


def test_every_change_has_its_own_alpha(folder, pipeline, tmp_path):
    """Against the definition: diffusers loses those of attention layers that differ from the rest."""
    path, tensors = tmp_path / "lora.safetensors", lora_tensors(pipeline.unet, kohya_names)
    for i, module in enumerate(LORA_MODULES):
        tensors[kohya_names(module)[2]] = torch.tensor(float(i))
    save_file(tensors, path)
    found, before = load(small.local_card(folder, lora_file=path)).unet.state_dict(), pipeline.unet.state_dict()
    for i, module in enumerate(LORA_MODULES):
        weight = before[f"{module}.weight"]
        down, up = low_rank(weight, seed=i)
        wanted = weight + i / 4 * torch.einsum("or,r...->o...", up.flatten(1), down)
        torch.testing.assert_close(found[f"{module}.weight"], wanted, atol=1e-6, rtol=1e-6)


def test_a_lora_on_a_single_file_in_half_precision(single_file, folder, pipeline, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(lora_tensors(pipeline.unet, kohya_names), path)
    card = small.local_card(single_file, tokenizers=folder, lora_file=path)
    half, full = load(card, torch.float16).unet.state_dict(), load(card).unet.state_dict()
    for name, tensor in half.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, full[name].half()), name


def test_the_alpha_of_an_adapters_header_counts(folder, pipeline, tmp_path):
    """Newer diffusers writes it there, once for all changes."""
    path, plain = tmp_path / "lora.safetensors", tmp_path / "plain.safetensors"
    tensors = lora_tensors(pipeline.unet, peft_names)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.r": 4})})
    save_file({name: t * (0.5 if "lora_B" in name else 1) for name, t in tensors.items()}, plain)
    found = load(small.local_card(folder, lora_file=path)).unet.state_dict()
    for name, tensor in load(small.local_card(folder, lora_file=plain)).unet.state_dict().items():
        torch.testing.assert_close(found[name], tensor)
