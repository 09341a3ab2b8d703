"""A model's files to its networks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fulgurite.cards import Card
from fulgurite.errors import WeightsError
from fulgurite.models import VAE, CLIPTextConfig, CLIPTextEncoder, TinyDecoder, TinyDecoderConfig, Tokenizer, UNet
from fulgurite.weights import hub, lora, original
from fulgurite.weights.files import Files, folder_files, read, tokenizer_folders
from fulgurite.weights.fit import filled, fitted
from fulgurite.weights.networks import Base, Networks

Network = TypeVar("Network", bound=nn.Module)

# What diffusers once called the VAE's attention, and some files still do.
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

ENCODER = "encoder."  # the other half of a tiny autoencoder's file


def new_vae_name(name: str) -> str:
    for old, new in OLD_VAE_NAMES.items():
        name = name.replace(old, new)
    return name


def full_text_name(name: str) -> str:
    """transformers 5 writes the first encoder's names without their first part."""
    return name if name.startswith("text_") else f"text_model.{name}"


def load_networks(
    card: Card,
    steps: int,
    device: str,
    dtype: torch.dtype,
    like: Networks | None = None,
    kept: torch.dtype | None = None,
) -> Networks:
    """A card's networks, with the UNet for a schedule of ``steps`` where the model has one for each.

    All but the UNet are taken from ``like``, the same model's networks for another schedule, where there are; and
    what a LoRA is merged into, so that the next LoRA costs its own small file and no reading of the large one.
    ``kept``: what the UNet and the text encoders are in, where it is not ``dtype``.
    Raises NotPulledError where the hub's files are not on this machine, and WeightsError where they do not fit.
    """
    return load_files(locate(card, steps), card, device, dtype, like, kept)


def load_folder(folder: Path, card: Card, device: str, dtype: torch.dtype) -> Networks:
    """Networks from a folder as diffusers publishes it. Raises WeightsError."""
    return load_files(folder_files(folder), card, device, dtype)


def locate(card: Card, steps: int) -> Files:
    """Where a card's weights are on this machine. Raises WeightsError, NotPulledError where they are the hub's."""
    weights = card.weights
    if weights.source == "hub":
        return hub.cached_files(card, steps)
    loras = [change for change in (weights.lora_file, weights.loras.get(str(steps))) if change]
    if weights.source == "embedded":
        inside = Path(str(resources.files("fulgurite") / "embedded"))
        return replace(folder_files(inside / weights.path), loras=tuple(inside / change for change in loras))

    path, unet = Path(weights.path), weights.unets.get(str(steps)) or weights.unet_file
    if not path.exists():
        raise WeightsError(f"{path} does not exist: the path in {card.id}'s card should name its weights.")
    if path.is_dir():
        files = folder_files(path)
    elif weights.tokenizers:
        files = Files(tokenizer_folders(Path(weights.tokenizers)), (path, path), path, path)
    else:
        files = Files(hub.cached_tokenizers(card), (path, path), path, path)
    return Files(
        tokenizers=files.tokenizers,
        text_encoders=files.text_encoders,
        unet=Path(unet) if unet else files.unet,
        vae=Path(weights.vae_file) if weights.vae_file else files.vae,
        loras=tuple(Path(change) for change in loras),
        fast_decoder=Path(weights.fast_decoder_file) if weights.fast_decoder_file else files.fast_decoder,
    )


def load_files(
    files: Files,
    card: Card,
    device: str,
    dtype: torch.dtype,
    like: Networks | None = None,
    kept: torch.dtype | None = None,
) -> Networks:
    """Networks from their files, each in diffusers' or the original layout. Raises WeightsError."""
    base, kept = None, kept or dtype
    if files.loras:
        base = like.base if like and like.base and like.base.file == files.unet else None
        base = base or Base(files.unet, {name: t.to(device) for name, t in unet_tensors(files.unet, card).items()})
        unet = filled_unet(with_loras(base.tensors, files.loras, card, device, kept), card, device, kept)
    else:
        unet = load_unet(files.unet, card, device, kept)
    prediction = "x0" if files.predicts_x0 else card.prediction
    if like:
        return replace(like, unet=unet, prediction=prediction, base=base)
    first, second = card.text_encoders
    return Networks(
        tokenizers=(load_tokenizer(files.tokenizers[0], first), load_tokenizer(files.tokenizers[1], second)),
        text_encoders=(
            load_text_encoder(files.text_encoders[0], first, device, kept, second=False),
            load_text_encoder(files.text_encoders[1], second, device, kept, second=True),
        ),
        unet=unet,
        vae=load_vae(files.vae, card, device, dtype),
        prediction=prediction,
        base=base,
        fast_decoder=(
            load_fast_decoder(files.fast_decoder, card.fast_decoder, device, dtype)
            if files.fast_decoder and card.fast_decoder
            else None
        ),
    )


def load_tokenizer(folder: Path, config: CLIPTextConfig) -> Tokenizer:
    """The tokenizer in a folder, checked to be the text encoder's. Raises WeightsError."""
    try:
        tokenizer = Tokenizer.from_folder(folder, config.max_position_embeddings)
    except FileNotFoundError as error:
        raise WeightsError(f"There is no file {error.filename}.") from error
    except Exception as error:  # the library raises plain Exception for merges that are not in the vocabulary
        raise WeightsError(f"The tokenizer in {folder} cannot be read ({error}).") from error
    if tokenizer.end != config.eos_token_id:
        wanted = f"token {config.eos_token_id}, not {tokenizer.end}"
        raise WeightsError(f"The tokenizer in {folder} is not this model's: its text must end with {wanted}.")
    return tokenizer


def load_text_encoder(
    path: Path, config: CLIPTextConfig, device: str, dtype: torch.dtype, *, second: bool
) -> CLIPTextEncoder:
    network = on_meta(lambda: CLIPTextEncoder(config))
    keys = original.text_keys(list(network.state_dict()), config, second)
    filled(network, tensors_for(network, path, keys, original.TEXT_ENCODERS[second], full_text_name), device, dtype)
    return network


def load_unet(path: Path, card: Card, device: str, dtype: torch.dtype, loras: Sequence[Path] = ()) -> UNet:
    return filled_unet(with_loras(unet_tensors(path, card), loras, card, device, dtype), card, device, dtype)


def unet_tensors(path: Path, card: Card) -> dict[str, Tensor]:
    """A UNet's tensors as they are in their file."""
    network = on_meta(lambda: UNet(card.unet))
    keys = original.unet_keys(list(network.state_dict()), card.unet)
    return tensors_for(network, path, keys, original.UNET)


def with_loras(
    tensors: dict[str, Tensor], loras: Sequence[Path], card: Card, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A UNet's tensors with LoRA files merged, one after the other, and rounded once."""
    for path in loras:
        tensors = lora.merged(tensors, path, card.unet, device, dtype if path == loras[-1] else torch.float32)
    return tensors


def filled_unet(tensors: dict[str, Tensor], card: Card, device: str, dtype: torch.dtype) -> UNet:
    network = on_meta(lambda: UNet(card.unet))
    filled(network, tensors, device, dtype)
    return network


def load_vae(path: Path, card: Card, device: str, dtype: torch.dtype) -> VAE:
    network = on_meta(lambda: VAE(card.vae))
    keys = original.vae_keys(list(network.state_dict()), card.vae)
    filled(network, tensors_for(network, path, keys, original.VAE, new_vae_name), device, dtype)
    return network


def load_fast_decoder(path: Path, config: TinyDecoderConfig, device: str, dtype: torch.dtype) -> TinyDecoder:
    """The decoder's half of a tiny autoencoder's file."""
    network = on_meta(lambda: TinyDecoder(config))
    tensors = {name: tensor for name, tensor in read(path).items() if not name.startswith(ENCODER)}
    filled(network, fitted(tensors, network, as_they_are(network), path), device, dtype)
    return network


def as_they_are(network: nn.Module) -> original.KeyMap:
    """For files that have the network's own names."""
    return {name: (name, original.same) for name in network.state_dict()}


def on_meta(build: Callable[[], Network]) -> Network:
    """A network without memory for its weights: they come from the file."""
    with torch.device("meta"), NoInitialization():
        return build()


class NoInitialization(TorchFunctionMode):
    """Layers built under it do not draw their first weights: for the meta device torch would import its compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = getattr(function, "__module__", "") == "torch.nn.init"
        return kwargs["tensor"] if draws else function(*args, **kwargs)


def tensors_for(
    network: nn.Module, path: Path, keys: original.KeyMap, prefix: str, rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """One network's tensors, from a file of its own or from a whole single file, under the network's names."""
    tensors = read(path)
    if any(name.startswith(original.UNET) for name in tensors):
        others = tuple(other for other in original.PREFIXES if other != prefix)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}
        return fitted(tensors, network, keys, path)
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    return fitted(tensors, network, as_they_are(network), path)
