"""The engine at SDXL's sizes on a GPU, over random weights: python bench/serving_sdxl.py --out FOLDER [--smoke]

1. Same bits: a random mix of pictures that join and are cancelled at random moments, the last latent and the pixels of
   each compared to the bit with those of its request drawn alone.
2. What exactness costs: milliseconds of a step by its rows, and which numbers of rows give the bits of smaller ones;
   and which kinds of the UNet's layers do not, in a batch of four.
3. What another checkpoint costs: seconds to merge a LoRA of rank 64 from its file into the UNet that is on the device,
   and to copy a whole UNet from the host's memory instead, from pages that the device reads by itself and from others.
4. Serving: bench/serving.py's loads and ways.

Every result is a line of FOLDER/results.jsonl as soon as it is there. It should need 35 GB of GPU memory; of its
minutes most are serving's: three times --seconds for each load, and as long as pictures then still wait. With `--smoke`
the same over tiny networks on a CPU.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fulgurite import Picture, Pipeline, Request
from fulgurite.cards import card
from fulgurite.engine import Engine, Runner
from fulgurite.engine.batches import LADDER, most_rows
from fulgurite.kernels.graphs import GraphedUNet, Pool
from fulgurite.models import CLIPTextConfig, UNet, UNetConfig, VAEConfig
from fulgurite.models.layers import DotProductAttention, Upsample
from fulgurite.models.unet import ResnetBlock
from fulgurite.pipeline import Row, graphed, smallest_batch, usual_dtype
from fulgurite.request import plan
from fulgurite.weights.lora import merged
from peers.works import Work, random_weights, sdxl
from report import Report, Skip
from serving import STEPS, Bench, measured

MODEL = "bytedance/stable-diffusion-xl-lightning"
SIZES = ((1024, 1024), (1152, 896), (896, 1152))
COMPARED = (nn.Linear, nn.GroupNorm, nn.Conv2d, ResnetBlock, DotProductAttention, Upsample)
SMOKE_SIZES = ((256, 256), (320, 256))


class Recorded(Pipeline):
    """Keeps the last latent of each picture, by its seed."""

    latents: dict[int, torch.Tensor]

    def finish(self, row: Row) -> Picture:
        assert row.request.seed is not None
        self.latents[row.request.seed] = row.x.clone()
        return super().finish(row)


class RandomWeights:
    """A loader of SDXL-Lightning's networks with random weights: a UNet for each schedule, all of them here to stay."""

    def __init__(self, work: Work, device: str, dtype: torch.dtype) -> None:
        self.latents: dict[int, torch.Tensor] = {}
        self._pipelines = {}
        networks = random_weights(work, dtype, device)
        self.plain_unet = networks.unet
        for steps in work.card.schedules:
            own = replace(networks, unet=random_weights(work, dtype, device, seed=steps).unet)
            self._pipelines[steps] = Recorded(work.card, own, device, dtype)
            self._pipelines[steps].latents = self.latents
        shared = networks
        for pipeline in self._pipelines.values():
            pipeline.accelerate()  # what all share is exchanged once: there is nothing left to exchange the next time
            if device == "cuda":
                of_all = {"vae": shared.vae, "text_encoders": shared.text_encoders}
                shared = pipeline.networks = graphed(replace(pipeline.networks, **of_all), Pool())

    def __call__(self, model: str, steps: int) -> Pipeline:
        return self._pipelines[card(model).steps_for(steps)]

    def switch_seconds(self, model: str, steps: int) -> float:
        return 0.0

    def drop_others(self, model: str, steps: int) -> None:
        pass


def smoke_work() -> Work:
    """Networks that a CPU runs in no time; latents are of the shape that they have at these sizes."""
    work = sdxl(256)
    text = CLIPTextConfig(2048, 16, 32, 2, 2, 77, "gelu", None, work.card.text_encoders[0].eos_token_id)
    of_model = replace(
        work.card,
        unet=UNetConfig(4, 4, (32, 64), 1, (0, 1), 16, 32, 8, 16, 8),
        vae=VAEConfig(3, 4, (8, 8, 8, 8), 1, 8, 0.13),
        text_encoders=(text, replace(text, projection_dim=16)),
    )
    return replace(work, card=of_model)


def same_bits(load: RandomWeights, bench: Bench, count: int, pause: float) -> dict[str, Any]:
    """How many pictures of a mix were compared with their requests drawn alone, and how many differed."""
    chance, asked = random.Random(0), []
    for _ in range(count):
        request = bench.picture(chance)
        guided = {"guidance": chance.choice((7.5, 9.0)), "negative_prompt": chance.choice(("", "blurry"))}
        asked.append((replace(request, **guided), chance.random() < 0.2))

    engine, jobs = Engine(lambda: Runner(load)), list[Future[Picture]]()
    for request, unwanted in asked:
        jobs.append(engine.submit(MODEL, request, key=chance.choice("abc")))
        time.sleep(chance.random() * pause)
        if unwanted:
            engine.cancel(jobs[-1])
    found = {"compared": 0, "different": 0}
    for (request, _), job in zip(asked, jobs, strict=True):
        if job.cancelled() or job.exception():
            continue
        assert request.seed is not None
        latent = load.latents[request.seed]
        alone = load(MODEL, request.num_steps).draw(request)
        same = torch.equal(latent, load.latents[request.seed])
        found["compared"] += 1
        found["different"] += not (same and job.result().image.tobytes() == alone.image.tobytes())
    stats = engine.stats()
    engine.close()
    load.latents.clear()
    if stats["rows"] == stats["steps"]:
        raise Skip("no picture shared a step, so nothing was compared: no larger batch has a picture's own bits here")
    return found | {"steps": stats["steps"], "rows": stats["rows"], "errors": stats["failed"]}


def layers_apart(load: RandomWeights, size: tuple[int, int], report: Report, batch: int = 4) -> None:
    """Of each kind of layer, how many a step runs, and of how many a batch's rows have other bits than alone.

    On the kernels most convolutions are part of a ResnetBlock or an Upsample, and layer norms are not looked at.
    """
    pipeline, request = load(MODEL, 4), Request("a fox", "", size[1], size[0], 4)
    unet = pipeline.networks.unet
    plain = unet.unet if isinstance(unet, GraphedUNet) else unet
    counts: dict[str, list[int]] = {}
    looking = False

    def look(layer: nn.Module, given: tuple[Any, ...], found: torch.Tensor) -> None:
        nonlocal looking
        if looking or len(found) != batch:
            return
        looking = True  # what it calls is looked at beside it, not here
        alone = [layer(*(of_row(value, i, batch) for value in given)) for i in range(batch)]
        looking = False
        ran, apart = counts.setdefault(type(layer).__name__, [0, 0])
        counts[type(layer).__name__] = [ran + 1, apart + (not torch.equal(torch.cat(alone), found))]

    layers = [layer for layer in plain.modules() if isinstance(layer, COMPARED)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    pipeline.networks = replace(pipeline.networks, unet=plain)
    try:
        rows = [pipeline.start(replace(request, seed=seed), pipeline.encode) for seed in range(batch)]
        pipeline.step(rows, batch)
    finally:
        pipeline.networks = replace(pipeline.networks, unet=unet)
        for hook in hooks:
            hook.remove()
    for kind, (ran, apart) in counts.items():
        report.row(f"{kind}, rows of {batch} beside rows alone", ran=ran, apart=apart)


def of_row(value: Any, row: int, batch: int) -> Any:
    return value[row : row + 1] if isinstance(value, torch.Tensor) and len(value) == batch else value


def step_times(load: RandomWeights, size: tuple[int, int], report: Report) -> None:
    """Milliseconds of a step by its rows, and whether these have the bits of the smallest batches."""
    pipeline, request = load(MODEL, 4), Request("a fox", "", size[1], size[0], 4)
    shape = plan(pipeline.card, request).latent_shape
    smallest = smallest_batch(pipeline.card, pipeline.device, shape)
    for batch in [n for n in LADDER if n % smallest == 0 and n <= most_rows(pipeline.device.type == "cuda", shape)]:
        times = []
        for _ in range(6):
            rows = [pipeline.start(replace(request, seed=seed), pipeline.encode) for seed in range(batch)]
            finished(pipeline)
            started = time.perf_counter()
            pipeline.step(rows, batch)
            finished(pipeline)
            times.append(1000 * (time.perf_counter() - started))
        exact = pipeline.agrees(shape[1:], [smallest] * (batch // smallest))
        report.row(f"step of {batch}, {size[0]}x{size[1]}", ms=statistics.median(times[1:]), exact=exact)


def switching(pipeline: Pipeline, unet: UNet, report: Report) -> None:
    """Seconds, and the GB of one UNet, to put another checkpoint of ``unet`` onto the device in each way."""
    base, rank, changes = unet.state_dict(), 64, {}
    for name, weight in base.items():
        if weight.ndim > 1:
            module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            up = len(weight), rank, *[1] * (weight.ndim - 2)
            changes[f"{module}.lora_down.weight"] = 0.01 * torch.randn(rank, *weight.shape[1:]).half()
            changes[f"{module}.lora_up.weight"] = 0.01 * torch.randn(up).half()
    device, on_host = str(pipeline.device), [weight.cpu() for weight in base.values()]

    def copied(weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [weight.to(device, copy=True, non_blocking=True) for weight in weights]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(changes, path)
        ways: dict[str, Callable[[], object]] = {
            "merge": lambda: merged(base, path, pipeline.card.unet, device, pipeline.dtype),
            "copy": lambda: copied(on_host),
        }
        if pipeline.device.type == "cuda":
            pinned = [weight.pin_memory() for weight in on_host]
            ways["copy of pinned memory"] = lambda: copied(pinned)
        gigabytes = sum(weight.nbytes for weight in on_host) / 1e9
        for way, switch in ways.items():
            switch()
            finished(pipeline)
            started = time.perf_counter()
            switch()
            finished(pipeline)
            report.row(f"another checkpoint, {way}", seconds=time.perf_counter() - started, gigabytes=gigabytes)


def finished(pipeline: Pipeline) -> None:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize()


def in_this_process(call: Any, *arguments: Any) -> Any:
    """The weights are too large to be made again for each way of serving."""
    return call(*arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for results.jsonl and log.txt")
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU: does this script work?")
    parser.add_argument("--seconds", type=float, default=15, help="of each way of serving at each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.5])
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("There is no GPU here: --smoke runs tiny networks on the CPU.")
    report = Report(options.out)
    device, dtype = ("cpu", usual_dtype("cpu")) if options.smoke else ("cuda", torch.float16)
    report.row("machine", device="cpu" if options.smoke else torch.cuda.get_device_name(), steps=STEPS)
    load = RandomWeights(smoke_work() if options.smoke else sdxl(1024), device, dtype)
    sizes = SMOKE_SIZES if options.smoke else SIZES
    bench = Bench(MODEL, lambda: load, sizes, warm=4)

    def bits() -> None:
        report.row("pictures", **same_bits(load, bench, count=24, pause=0.02 if options.smoke else 0.3))

    def serve() -> None:
        def keep(row: dict[str, Any]) -> None:
            report.row(f"serving, load {row['load']}, {row['way']}", **row)

        measured(bench, options.loads, options.seconds, run=in_this_process, keep=keep)

    report.part("same bits", bits)
    report.part("layers apart", lambda: layers_apart(load, sizes[0], report))
    for size in sizes:
        report.part(f"steps of {size[0]}x{size[1]}", partial(step_times, load, size, report))
    report.part("another checkpoint", lambda: switching(load(MODEL, 8), load.plain_unet, report))
    report.part("serving", serve)
    report.end()


if __name__ == "__main__":
    main()
