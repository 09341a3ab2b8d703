"""Checkpoints that are damaged, of another model, or dangerous: each refused by name, in one line."""

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import small_sdxl as small
import torch
from safetensors.torch import load_file, save_file
from test_weights import LEFTOVERS, kohya_names, lora_tensors, original_layout

from fulgurite.errors import NotPulledError, WeightsError
from fulgurite.weights import load_networks
from fulgurite.weights.files import read


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = small.saved_pipeline(tmp_path_factory.mktemp("made"))
    small.oracle_fast_decoder(small.FAST).save_pretrained(path / "fast_decoder")
    return path


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A good model, of which each test breaks its own copy."""
    return Path(shutil.copytree(made, tmp_path / "sdxl"))


def refusal(folder: Path, kind: type[Exception] = WeightsError, **files: object) -> str:
    """What the loader says of a model that it must not load."""
    with pytest.raises(kind) as caught:
        load_networks(small.local_card(folder, **files), 4, "cpu", torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    return message


NETWORKS = {
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "fast_decoder": "fast_decoder/diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("path", NETWORKS.values(), ids=NETWORKS)
def test_a_missing_tensor_is_named(folder, path):
    tensors = load_file(folder / path)
    gone = sorted(tensors)[5]
    del tensors[gone]
    save_file(tensors, folder / path)
    message = refusal(folder)
    assert str(folder / path) in message
    assert f"1 missing tensor(s): {'text_model.' if path.startswith('text_encoder/') else ''}{gone}" in message


@pytest.mark.parametrize("path", NETWORKS.values(), ids=NETWORKS)
def test_an_unexpected_tensor_is_named(folder, path):
    save_file(load_file(folder / path) | {"text_of_another": torch.zeros(1)}, folder / path)
    message = refusal(folder)
    assert str(folder / path) in message
    assert "1 unexpected tensor(s): text_of_another" in message


@pytest.mark.parametrize("path", NETWORKS.values(), ids=NETWORKS)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder, path):
    tensors = load_file(folder / path)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.ndim > 1)
    shape = list(tensors[name].shape)
    larger = [shape[0] + 3, *shape[1:]]
    tensors[name] = torch.zeros(larger)
    save_file(tensors, folder / path)
    assert f"{name} {larger} where {shape} is wanted" in refusal(folder)


def test_many_problems_are_counted_and_the_first_named(folder):
    path = folder / NETWORKS["unet"]
    save_file({f"odd.{i}": torch.zeros(1) for i in range(10)}, path)
    message = refusal(folder)
    assert "10 unexpected tensor(s): odd.0, odd.1, odd.2, ..." in message
    count = len(load_file(folder.parent / "sdxl" / NETWORKS["unet"]))
    assert count == 10
    assert re.search(r"does not fit the UNet: \d{3} missing tensor\(s\): \S+, \S+, \S+, \.\.\.;", message)


def test_quantized_tensors_are_refused(folder):
    path = folder / NETWORKS["unet"]
    whole = load_file(path)
    save_file(whole | {"conv_in.bias": torch.zeros(32, dtype=torch.int8)}, path)
    assert "conv_in.bias of torch.int8" in refusal(folder)
    scaled = {"conv_in.bias": torch.zeros(32).to(torch.float8_e4m3fn), "conv_in.scale_bias": torch.ones(1)}
    save_file(whole | scaled, path)
    assert "conv_in.scale_bias" in refusal(folder)


def test_the_file_of_another_network(folder):
    shutil.copy(folder / NETWORKS["vae"], folder / NETWORKS["unet"])
    message = refusal(folder)
    assert "does not fit the UNet" in message
    assert str(folder / NETWORKS["unet"]) in message


# Damage.


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / NETWORKS["unet"]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    message = refusal(folder)
    assert str(path) in message
    assert "damaged" in message


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 4096, b"<!DOCTYPE html><html>", (8).to_bytes(8, "little") + b"{broken}", b"version https://git-lfs"],
    ids=["bytes", "html", "header", "pointer"],
)
def test_what_is_no_safetensors_file_is_named(folder, data):
    path = folder / NETWORKS["vae"]
    path.write_bytes(data)
    message = refusal(folder)
    assert str(path) in message
    assert "damaged" in message


def test_a_pickle_that_calls_itself_safetensors_is_not_run(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (folder / NETWORKS["vae"]).write_bytes(pickle.dumps(Bomb()))
    assert "damaged" in refusal(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.pt", "model.pth"])
def test_pickles_are_refused_with_a_sentence(folder, tmp_path, name):
    path = tmp_path / name
    torch.save({}, path)
    for message in (refusal(path, tokenizers=folder), refusal(folder, unet_file=path)):
        assert message == f"{path} is a pickle, which can run any code when it is opened: only safetensors is read."


def test_a_folder_with_only_pickles_is_refused_with_the_same_sentence(folder):
    (folder / NETWORKS["unet"]).rename(folder / "unet/diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin is a pickle" in refusal(folder)


@pytest.mark.parametrize("path", NETWORKS.values(), ids=NETWORKS)
def test_a_missing_file_names_its_folder(folder, path):
    (folder / path).unlink()
    assert str((folder / path).parent) in refusal(folder)


def test_a_path_that_is_not_there(folder, tmp_path):
    wanted = "the path in bytedance/stable-diffusion-xl-lightning's card should name its weights."
    for gone in (tmp_path / "gone", tmp_path / "gone.safetensors"):
        with pytest.raises(WeightsError) as caught:
            load_networks(small.local_card(gone), 4, "cpu", torch.float32)
        assert not isinstance(caught.value, NotPulledError)
        assert str(caught.value) == f"{gone} does not exist: {wanted}"
    assert refusal(folder, unet_file=tmp_path / "gone") == f"There is no file {tmp_path}/gone."
    assert str(tmp_path / "lora.safetensors") in refusal(folder, lora_file=tmp_path / "lora.safetensors")


@pytest.mark.parametrize("name", ["whole.safetensors", "shards.safetensors.index.json"])
def test_what_cannot_be_opened_is_not_called_damaged(folder, tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    assert refusal(folder, unet_file=path) == f"Cannot read {path}: Is a directory."


@pytest.mark.parametrize("name", ["whole.safetensors", "shards.safetensors.index.json"])
def test_what_may_not_be_read_is_not_called_damaged(folder, tmp_path, monkeypatch, name):
    """Root, as whom tests may run, reads everything: so the system's answer is ours."""
    path, as_it_is = tmp_path / name, Path.open

    def forbidden(self, *args, **options):
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return as_it_is(self, *args, **options)

    save_file({}, path)
    monkeypatch.setattr(Path, "open", forbidden)
    assert refusal(folder, unet_file=path) == f"Cannot read {path}: Permission denied."


@pytest.mark.parametrize("left", [0, 1])
def test_too_many_open_files_are_not_called_damage(folder, left):
    """Of two that are needed: one for safetensors, one for torch to map the weights."""
    resource = pytest.importorskip("resource")
    bounds, next_file = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(next_file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file + left, bounds[1]))
    try:
        with pytest.raises(WeightsError) as caught:
            read(folder / NETWORKS["unet"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, bounds)
    assert re.match(rf"Cannot read {folder / NETWORKS['unet']}: .*Too many open files", str(caught.value))


@pytest.mark.parametrize("index", ["not json", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "gone"}}'])
def test_a_damaged_index_of_shards(folder, index):
    (folder / NETWORKS["unet"]).unlink()
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    assert str(folder / "unet") in refusal(folder)


# Tokenizers.


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_part_of_a_tokenizer(folder, name):
    (folder / "tokenizer" / name).unlink()
    assert refusal(folder) == f"There is no file {folder}/tokenizer/{name}."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", "not json"),
        ("vocab.json", "[1, 2]"),
        ("vocab.json", '{"a": 0}'),
        ("merges.txt", "one two three"),
        ("merges.txt", "not-in the-vocabulary"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"pad_token": "not in the vocabulary"}'),
    ],
)
def test_a_damaged_tokenizer_is_named(folder, name, text):
    (folder / "tokenizer_2" / name).write_text(text)
    assert f"The tokenizer in {folder}/tokenizer_2 cannot be read" in refusal(folder)


def test_the_tokenizer_of_another_model(folder):
    vocab = json.loads((folder / "tokenizer/vocab.json").read_text())
    vocab["<|endoftext|>"] = len(vocab)
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocab))
    assert "is not this model's: its text must end with token 599, not 600" in refusal(folder)


# Whole single files.


@pytest.fixture
def single(made, tmp_path) -> tuple[dict[str, torch.Tensor], Path]:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(made, add_watermarker=False)
    return original_layout(pipeline) | LEFTOVERS, tmp_path / "whole.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
    ],
)
def test_single_files_are_held_to_the_same(single, made, name):
    """Problems are told under the names that the file has."""
    tensors, path = single
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    assert f"1 missing tensor(s): {name}" in refusal(path, tokenizers=made)

    for shape in ((5,), (5, 7), (2, 2, 2)):
        save_file(tensors | {name: torch.zeros(shape)}, path)
        assert f"{name} {list(shape)}" in refusal(path, tokenizers=made)

    save_file(tensors | {f"{name}.more": torch.zeros(3)}, path)
    assert f"1 unexpected tensor(s): {name}.more" in refusal(path, tokenizers=made)


@pytest.mark.parametrize("name", ["v_pred", "cond_stage_model.model.ln_final.weight", "lora_unet_conv_in.alpha"])
def test_tensors_of_no_network_are_unexpected(single, made, name):
    tensors, path = single
    save_file(tensors | {name: torch.zeros(1)}, path)
    assert f"1 unexpected tensor(s): {name}" in refusal(path, tokenizers=made)


def test_a_single_file_without_tokenizers(single, monkeypatch, tmp_path):
    tensors, path = single
    save_file(tensors, path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "single file holds no tokenizers" in refusal(path, NotPulledError)


# LoRA.


@pytest.fixture
def change(made, tmp_path):
    """Writes a LoRA with something added or taken away."""
    from diffusers import UNet2DConditionModel

    tensors = lora_tensors(UNet2DConditionModel.from_pretrained(made / "unet"), kohya_names)

    def write(without: str = "", metadata: dict[str, str] | None = None, **more: torch.Tensor) -> Path:
        path = tmp_path / "lora.safetensors"
        save_file({name: t for name, t in (tensors | more).items() if name != without}, path, metadata)
        return path

    return write


def test_a_lora_for_what_the_unet_has_not(made, change):
    path = change(**{"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(4, 4)})
    message = refusal(made, lora_file=path)
    assert message == (
        f"{path} does not fit the UNet: "
        "1 unexpected tensor(s): lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight."
    )


def test_half_a_pair(made, change):
    message = refusal(made, lora_file=change(without="lora_unet_conv_in.lora_up.weight"))
    assert "2 unexpected tensor(s): lora_unet_conv_in.alpha, lora_unet_conv_in.lora_down.weight" in message


@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (3, 4, 3, 3), (4,), (0, 4, 3, 3)])
def test_a_change_of_another_shape(made, change, shape):
    path = change(**{"lora_unet_conv_in.lora_down.weight": torch.zeros(shape)})
    assert "1 change(s) of another shape: lora_unet_conv_in" in refusal(made, lora_file=path)


def test_an_alpha_that_is_no_number(made, change):
    path = change(**{"lora_unet_conv_in.alpha": torch.ones(2)})
    assert "1 change(s) of another shape: lora_unet_conv_in" in refusal(made, lora_file=path)


@pytest.mark.parametrize("header", ["{", "3", "[1]"])
def test_adapter_settings_that_cannot_be_read(made, change, header):
    path = change(metadata={"lora_adapter_metadata": header})
    assert "adapter settings" in refusal(made, lora_file=path)


def test_other_kinds_of_lora(made, change):
    dora = {"lora_unet_conv_in.dora_scale": torch.zeros(32)}
    assert "lora_unet_conv_in.dora_scale" in refusal(made, lora_file=change(**dora))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True})}
    assert "its use_rslora is set" in refusal(made, lora_file=change(metadata=metadata))


def test_an_empty_lora(made, tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert refusal(made, lora_file=tmp_path / "empty.safetensors") == f"{tmp_path}/empty.safetensors holds no changes."
