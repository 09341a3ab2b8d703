"""Files of weights: where a model's are, and their tensors, mapped into memory rather than read."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fulgurite.errors import WeightsError

# One network's file in a folder as diffusers publishes it, the plain name before its half-precision variant.
TEXT_NAMES = ("model.safetensors", "model.fp16.safetensors")
OTHER_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Files:
    """Where everything between a prompt and its pixels is read from; one file may hold several networks.

    A network's place is a safetensors file, or the index of one that was cut into shards.
    """

    tokenizers: tuple[Path, Path]  # folders with vocab.json and merges.txt
    text_encoders: tuple[Path, Path]
    unet: Path
    vae: Path
    loras: tuple[Path, ...] = ()  # merged into the UNet, one after the other
    fast_decoder: Path | None = None

    @property
    def predicts_x0(self) -> bool:
        """Whether the UNet's file says in its name that it predicts the clean latent, as Lightning's 1-step ones do."""
        return "_x0" in self.unet.stem


def folder_files(folder: Path) -> Files:
    """The files of a folder as diffusers publishes it, and a fast decoder's where it has one beside them.

    Raises WeightsError that names what is not there.
    """
    fast_decoder = folder / "fast_decoder"
    return Files(
        tokenizers=tokenizer_folders(folder),
        text_encoders=(network_file(folder / "text_encoder"), network_file(folder / "text_encoder_2")),
        unet=network_file(folder / "unet"),
        vae=network_file(folder / "vae"),
        fast_decoder=network_file(fast_decoder) if fast_decoder.is_dir() else None,
    )


def tokenizer_folders(folder: Path) -> tuple[Path, Path]:
    """A model's two tokenizers; where the second has no folder of its own it is the first."""
    second = folder / "tokenizer_2"
    return folder / "tokenizer", second if second.is_dir() else folder / "tokenizer"


def network_file(folder: Path) -> Path:
    """The weights of one network in its folder: a file, or the index of its shards."""
    for name in TEXT_NAMES + OTHER_NAMES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                return path
    for path in sorted(folder.glob("*")):
        refuse_pickle(path)
    raise WeightsError(f"There are no safetensors weights in {folder}.")


def refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise WeightsError(f"{path} is a pickle, which can run any code when it is opened: only safetensors is read.")


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file (or of the shards that an index names), mapped into memory.

    Pages come from the disk when they are first used, and the system may drop them again.
    Raises WeightsError that names the file where it is missing, cannot be read, is damaged, or is of another kind.
    """
    refuse_pickle(path)
    try:
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in read(path.parent / shard).items()}
        path.open("rb").close()  # tells why it cannot be opened; safetensors would say that there is no such file
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise WeightsError(f"There is no file {path}.") from error
    except (OSError, RuntimeError) as error:  # the latter is torch's, which maps the file
        raise WeightsError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is damaged or no safetensors file ({error}): delete it and fetch it again."
        raise WeightsError(message) from error
