"""Every variant of drawing at SDXL's sizes on one GPU, in under ten minutes: python bench/gpu.py --out results

Random weights in half precision. Needs the package with what it depends on, and Triton for the kernels; diffusers is
measured in the same run where it can be imported. Every result is a line of results.jsonl and of log.txt as soon as it
is there, those of single kernels in the folder kernels. Parts are in the order of what they are to tell: what a picture
takes first. Each needs some seconds, and is not begun where less is left of --minutes. Single evaluations are timed as
graphs, so that the times are the GPU's and not Python's, except where a row says "eager".
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from fulgurite import Picture, Pipeline
from fulgurite.benchmark import PICTURE, flop_counts, matrix_ceiling, peak_memory
from fulgurite.cards import card
from fulgurite.kernels import float8
from fulgurite.kernels.fused import fuse
from fulgurite.kernels.graphs import Pool
from fulgurite.models import UNet, UNetConfig, VAEConfig
from fulgurite.pipeline import graphed, smallest_batch
from fulgurite.request import plan
from fulgurite.sampling import TRAIN_STEPS
from fulgurite.weights.load import NoInitialization
from peers.works import Work, random_weights, sdxl
from report import Report, Skip
from timing import Timer

# Prompt to pixels on the host, 1024x1024, of an H100: seconds of a picture, or pictures a second.
TARGETS = {"batch 1, 4 steps": (0.130, 0.100), "batch 1, 1 step": (0.055, 0.055), "4 steps, throughput": (12, 16)}
STEPS = (1, 2, 4, 8)
FEW = 3  # times that whole pictures are drawn
FAR = 0.02  # relative error of a network, from which something is wrong


class Bench:
    """The networks and what is measured of them."""

    def __init__(self, report: Report, work: Work, device: str, dtype: torch.dtype) -> None:
        self.report, self.work, self.device, self.dtype = report, work, device, dtype
        self.pipeline = Pipeline(work.card, random_weights(work, dtype, device), device, dtype)
        self.networks = self.pipeline.networks
        fuse(self.networks.unet)  # as a server's is
        self.to = plan(work.card, work.request)
        with NoInitialization():
            self.flops = flop_counts(work.card, work.request)
        self.time = Timer(report, device)
        self.cuda = device == "cuda"
        self.wrong_kernels: list[str] | None = None  # not looked at yet
        self.kind = "graphs"  # what pictures are drawn by, once the kernels are found right with them too

    def step(self, name: str, unet: UNet, inputs: list[Tensor] | None = None, batch: int = 1) -> float:
        inputs = inputs or self.inputs(batch, unet)
        return self.time(name, self.time.captured(lambda: unet(*inputs)), flops=batch * self.flops["step"])

    def decode(self, name: str) -> float:
        vae, latent = self.networks.vae, self.inputs()[0]
        return self.time(name, self.time.captured(lambda: vae.decode(latent)), flops=self.flops["decode"])

    def inputs(self, batch: int = 1, unet: UNet | None = None) -> list[Tensor]:
        """Random arguments of the UNet, or of another one, of so many rows."""
        config, numbers, unet = self.work.card.unet, torch.Generator().manual_seed(0), unet or self.networks.unet

        def drawn(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=numbers).to(unet.conv_in.weight)

        length = self.work.card.text_encoders[0].max_position_embeddings
        timesteps = torch.randint(TRAIN_STEPS, (batch,), generator=numbers).to(self.device)
        sizes = torch.full((batch, 6), float(self.work.request.width), device=self.device)
        x, context, pooled = drawn(*self.to.latent_shape), drawn(length, config.cross_attention_dim), config.pooled_dim
        return [x, timesteps, unet.read(context), drawn(pooled), sizes]

    def needs_cuda(self) -> None:
        if not self.cuda:
            raise Skip("there is no GPU here")

    # The parts

    def eager(self) -> None:
        unet, vae, inputs = self.networks.unet, self.networks.vae, self.inputs()
        self.time("text, eager", lambda: self.pipeline.encode(self.work.request.prompt), flops=self.flops["text"])
        self.time("step, eager", lambda: unet(*inputs), flops=self.flops["step"])
        self.time("decode, eager", lambda: vae.decode(inputs[0]), flops=self.flops["decode"])
        pixels = vae.decode(inputs[0]).float()[0]
        row = self.pipeline.start(self.work.request, self.pipeline.encode)
        self.time("to host", lambda: self.pipeline.picture(row, pixels))

    def plain(self) -> None:
        """The plain networks, the decoder in both memory formats."""
        unet, vae = self.networks.unet, self.networks.vae
        self.step("step", unet)
        for form in (torch.channels_last, torch.contiguous_format):
            vae.to(memory_format=form)
            self.decode(f"decode, {form}")

    def check_kernels(self) -> None:
        self.wrong_kernels = self.run_kernels()
        self.report.row("kernels that are wrong here", names=self.wrong_kernels)
        if self.wrong_kernels:
            raise AssertionError("some kernels are wrong")

    def run_kernels(self, *options: str) -> list[str]:
        """In a process of its own, since a kernel that goes wrong may take its process's GPU with it; what failed."""
        program, folder = Path(__file__).with_name("gpu_kernels.py"), self.report.folder / "kernels"
        command = [sys.executable, program, "--out", folder, *options, *([] if self.cuda else ["--smoke"])]
        kept = folder / "results.jsonl"
        kept.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
        ended = subprocess.run([*map(str, command)], timeout=min(240, self.report.seconds_left()))
        if ended.returncode not in (0, 1):
            raise RuntimeError(f"{program.name} ended with {ended.returncode}")
        rows = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
        return sorted(row["name"] for row in rows if "failed" in row)

    def need_kernels(self, *kinds: str) -> None:
        if self.wrong_kernels is None or any(name.startswith(kinds) for name in self.wrong_kernels):
            raise Skip("the kernels have not been found right here")

    def triton(self) -> None:
        """From here on the networks are on the kernels."""
        self.need_kernels("norms", "layer norm", "GEGLU", "upsampling", "attention")
        from fulgurite.kernels import cuda

        unet, vae, inputs = deepcopy(self.networks.unet), deepcopy(self.networks.vae), self.inputs()
        wanted = unet(*inputs), vae.decode(inputs[0])
        cuda.accelerate(unet)
        cuda.accelerate(vae)
        errors = relative_error(unet(*inputs), wanted[0]), relative_error(vae.decode(inputs[0]), wanted[1])
        self.report.row("Triton kernels, relative error of the networks", step=errors[0], decode=errors[1])
        if not max(errors) < FAR:
            raise AssertionError("the networks differ on the kernels")
        self.networks = self.pipeline.networks = replace(self.networks, unet=unet, vae=vae)
        self.kind = "Triton and graphs"
        self.step("step, Triton", unet)
        self.decode("decode, Triton")

    def as_served(self) -> None:
        """Text by graphs, and what the first picture waits for once the weights are there and kernels compiled."""
        self.needs_cuda()
        started = time.perf_counter()
        self.pipeline.networks = graphed(self.networks, Pool())
        try:
            self.pipeline.draw(replace(self.work.request, num_steps=4))
            self.report.row("first picture", seconds=time.perf_counter() - started)
            self.time("text, graphs", lambda: self.pipeline.encode(self.work.request.prompt), flops=self.flops["text"])
        finally:
            self.pipeline.networks = self.networks

    def picture(self, name: str, steps: int, batch: int, graphs: bool = False) -> None:
        """Prompt to pixels on the host, by the pipeline's own stages, of a batch of pictures."""
        if graphs:
            self.needs_cuda()
        request = replace(self.work.request, num_steps=steps)
        smallest = smallest_batch(self.work.card, self.pipeline.device, self.to.latent_shape)

        def draw() -> list[Picture]:
            rows = [self.pipeline.start(request, self.pipeline.encode) for _ in range(batch)]
            while rows[0].done < rows[0].plan.steps:
                self.pipeline.step(rows, max(batch, smallest))
            return [self.pipeline.finish(row) for row in rows]

        wanted = draw() if graphs else []
        if graphs:
            self.pipeline.networks = graphed(self.networks, Pool())
        try:
            if graphs:
                alike = [a.image.tobytes() == b.image.tobytes() for a, b in zip(draw(), wanted, strict=True)]
                self.report.row(f"{name}, pictures as without graphs", all=all(alike))
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = self.time(name, draw, repeats=FEW)
        finally:
            self.pipeline.networks = self.networks
        memory = peak_memory(self.device)  # with all networks of this run that are still here
        self.report.row(f"{name}, throughput", pictures_a_second=batch / seconds, peak_memory=memory)

    def float8(self) -> None:
        """The step's large linear layers in 8 bits, the rest in bfloat16, beside all in bfloat16; on the kernels.

        With the rounding left to torch, which shows what its kernel gains; and with sums of fewer bits, which Hopper
        adds up quicker.
        """
        self.need_kernels("")
        from fulgurite.kernels import cuda

        unet = random_weights(self.work, torch.bfloat16, self.device).unet
        fuse(unet)
        cuda.accelerate(unet)
        inputs = self.inputs(unet=unet)
        wanted = unet(*inputs)

        def steps(numbers: str) -> None:
            for batch in (1, 4) if self.cuda else (1,):
                self.step(f"step of {batch}, Triton, {numbers}", unet, self.inputs(batch, unet), batch)

        steps("bfloat16")
        float8.accelerate(unet)
        self.step("step, Triton, float8, rounded by torch", unet, inputs)
        cuda.accelerate(unet)
        quick = patch.object(torch, "_scaled_mm", partial(torch._scaled_mm, use_fast_accum=True))
        for sums, change in (("", nullcontext()), (", sums of fewer bits", quick if self.cuda else nullcontext())):
            with change:
                error = relative_error(unet(*inputs), wanted)
                self.report.row(f"float8{sums}, relative error of the step", step=error)
                steps(f"float8{sums}")

    def compiled(self) -> None:
        """By torch's compiler with its graphs, on fresh plain networks: it fuses what the kernels do by itself."""
        self.needs_cuda()
        networks = random_weights(self.work, self.dtype, self.device)
        vae, inputs = networks.vae.to(memory_format=torch.channels_last), self.inputs(unet=networks.unet)
        for part, network, given in (("step", networks.unet, inputs), ("decode", vae.decode, inputs[:1])):
            call, started = torch.compile(network, mode="reduce-overhead"), time.perf_counter()
            call(*given)
            self.report.row(f"{part}, compiled, first call", seconds=time.perf_counter() - started)
            self.time(f"{part}, compiled", lambda: call(*given), flops=self.flops[part])  # noqa: B023

    def diffusers(self, name: str, **options: bool) -> None:
        """The same networks in diffusers."""
        try:
            from peers.diffusers_way import DiffusersWay
        except ImportError as error:
            raise Skip(f"diffusers cannot be imported: {error}") from None
        if options:
            self.needs_cuda()
        networks = random_weights(self.work, self.dtype, self.device)
        work = replace(self.work, load=lambda work, dtype: networks, request=replace(self.work.request, num_steps=4))
        way = DiffusersWay(work, self.dtype, device=self.device, **options)
        way.draw()
        found = [way.draw()[1] for _ in range(FEW)]
        middle = {part: 1000 * statistics.median(each[part] for each in found) for part in found[0]}
        middle["to host pixels, as ours"] = middle[PICTURE] - middle["encode"]
        self.report.row(f"diffusers, {name}, 4 steps", **middle)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def against_targets(report: Report) -> None:
    """The best of all ways beside what is aimed at."""
    rows = {name: row for name, row in report.results.items() if not name.startswith("target")}
    for name, (most, aim) in TARGETS.items():
        if name.endswith("throughput"):
            found = [row["pictures_a_second"] for key, row in rows.items() if key.endswith(name)]
            best, met = max(found, default=0.0), max(found, default=0.0) >= most
        else:
            found = [row["ms"] / 1000 for key, row in rows.items() if key.endswith(name) and "ms" in row]
            best, met = min(found, default=float("inf")), min(found, default=float("inf")) <= most
        report.row(f"target, {name}", best=best, target=most, aim=aim, met=met)


def smoke_work() -> Work:
    """Everything small, for a CPU: few channels above all, which Triton's interpreter takes one by one."""
    small = card("fulgurite/spark")
    unet = UNetConfig(4, 4, (16, 32), 1, (0, 1), 16, 320, 16, 192, 2)
    vae = VAEConfig(3, 4, (4, 4, 4, 4, 4, 4, 8), 1, 2, 1.0)  # more levels than Spark's, for a smaller latent
    of_model = replace(small, unet=unet, vae=vae, native_shapes=(), preview_rgb=(), schedules=STEPS)
    return replace(sdxl(256), card=of_model)


def large_tiles() -> None:
    """For Triton's interpreter, which takes no longer for a program of many numbers than for one of few."""
    from fulgurite.kernels import cuda, cuda_norm

    cuda.TILE = cuda_norm.TILE = cuda_norm.SUMMED = cuda_norm.PIXELS = 1 << 16


def measure_all(bench: Bench) -> None:
    report = bench.report

    def pictures(way: str, graphs: bool, *sizes: tuple[int, int], needs: float = 15) -> None:
        for batch, steps in sizes:
            name = f"{way}, batch {batch}, {steps} step{'s' if steps > 1 else ''}"
            report.part(f"pictures: {name}", partial(bench.picture, name, steps, batch, graphs), needs)

    report.part("ceiling", lambda: report.row("ceiling", flops=matrix_ceiling(bench.device, bench.dtype)))
    report.part("eager", bench.eager)
    pictures("eager", False, (1, 4), (1, 1))
    report.part("plain", bench.plain, needs=10)
    report.part("the kernels' own check", bench.check_kernels, needs=60)
    report.part("Triton kernels", bench.triton, needs=30)
    report.part("as served", bench.as_served)
    kind = bench.kind
    pictures(kind, True, (1, 4), (1, 1))
    against_targets(report)
    report.part("float8", bench.float8, needs=30)
    pictures(kind, True, (4, 4), (8, 4), (4, 1), (8, 1), (1, 2), (1, 8), needs=20)
    for batch in (4, 8) if bench.cuda else (2,):
        step = partial(bench.step, f"step, batch {batch}", bench.networks.unet, batch=batch)
        report.part(f"steps of {batch}", step, needs=15)
    against_targets(report)
    report.part("diffusers", partial(bench.diffusers, "eager"), needs=40)
    report.part("compiled", bench.compiled, needs=150)
    report.part("the kernels' times", partial(bench.run_kernels, "--times"), needs=90)
    options = {"channels_last": True, "compiled": True}
    report.part("diffusers, compiled", partial(bench.diffusers, "compiled", **options), needs=150)
    against_targets(report)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="the folder for results.jsonl and log.txt")
    arguments.add_argument("--minutes", type=float, default=8.5, help="in which all parts are to end")
    arguments.add_argument("--smoke", action="store_true", help="a tiny run on the CPU, with TRITON_INTERPRET=1")
    given = arguments.parse_args()
    if not given.smoke and not torch.cuda.is_available():
        sys.exit("There is no GPU here: --smoke runs a tiny model on the CPU.")
    report = Report(given.out, given.minutes)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    report.row("machine", device=name, torch=torch.__version__, python=platform.python_version())
    if given.smoke:
        large_tiles()
        bench = Bench(report, smoke_work(), "cpu", torch.float32)
    else:
        bench = Bench(report, sdxl(1024), "cuda", torch.float16)
    report.say("the networks are here")
    with torch.inference_mode():
        measure_all(bench)
    report.end()


if __name__ == "__main__":
    main()
