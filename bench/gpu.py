"""Every variant of drawing at SDXL's sizes on one GPU, in under ten minutes: python bench/gpu.py --out results

THIS HAS NOT RUN ON A GPU YET: only its smoke run on a CPU has (TRITON_INTERPRET=1, --smoke), which shows that it comes
to its end, and in which whatever needs a GPU is skipped and says so.

Random weights in half precision. Needs the package with what it depends on, and Triton for the kernels; diffusers is
measured in the same run where it can be imported. Every result is a line of results.jsonl and of log.txt as soon as it
is there: a run that is cut off has lost nothing. A stage that fails is told and leaves the others alone. Stages are in
the order of what they are expected to gain; after --minutes no more are begun.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import GroupNorm
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulgurite import Pipeline, Request
from fulgurite.benchmark import Laps, flop_counts, matrix_ceiling, peak_memory
from fulgurite.cards import card
from fulgurite.kernels import float8
from fulgurite.kernels.fused import fuse
from fulgurite.kernels.graphs import Graph, GraphedUNet
from fulgurite.models import UNet, UNetConfig, VAEConfig
from fulgurite.models.layers import GroupNormSiLU
from fulgurite.pipeline import smallest_batch
from fulgurite.request import plan
from fulgurite.sampling import TRAIN_STEPS
from peers.works import Work, random_weights, sdxl

# Prompt to pixels on the host, 1024x1024, of an H100: seconds of a picture, or pictures a second.
TARGETS = {"batch 1, 4 steps": (0.130, 0.100), "batch 1, 1 step": (0.055, 0.055), "4 steps, throughput": (12, 16)}
NORM_SHAPES = [(1, 320, 128, 128), (1, 1280, 32, 32), (1, 512, 256, 256), (1, 256, 1024, 1024), (1, 128, 1024, 1024)]
ROUNDED_SHAPES = [(4096, 640), (4096, 2560), (1024, 1280), (1024, 5120)]
GEGLU_SHAPES = [(1, 4096, 2 * 2560), (1, 1024, 2 * 5120)]
BATCHES, STEPS = (1, 4, 8), (1, 2, 4, 8)
CALLS = 50  # of a kernel that are timed together: alone it is over before the next is launched
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}  # relative to 1 + the value


class Report:
    """Results, kept as they come."""

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rows, self._log = folder / "results.jsonl", folder / "log.txt"
        self._started, self._minutes = time.monotonic(), minutes
        self.results: dict[str, dict[str, Any]] = {}

    def say(self, line: str) -> None:
        line = f"{time.monotonic() - self._started:6.1f} s  {line}"
        print(line, flush=True)
        with self._log.open("a") as file:
            print(line, file=file)

    def row(self, name: str, **values: Any) -> None:
        self.results[name] = values
        with self._rows.open("a") as file:
            print(json.dumps({"name": name, **values}), file=file)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))

    def look_at_the_clock(self) -> None:
        """Raises Skip once the minutes are over."""
        if time.monotonic() - self._started > 60 * self._minutes:
            raise Skip(f"the {self._minutes:g} minutes are over")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What goes wrong in it is told, and the run goes on; a ``Skip`` says why there is nothing to measure."""
        try:
            yield
        except Skip as skip:
            self.row(name, skipped=str(skip))
        except Exception as error:
            self.row(name, failed=f"{type(error).__name__}: {error}")
            self.say(traceback.format_exc())


class Skip(Exception):
    """There is nothing to measure here."""


class Bench:
    """The networks and what is measured of them."""

    def __init__(self, report: Report, work: Work, device: str, dtype: torch.dtype, repeats: int) -> None:
        self.report, self.work, self.device, self.dtype, self.repeats = report, work, device, dtype, repeats
        self.pipeline = Pipeline(work.card, random_weights(work, dtype, device), device, dtype)
        self.networks = self.pipeline.networks
        fuse(self.networks.unet)  # as a server's is
        self.to = plan(work.card, work.request)
        self.flops = flop_counts(work.card, work.request)
        self.cuda = device == "cuda"
        self.batches, self.steps = (BATCHES, STEPS) if self.cuda else ((1, 2), (1, 2))
        self.calls = CALLS if self.cuda else 1

    def time(
        self,
        name: str,
        call: Callable[[], object],
        part: str = "",
        batch: int = 1,
        repeats: int | None = None,
        calls: int = 1,
    ) -> float:
        """The median seconds of a call, as a row; of a ``part`` with the share of the ceiling that it reaches."""
        for _ in range(2 if self.cuda else 0):
            call()
        times = []
        for _ in range(repeats or self.repeats):
            laps = Laps(self.device)
            for _ in range(calls):
                call()
            laps.lap(name, calls)
            times.append(laps.seconds[name])
        middle, extra = statistics.median(times), {}
        if part and "ceiling" in self.report.results:
            extra["of_ceiling"] = batch * self.flops[part] / middle / self.report.results["ceiling"]["flops"]
        self.report.row(name, ms=1000 * middle, lowest=1000 * min(times), highest=1000 * max(times), **extra)
        return middle

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

    # The stages

    def kernels_are_right(self) -> None:
        """Against the plain torch, on the device, before anything is measured with them."""
        for shape in NORM_SHAPES if self.cuda else [(1, 64, 8, 8)]:
            for form in (torch.contiguous_format, torch.channels_last):
                self.norms(shape, form)
        for shape in GEGLU_SHAPES if self.cuda else [(1, 4, 64)]:
            self.gate(shape)
        for shape in ROUNDED_SHAPES if self.cuda else [(4, 64)]:
            self.rounding(shape)

    def norms(self, shape: tuple[int, ...], form: torch.memory_format) -> None:
        from fulgurite.kernels.cuda import group_norm, total

        size = f"{'x'.join(map(str, shape))}, {str(form).removeprefix('torch.')}"
        x, other = (self.random(*shape).to(memory_format=form) for _ in range(2))
        bias, vectors, pixels = self.random(shape[1]), self.random(*shape[:2]), (..., None, None)
        norm, silu = (kind(32, shape[1], device=self.device, dtype=self.dtype) for kind in (GroupNorm, GroupNormSiLU))
        self.both(f"group norm {size}", lambda: group_norm(x, norm, silu=False), lambda: norm(x))
        self.both(f"group norm + SiLU {size}", lambda: group_norm(x, silu, silu=True), lambda: silu(x))
        self.both(
            f"bias + vectors + group norm + SiLU {size}",
            lambda: group_norm(x, silu, silu=True, bias=bias, vectors=vectors),
            lambda: silu(x.add(bias[pixels]).add_(vectors[pixels])),
        )
        self.both(f"two + bias {size}", lambda: total(x, other, bias), lambda: x.add(bias[pixels]).add_(other))

    def gate(self, shape: tuple[int, ...]) -> None:
        from fulgurite.kernels.cuda import geglu

        both = self.random(*shape)
        value, gate = both.chunk(2, dim=-1)
        self.both(f"GEGLU {'x'.join(map(str, shape))}", lambda: geglu(both), lambda: value * F.gelu(gate))

    def rounding(self, shape: tuple[int, ...]) -> None:
        from fulgurite.kernels.cuda import rounded

        name, rows = f"8 bits {'x'.join(map(str, shape))}", self.random(*shape).bfloat16()
        (found, scales), (wanted, wanted_scales) = rounded(rows), float8.rounded(rows)
        alike = (found.view(torch.uint8) == wanted.view(torch.uint8)).float().mean().item()
        self.report.row(f"{name}, alike", share=alike, scales=torch.equal(scales, wanted_scales))
        if self.cuda and alike < 1:  # Triton's interpreter rounds in its own way
            raise AssertionError(f"{name}: {alike:.6f} of the numbers are those of plain torch")
        self.time(f"{name}, plain", lambda: float8.rounded(rows), calls=self.calls)
        self.time(f"{name}, Triton", lambda: rounded(rows), calls=self.calls)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def both(self, name: str, fused: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
        self.same(name, fused(), plain())
        self.time(f"{name}, plain", plain, calls=self.calls)
        self.time(f"{name}, Triton", fused, calls=self.calls)

    def same(self, name: str, found: Tensor, wanted: Tensor) -> None:
        """Raises AssertionError where two ways differ by more than their precision; the error is a row either way."""
        found, wanted = found.float(), wanted.float()
        error = ((found - wanted).abs() / (1 + wanted.abs())).max().item()
        self.report.row(f"{name}, error", error=error, finite=bool(found.isfinite().all()))
        if not error <= TOLERANCE[self.dtype]:
            raise AssertionError(f"{name} differs by {error:.2g}, more than {TOLERANCE[self.dtype]:.2g}")

    def eager(self) -> None:
        unet, vae, inputs = self.networks.unet, self.networks.vae, self.inputs()
        latent = torch.randn_like(inputs[0])
        self.time("text, eager", lambda: self.pipeline.encode(self.work.request.prompt), "text")
        self.time("step, eager", lambda: unet(*inputs), "step")
        vae.to(memory_format=torch.contiguous_format)
        self.time("decode, eager", lambda: vae.decode(latent), "decode")
        vae.to(memory_format=torch.channels_last)
        self.time("decode, channels-last", lambda: vae.decode(latent), "decode")
        pixels = vae.decode(latent).float()[0]
        row = self.pipeline.start(self.work.request, self.pipeline.encode)
        self.time("to host", lambda: self.pipeline.picture(row, pixels))
        unet.to(memory_format=torch.channels_last)
        self.time("step, channels-last", lambda: unet(*inputs), "step")
        unet.to(memory_format=torch.contiguous_format)

    def attention(self) -> None:
        self.needs_cuda()
        inputs = self.inputs()
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            with self.report.stage(f"step, Triton, {backend.name}"), sdpa_kernel(backend):
                self.time(f"step, Triton, {backend.name}", lambda: self.networks.unet(*inputs), "step")

    def triton(self) -> None:
        """From here on the networks are on the kernels, and the UNet in the memory format that is quicker."""
        from fulgurite.kernels import cuda

        unet, vae, inputs = self.networks.unet, self.networks.vae, self.inputs()
        wanted = unet(*inputs), vae.decode(inputs[0])
        cuda.accelerate(unet)
        cuda.accelerate(vae)
        self.report.row(
            "Triton kernels, relative error of the networks",
            step=relative_error(unet(*inputs), wanted[0]),
            decode=relative_error(vae.decode(inputs[0]), wanted[1]),
        )
        contiguous = self.time("step, Triton", lambda: unet(*inputs), "step")
        unet.to(memory_format=torch.channels_last)
        last = self.time("step, Triton, channels-last", lambda: unet(*inputs), "step")
        self.report.row("the UNet from here on", channels_last=last < contiguous)
        if last >= contiguous:
            unet.to(memory_format=torch.contiguous_format)
        self.time("decode, Triton, channels-last", lambda: vae.decode(inputs[0]), "decode")

    def graphs(self) -> None:
        """The step and the decode of each batch as a graph."""
        self.needs_cuda()
        for batch in self.batches:
            inputs = self.inputs(batch)
            step, decode = GraphedUNet(self.networks.unet), Graph(self.networks.vae.decode, inputs[:1])
            self.same(f"step, graph, batch {batch}", step(*inputs), self.networks.unet(*inputs))
            self.time(f"step, graph, batch {batch}", lambda: step(*inputs), "step", batch)  # noqa: B023
            self.time(f"decode, graph, batch {batch}", lambda: decode(inputs[0]), "decode", batch)  # noqa: B023

    def pictures(self, name: str, *, graphs: bool, batches: Sequence[int], all_steps: Sequence[int]) -> None:
        """Prompt to pixels on the host, by the pipeline's own stages, of each batch and number of steps."""
        if graphs:
            self.needs_cuda()
        for steps in all_steps:
            for batch in batches:
                request = replace(self.work.request, num_steps=steps)
                unet = GraphedUNet(self.networks.unet) if graphs else self.networks.unet
                self.pipeline.networks = replace(self.networks, unet=unet)

                def draw(request: Request = request, batch: int = batch) -> None:
                    rows = [self.pipeline.start(request, self.pipeline.encode) for _ in range(batch)]
                    smallest = smallest_batch(self.work.card, self.pipeline.device, self.to.latent_shape)
                    while rows[0].done < rows[0].plan.steps:
                        self.pipeline.step(rows, max(batch, smallest))
                    for row in rows:
                        self.pipeline.finish(row)

                full = f"{name}, batch {batch}, {steps} step{'s' if steps > 1 else ''}"
                seconds = self.time(full, draw, repeats=min(self.repeats, 3))
                self.report.row(f"{full}, throughput", pictures_a_second=batch / seconds)
        self.pipeline.networks = self.networks

    def overlap(self) -> None:
        """Four steps of one picture beside the decode of the one before, on streams of their own."""
        self.needs_cuda()
        unet, vae, inputs = self.networks.unet, self.networks.vae, self.inputs()
        side, count = torch.cuda.Stream(), 8

        def together() -> None:
            for _ in range(count):
                for _ in range(4):
                    latent = unet(*inputs)
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    vae.decode(latent)
                latent.record_stream(side)
            torch.cuda.current_stream().wait_stream(side)

        def apart() -> None:
            for _ in range(count):
                for _ in range(4):
                    latent = unet(*inputs)
                vae.decode(latent)

        for name, call in (("one after the other", apart), ("decode beside the steps", together)):
            seconds = self.time(f"{count} pictures, 4 steps, {name}", call)
            self.report.row(f"{name}, throughput", pictures_a_second=count / seconds)

    def compiled(self, *modes: str) -> None:
        """By torch's compiler, on fresh plain networks: it fuses what the kernels do by itself."""
        self.needs_cuda()
        networks = random_weights(self.work, self.dtype, self.device)
        vae, inputs = networks.vae.to(memory_format=torch.channels_last), self.inputs(unet=networks.unet)
        for mode in modes:
            with self.report.stage(f"compiled, {mode}"):
                torch.compiler.reset()
                started = time.perf_counter()
                step, decode = torch.compile(networks.unet, mode=mode), torch.compile(vae.decode, mode=mode)
                step(*inputs), decode(inputs[0])
                self.report.row(f"compiled, {mode}, first call", seconds=time.perf_counter() - started)
                self.time(f"step, compiled, {mode}", lambda: step(*inputs), "step")  # noqa: B023
                self.time(f"decode, compiled, {mode}", lambda: decode(inputs[0]), "decode")  # noqa: B023

    def float8(self) -> None:
        """The step's large linear layers in 8 bits, the rest in bfloat16, beside all in bfloat16; on the kernels.

        Once with the rounding left to torch: what its kernel gains.
        """
        from fulgurite.kernels import cuda

        unet = random_weights(self.work, torch.bfloat16, self.device).unet
        fuse(unet)
        cuda.accelerate(unet)
        inputs = self.inputs(unet=unet)
        wanted = unet(*inputs)
        self.time("step, Triton, bfloat16", lambda: unet(*inputs), "step")
        float8.accelerate(unet)
        self.time("step, Triton, float8, rounded by torch", lambda: unet(*inputs), "step")
        cuda.accelerate(unet)
        self.report.row("float8, relative error of the step", step=relative_error(unet(*inputs), wanted))
        self.time("step, Triton, float8", lambda: unet(*inputs), "step")
        self.needs_cuda()
        graphed = GraphedUNet(unet)
        self.time("step, graph, float8", lambda: graphed(*inputs), "step")

    def diffusers(self) -> None:
        """The same networks in diffusers, as its users run them and compiled."""
        try:
            from peers.diffusers_way import DiffusersWay
        except ImportError as error:
            raise Skip(f"diffusers cannot be imported: {error}") from None
        networks = random_weights(self.work, self.dtype, self.device)
        work = replace(self.work, load=lambda work, dtype: networks, request=replace(self.work.request, num_steps=4))
        for name, options in (("eager", {}), ("compiled", {"channels_last": True, "compiled": True})):
            with self.report.stage(f"diffusers, {name}"):
                if options:
                    self.needs_cuda()
                way = DiffusersWay(work, self.dtype, device=self.device, **options)
                way.draw()
                found = [way.draw()[1] for _ in range(self.repeats)]
                middle = {part: 1000 * statistics.median(each[part] for each in found) for part in found[0]}
                self.report.row(f"diffusers, {name}, 4 steps", **middle)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def against_targets(report: Report) -> None:
    """The best of all ways beside what is aimed at."""
    rows = report.results
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
    unet = UNetConfig(4, 4, (16, 32), 1, (0, 1), 16, 320, 16, 192, 8)
    vae = VAEConfig(3, 4, (4, 4, 4, 4, 8), 1, 4, 1.0)
    of_model = replace(small, unet=unet, vae=vae, native_shapes=(), preview_rgb=(), schedules=STEPS)
    return replace(sdxl(256), card=of_model)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="the folder for results.jsonl and log.txt")
    arguments.add_argument("--minutes", type=float, default=8.5, help="after which no stage is begun")
    arguments.add_argument("--smoke", action="store_true", help="a tiny run on the CPU, with TRITON_INTERPRET=1")
    given = arguments.parse_args()
    if not given.smoke and not torch.cuda.is_available():
        sys.exit("There is no GPU here: --smoke runs a tiny model on the CPU.")
    report = Report(given.out, given.minutes)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    report.row("machine", device=name, torch=torch.__version__, python=platform.python_version())
    if given.smoke:
        bench = Bench(report, smoke_work(), "cpu", torch.float32, repeats=1)
    else:
        bench = Bench(report, sdxl(1024), "cuda", torch.float16, repeats=7)
    with torch.inference_mode():
        stages = [
            ("ceiling", lambda: report.row("ceiling", flops=matrix_ceiling(bench.device, bench.dtype))),
            ("the kernels' own check", bench.kernels_are_right),
            ("eager", bench.eager),
            ("pictures, eager", lambda: bench.pictures("eager", graphs=False, batches=[1], all_steps=[1, 4])),
            ("Triton kernels", bench.triton),
            ("graphs", bench.graphs),
            (
                "pictures, graphs",
                lambda: bench.pictures("Triton and graphs", graphs=True, batches=bench.batches, all_steps=bench.steps),
            ),
            ("float8", bench.float8),
            ("overlap", bench.overlap),
            ("attention", bench.attention),
            ("compiled", lambda: bench.compiled("default", "reduce-overhead")),
            ("diffusers", bench.diffusers),
            ("compiled by trying out", lambda: bench.compiled("max-autotune-no-cudagraphs")),  # minutes of it: last
        ]
        for name, measure in stages:
            with report.stage(name):
                report.look_at_the_clock()
                report.say(f"--- {name}")
                measure()
    report.row("peak memory", bytes=peak_memory(bench.device))
    against_targets(report)
    if failed := [name for name, row in report.results.items() if "failed" in row]:
        sys.exit(f"These failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
