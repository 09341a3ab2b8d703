"""A model's files from the hub, into the hub library's own cache, which other tools share."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import tqdm

from fulgurite.cards import Card, Repo, pull_command
from fulgurite.errors import FulguriteError, NotPulledError
from fulgurite.weights.files import Files

TOKENIZERS = tuple(
    f"{folder}/{name}"
    for folder in ("tokenizer", "tokenizer_2")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json")
)
TEXT_ENCODERS = ("text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors")
BASE_UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
VAE = "diffusion_pytorch_model.safetensors"  # the fast decoder's too


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    repo: Repo
    name: str

    def cached(self) -> Path | None:
        """Where it is on this machine, if it is."""
        path = try_to_load_from_cache(self.repo.repo, self.name, revision=self.repo.revision)
        return Path(path) if isinstance(path, str) else None

    def size(self) -> int:
        """Bytes, as the hub states them."""
        url = hf_hub_url(self.repo.repo, self.name, revision=self.repo.revision)
        return get_hf_file_metadata(url).size or 0


class NoProgress(tqdm):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


def needed(card: Card, steps: Iterable[int], use_lora: bool) -> list[HubFile]:
    """The files that drawing with these schedules takes. Raises FulguriteError where there are none."""
    weights = card.weights
    if weights.source != "hub" or not (weights.base and weights.vae and weights.distilled):
        raise FulguriteError(f"There is nothing to pull for {card.id}: its weights are not on the hub.")
    by_steps, kind = (weights.loras, "LoRA") if use_lora else (weights.unets, "UNet")
    for n in steps:
        if str(n) not in by_steps:
            raise FulguriteError(f"{card.id} has no {n}-step {kind}: there are those for {', '.join(by_steps)} steps.")
    names = [*TOKENIZERS, *TEXT_ENCODERS, *([BASE_UNET] if use_lora else [])]
    files = [HubFile(weights.base, name) for name in names] + [HubFile(weights.vae, VAE)]
    return files + [HubFile(weights.distilled, by_steps[str(n)]) for n in steps]


def fast_decoder(card: Card) -> list[HubFile]:
    """The file of the card's fast decoder, where it has one: drawing does without it."""
    return [HubFile(card.weights.fast_decoder, VAE)] if card.weights.fast_decoder else []


def cached_files(card: Card, steps: int) -> Files:
    """Where a hub model's files are on this machine: with the UNet for ``steps``, else with its LoRA.

    Raises NotPulledError that says how to pull them.
    """
    for use_lora in (False, True):
        if str(steps) not in (card.weights.loras if use_lora else card.weights.unets):
            continue
        wanted = needed(card, [steps], use_lora)
        paths = [path for file in wanted if (path := file.cached())]
        if len(paths) == len(wanted):
            *of_base, vae, lightning = paths
            found = dict(zip((*TOKENIZERS, *TEXT_ENCODERS, BASE_UNET), of_base, strict=False))
            return Files(
                tokenizers=(found[TOKENIZERS[0]].parent, found[TOKENIZERS[3]].parent),
                text_encoders=(found[TEXT_ENCODERS[0]], found[TEXT_ENCODERS[1]]),
                unet=found[BASE_UNET] if use_lora else lightning,
                vae=vae,
                loras=(lightning,) if use_lora else (),
                fast_decoder=next((file.cached() for file in fast_decoder(card)), None),
            )
    raise NotPulledError(
        f"The {steps}-step weights of {card.id} are not on this machine: `{pull_command(card, steps)}`."
    )


def cached_tokenizers(card: Card) -> tuple[Path, Path]:
    """The folders of the base model's tokenizers, for a single file, which has none. Raises NotPulledError."""
    base = card.weights.base
    found = [path for name in TOKENIZERS if base and (path := HubFile(base, name).cached())]
    if len(found) < len(TOKENIZERS):
        raise NotPulledError(
            f"A single file holds no tokenizers: name a folder that does in {card.id}'s card, as `tokenizers`."
        )
    return found[0].parent, found[3].parent


def pull(card: Card, steps: tuple[int, ...], use_lora: bool = False, progress: bool = True) -> None:
    """Downloads what the schedules of ``steps`` take and is not on this machine yet.

    A connection that breaks off is resumed; when it stays away, the files that are whole by then are kept.
    Raises FulguriteError, in one line, where the hub cannot be reached, a file is not there, or the disk is too full.
    """
    missing = [file for file in [*needed(card, steps, use_lora), *fast_decoder(card)] if not file.cached()]
    try:
        check_disk(sum(file.size() for file in missing))
        for file in missing:
            bar = None if progress else NoProgress
            hf_hub_download(file.repo.repo, file.name, revision=file.repo.revision, tqdm_class=bar)
    except errors.HfHubHTTPError as error:
        raise FulguriteError(f"The hub at {constants.ENDPOINT} did not give {card.id}: {one_line(error)}.") from error
    except errors.OfflineModeIsEnabled as error:
        raise FulguriteError("HF_HUB_OFFLINE is set, which forbids the network: unset it to pull.") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        why = one_line(error.__cause__ or error)  # the hub's library says no more than to check the connection
        message = f"The hub at {constants.ENDPOINT} cannot be reached ({why}): run this again once it can;"
        raise FulguriteError(f"{message} whole files are kept.") from error
    except (OSError, RuntimeError) as error:
        message = f"Pulling {card.id} stopped ({one_line(error)}): run this again, whole files are kept."
        raise FulguriteError(message) from error


def check_disk(wanted: int) -> None:
    """Raises FulguriteError unless the cache's disk has room for so many bytes."""
    folder = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise FulguriteError(
            f"The disk of {folder} is too full: {wanted / 1e9:.1f} GB are to come and {free / 1e9:.1f} GB are free. "
            "Make room, or set HF_HOME to a folder on another disk."
        )


def one_line(error: BaseException) -> str:
    """What an error says, without the page about HTTP's statuses that httpx sends people to."""
    said, _, _ = str(error).partition("For more information check:")
    return " ".join(said.split()).rstrip(".") or type(error).__name__
