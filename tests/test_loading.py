"""What the engine keeps: checkpoints within a budget, batch sizes that are proven, encoded prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_sdxl as small
import torch
from conftest import LIGHTNING, PRECISIONS, needs_weights
from safetensors.torch import load_file, save_file
from torch import nn

from fulgurite import Pipeline
from fulgurite.cards import card
from fulgurite.engine import Loader
from fulgurite.engine.batches import Batches
from fulgurite.engine.cache import PromptCache
from fulgurite.engine.loading import check_gpu_settings, held_bytes, published_bytes, usable_precision
from fulgurite.errors import FulguriteError
from fulgurite.kernels import cpu, float8
from fulgurite.kernels.fused import fuse
from fulgurite.kernels.nvidia import why_not_triton
from fulgurite.models import UNet
from fulgurite.pipeline import usual_dtype
from fulgurite.settings import Settings, read_settings
from fulgurite.weights import Networks, load
from fulgurite.weights.networks import Base

SPARK_LIGHTNING = "fulgurite/spark-lightning"
ONE = published_bytes(card(LIGHTNING).unet, torch.float16)


def test_larger_batches_are_used_once_they_are_proven() -> None:
    asked: list[list[int]] = []

    def agrees(parts: Sequence[int]) -> bool:
        asked.append(list(parts))
        return sum(parts) <= 6

    batches = Batches(1, 16, exact=True)
    assert [batches.size_for(rows, agrees) for rows in (1, 2, 3, 5)] == [1, 2, 3, 6]
    assert asked == [[1, 1], [2, 1], [3, 1], [4, 2]]
    assert (batches.size_for(16, agrees), batches.capacity) == (6, 6)  # 8 is not right, so nothing larger is tried
    assert batches.smaller(6)
    assert batches.capacity == 4
    assert [Batches(2, 16, exact=True).size_for(rows, lambda parts: True) for rows in (1, 3, 9)] == [2, 4, 12]
    assert Batches(1, 16, exact=False).size_for(5, agrees) == 5


def test_the_cache_of_prompts_is_bounded_in_bytes() -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(prompt)
        return torch.zeros(10), torch.zeros(15)  # 100 bytes

    cache = PromptCache(250)
    for prompt in "aababcabc":
        cache.get("model", encode, prompt)
    assert encoded == list("abcabc")
    assert cache.hits == 3
    assert cache.bytes == 200


class Sized(nn.Module):
    """A network of so many bytes, none of which is there."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.empty(size, dtype=torch.uint8, device="meta")


class Kept:
    """A loaded pipeline without weights: its steps, and of which base its UNet is a LoRA."""

    def __init__(self, model: str, steps: int, like: Networks | None, base: torch.Tensor | None, size: int) -> None:
        shared = Base(Path("unet"), {"w": base}) if base is not None else None
        if like and like.base:
            shared = like.base
        self.card, self.steps, self.like = card(model), steps, like
        self.networks = Networks((), (), Sized(size), Sized(0), "v", shared)  # type: ignore[arg-type]


def fake_loads(monkeypatch: pytest.MonkeyPatch, base: torch.Tensor | None = None, size: int = ONE) -> list[int]:
    """Pipelines are such from now on, their UNets of this size; the steps of those that are loaded."""
    loaded: list[int] = []

    def pretend(model: str, *, steps: int, like: Networks | None, **_: Any) -> Kept:
        loaded.append(steps)
        return Kept(model, steps, like, base, size)

    monkeypatch.setattr(Pipeline, "load", pretend)
    return loaded


def loader_of(unets: float) -> Loader:
    """One with room for so many of SDXL's UNets."""
    loader = Loader("cpu", most_bytes=int(unets * ONE))
    loader.dtype = torch.float16
    return loader


def test_the_loader_keeps_unets_within_its_bytes_and_shares_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fake_loads(monkeypatch)
    loader = loader_of(1.9)
    first = loader(LIGHTNING, 20)
    assert first is loader(LIGHTNING, 8)
    assert loader.switch_seconds(LIGHTNING, 8) == 0 < loader.switch_seconds(LIGHTNING, 4)
    second = loader(LIGHTNING, 5)
    assert loader.switch_seconds(LIGHTNING, 8) > 0 == loader.switch_seconds(LIGHTNING, 4)
    assert loaded == [20, 5]
    like = second.like  # type: ignore[attr-defined]
    assert like.vae is first.networks.vae
    assert like.unet is None  # which went to make room


def test_the_least_recently_used_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fake_loads(monkeypatch)
    loader = loader_of(2.5)
    for steps in (1, 2, 1, 4, 1, 2):
        loader(LIGHTNING, steps)
    assert loaded == [1, 2, 4, 2]


def test_unets_that_kernels_made_smaller_count_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fake_loads(monkeypatch, size=ONE // 2)
    loader = loader_of(1.7)
    for steps in (1, 2, 4, 1, 2, 4):
        loader(LIGHTNING, steps)
    assert loaded == [1, 2, 4]


def test_of_a_network_all_is_counted_that_its_layers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "LEAST", 64 * 64)
    with torch.inference_mode():
        network = UNet(small.UNET).bfloat16()
        published = held_bytes(network)
        fuse(network)
        assert held_bytes(network) == published == published_bytes(small.UNET, torch.bfloat16)
        float8.accelerate(network)
        rounded = [layer for layer in network.modules() if isinstance(layer, float8.Float8Linear)]
        saved = sum(layer.weight.numel() - 4 * layer.scale.numel() for layer in rounded)  # a byte each, less the scales
        assert saved > published / 10
        assert held_bytes(network) == published - saved
        packed = UNet(small.UNET)
        cpu.accelerate(packed)
        assert held_bytes(packed) >= 2 * published  # though packed weights are no parameters; some are there twice


@pytest.mark.parametrize(("room", "checkpoints", "has_base"), [(1.5, 1, False), (2.5, 1, True), (3.5, 2, True)])
def test_what_loras_change_stays_beside_them_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch, room: float, checkpoints: int, has_base: bool
) -> None:
    base = torch.empty(ONE, dtype=torch.uint8, device="meta")  # not of a CPU's memory
    fake_loads(monkeypatch, base)
    loader = loader_of(room)
    kept = [loader(LIGHTNING, steps) for steps in (1, 2, 4)]
    assert sum(loader.switch_seconds(LIGHTNING, steps) == 0 for steps in (1, 2, 4)) == checkpoints
    assert (kept[-1].networks.base is not None) == has_base
    loader.drop_others(LIGHTNING, 4)
    assert kept[-1].networks.base is None


def test_a_lora_is_never_merged_into_another_checkpoint(tmp_path: Path) -> None:
    """A card may have a UNet for each number of steps and one LoRA for them all."""
    folder = small.saved_pipeline(tmp_path)
    [file] = (folder / "unet").glob("*.safetensors")
    unets = {"4": str(file), "8": str(tmp_path / "eight.safetensors")}
    eight = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(eight, unets["8"])
    down, up = (f"unet.mid_block.attentions.0.proj_in.lora_{side}.weight" for side in "AB")
    width = eight["mid_block.attentions.0.proj_in.weight"].shape[0]
    save_file({down: torch.ones(1, width), up: torch.ones(width, 1)}, tmp_path / "style.safetensors")
    of_model = small.local_card(folder, lora_file=tmp_path / "style.safetensors")
    of_model = replace(of_model, weights=replace(of_model.weights, unets=unets))
    four = load.load_networks(of_model, 4, "cpu", torch.float32)
    again = load.load_networks(of_model, 8, "cpu", torch.float32, like=four)
    assert torch.equal(again.unet.state_dict()["conv_in.bias"], eight["conv_in.bias"])
    assert load.load_networks(of_model, 8, "cpu", torch.float32, like=again).base is again.base


@needs_weights
def test_a_lora_checkpoint_that_went_comes_back_without_reading_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    unmerged = load.unet_tensors

    def noted(path: Path, *rest: Any) -> dict[str, torch.Tensor]:
        read.append(path.name)
        return unmerged(path, *rest)

    monkeypatch.setattr(load, "unet_tensors", noted)
    monkeypatch.setattr(Pipeline, "accelerate", lambda *_: None)  # after which weights cannot be looked at
    loader = Loader("cpu", most_bytes=1)  # nothing stays but what is in use
    before = weights_of(loader(SPARK_LIGHTNING, 4).networks.unet)
    other = weights_of(loader(SPARK_LIGHTNING, 1).networks.unet)
    again = weights_of(loader(SPARK_LIGHTNING, 4).networks.unet)
    assert len(read) == 1 + 2  # with so little room even what is shared goes
    roomy = Loader("cpu")
    pipelines = [roomy(SPARK_LIGHTNING, steps) for steps in (1, 2, 4, 8)]
    assert len(read) == 3 + 1
    assert len({id(pipeline.networks.base) for pipeline in pipelines}) == 1
    assert len({id(pipeline.networks.vae) for pipeline in pipelines}) == 1
    assert torch.equal(before, again)
    assert torch.equal(before, weights_of(pipelines[2].networks.unet))
    assert not torch.equal(before, other)


def weights_of(unet: UNet) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in unet.parameters()])


def test_what_the_machine_lacks_is_an_error_that_says_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULGURITE_DEVICE", "abacus")
    with pytest.raises(FulguriteError, match=r"^FULGURITE_DEVICE: cannot compute on 'abacus' here"):
        Loader.from_settings(read_settings())
    with pytest.raises(FulguriteError, match=r"^--device: cannot compute on 'sundial' here"):
        Loader.from_settings(read_settings(device="sundial"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(FulguriteError) as caught:
        Loader.from_settings(read_settings(device="foo"))
    assert str(caught.value) == (
        "--device: cannot compute on 'foo' here: that is no device's name. There are: cpu, cuda:0, cuda:1."
    )
    with pytest.raises(FulguriteError, match=r"^--precision: float16 needs a GPU"):
        Loader.from_settings(read_settings(device="cpu", precision="float16"))


def test_where_the_system_does_not_tell_its_memory_a_setting_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sysconf")  # as on Windows
    with pytest.raises(FulguriteError, match="FULGURITE_UNET_GB is needed"):
        Loader.from_settings(read_settings(device="cpu"))
    assert Loader.from_settings(read_settings(device="cpu", unet_gb=1)).device == "cpu"


@needs_weights
@pytest.mark.parametrize("precision", PRECISIONS)
def test_networks_are_in_the_precision_that_is_asked_for(precision: str) -> None:
    loader = Loader("cpu", precision=precision)
    assert loader.precision == precision
    bias = loader(SPARK_LIGHTNING, 4).networks.unet.unet.conv_in.bias  # weights are packed
    assert bias.dtype == (usual_dtype("cpu") if precision == "int8" else getattr(torch, precision))


@pytest.mark.parametrize(
    ("precision", "device"), [("int8", "cuda"), ("int8", "mps"), ("float16", "cpu"), ("float8", "cpu")]
)
def test_a_precision_that_the_device_lacks_is_an_error_that_names_both(precision: str, device: str) -> None:
    with pytest.raises(FulguriteError, match=f"precision: {precision} needs a .PU"):
        usable_precision(precision, device)


def test_a_gpu_is_asked_whether_it_multiplies_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert usable_precision("float8", "cuda:1") == (torch.bfloat16, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    wanted = "float8 needs a GPU of NVIDIA's, Ada, Hopper or newer, and this one is "
    with pytest.raises(FulguriteError, match=wanted + "older"):
        usable_precision("float8", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's
    with pytest.raises(FulguriteError, match=wanted + "not"):
        usable_precision("float8", "cuda")


def test_why_a_device_does_not_draw_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not here, whose kernels cannot be compiled then."""
    assert why_not_triton("cpu") == "they need an NVIDIA GPU, and the device is 'cpu'"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why_not_triton.cache_clear()
    assert why_not_triton("cuda:7") == "they need a GPU of Ampere's generation or newer"
    with pytest.raises(FulguriteError, match="triton_kernels: they need a GPU of Ampere's"):
        check_gpu_settings(Settings(triton_kernels=True), "cuda:7")
    with pytest.raises(FulguriteError, match="cuda_graphs: they need an NVIDIA GPU; the device is 'cpu'"):
        check_gpu_settings(Settings(cuda_graphs=True), "cpu")
    pytest.importorskip("triton", reason="it is only made for Linux")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    why_not_triton.cache_clear()
    assert why_not_triton("cuda:7").startswith("one was tried and failed with ")
    why_not_triton.cache_clear()


@needs_weights
def test_a_processor_without_instructions_for_bfloat16_draws_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    assert usable_precision("auto", "cpu") == (torch.float32, False)
    with pytest.raises(FulguriteError, match=r"bfloat16 needs a CPU that multiplies it .* and this one does not"):
        usable_precision("bfloat16", "cpu")
    asked = Pipeline.load(SPARK_LIGHTNING, steps=1, dtype=torch.bfloat16)  # slow there, but it draws
    layers = {type(layer) for layer in asked.networks.unet.modules()}
    assert torch.nn.Conv2d in layers
    assert cpu.PackedConv2d not in layers


def test_a_processor_without_instructions_for_int8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(FulguriteError, match="int8 needs a CPU with AVX-512 VNNI, and this one has none"):
        usable_precision("int8", "cpu")
