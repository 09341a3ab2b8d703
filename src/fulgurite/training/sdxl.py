"""The real SDXL distilled: its folder as diffusers publishes it, and a folder of captioned pictures.

accelerate launch -m fulgurite train distil-sdxl WORK --model stable-diffusion-xl-base-1.0 --pictures PICTURES
"""

from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from fulgurite.cards import Card, card
from fulgurite.training.distil import Ground, distil
from fulgurite.training.loop import Run
from fulgurite.training.pictures import picture_latents
from fulgurite.training.plans import SDXL
from fulgurite.training.precision import half
from fulgurite.training.students import students_in, write_card
from fulgurite.weights.files import folder_files
from fulgurite.weights.load import load_text_encoder, load_tokenizer, load_vae

SIZE = (1024, 1024)  # width, height in pixels
BATCH = 4  # a device
TOGETHER = 512  # pictures to an update, on all devices: the paper's
GUIDANCE = 6.0  # of the teacher: the paper's


def teacher_card() -> Card:
    """SDXL's base model, by its distilled one's card: the networks are the same."""
    return replace(card("bytedance/stable-diffusion-xl-lightning"), schedules=(), guidance_strength=GUIDANCE)


def distil_sdxl(work: Path, model: Path, pictures: Path, out: Path, run: Run) -> None:
    """Trains every student of the plan; their files go to ``out``, and beside it a card that serves them."""
    of_model, files, dtype = teacher_card(), folder_files(model), half(run.kind)
    first, second = of_model.text_encoders
    tokenizers = load_tokenizer(files.tokenizers[0], first), load_tokenizer(files.tokenizers[1], second)
    encoders = (
        load_text_encoder(files.text_encoders[0], first, run.device, dtype, second=False),
        load_text_encoder(files.text_encoders[1], second, run.device, dtype, second=True),
    )
    vae = load_vae(files.vae, of_model, run.device, dtype)
    latents = picture_latents(pictures, vae, SIZE, work / "latents", run)
    ground = Ground(
        of_model, files.unet, tokenizers, encoders, vae, latents, BATCH, run, dtype, checkpointing=True,
        gathered=max(1, round(TOGETHER / (BATCH * PartialState().num_processes))),
    )  # fmt: skip
    for plan in SDXL:
        distil(plan, ground, out, work / "distil")
    if PartialState().is_main_process:
        write_card("sdxl_lightning.toml", out.with_name(f"{out.name}.toml"), files.unet, students_in(out, files.unet))
