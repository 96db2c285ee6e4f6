"""Speed and memory of stage 2 with our transformer against a literal transcription of it, side by side in one run.

    python benchmarks/training_speed.py [--networks full small] [--sizes 128 256] [--batch_size 1] [--output table.md]
    python benchmarks/training_speed.py --device cuda --batch_size 8   # images/s: bf16 compiled against float32 eager

A step is what train_stage2.py does between two batches: loss, backward, clipping, AdamW. Both have the same weights and see
the same batch in float32; encoders, denoiser and optimiser are the same code. "full" is the published GoPro size.
"""

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import literal_of, official
from measure import peak_megabytes, show
from torch import nn

from diffusers_hidiff import HIDIFF_SMALL, HIDiffLatentEncoder, HIDiffPipeline
from diffusers_hidiff.conversion import networks_from_original, scheduler_of
from diffusers_hidiff.losses import stage2_loss
from diffusers_hidiff.utils.allocator import keep_freed_memory

ARMS = ("literal", "ours")
MAX_GRAD_NORM, LEARNING_RATE = 0.01, 1e-6


def build(networks: str) -> dict[str, Any]:
    """The arguments of `stage2_loss` but for the batch: "full" with stand-in weights, or "small", the bundled model."""
    if networks == "small":
        pipeline = HIDiffPipeline.from_pretrained(HIDIFF_SMALL)
        teacher = HIDiffLatentEncoder.from_pretrained(HIDIFF_SMALL, subfolder="latent_encoder")
        parts = {name: getattr(pipeline, name) for name in ("condition_encoder", "denoiser", "transformer")}
        return {"latent_encoder": teacher, **parts, "scheduler": pipeline.scheduler}
    weights = {name: official.state_dict("gopro", name) for name in official.KEYS["gopro"]}
    return {**networks_from_original(weights), "scheduler": scheduler_of("gopro")}


@dataclass
class Step:
    """One step of stage 2, again and again on the same batch.

    Args:
        arm: "literal" or "ours".
        networks: "full" or "small".
        size: Height and width of a patch.
        batch_size: Patches.
        device: Where.
        compiled_bf16: Whether the networks are compiled and run under bfloat16's autocast.
    """

    arm: str
    networks: str
    size: int
    batch_size: int
    device: str = "cpu"
    compiled_bf16: bool = False

    def __post_init__(self) -> None:
        self.parts = build(self.networks)
        if self.arm == "literal":
            self.parts["transformer"] = literal_of(self.parts["transformer"])
        self.parts["latent_encoder"].requires_grad_(False)
        modules = [part.to(self.device).train() for part in self.parts.values() if isinstance(part, nn.Module)]
        if self.compiled_bf16:
            for module in modules:
                module.compile()
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)

    def batch(self, size: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, self.batch_size, 3, size, size, generator=generator)
        noise = torch.randn(self.batch_size, 16, self.parts["denoiser"].config.prior_dim, generator=generator)
        parts = zip(("blurry", "sharp", "noise"), (*images, noise), strict=True)
        return {name: part.to(self.device) for name, part in parts}

    def run(self, size: int | None = None) -> tuple[float, float]:
        """Loss and gradient norm of a step, on patches of another size if asked to."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.compiled_bf16):
            loss = stage2_loss(**self.parts, **self.batch(size or self.size)).total
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()  # waits for a GPU


def timed(step: Step) -> float:
    start = time.perf_counter()
    step.run()
    return time.perf_counter() - start


def memory(*arguments: Any) -> float:
    """Megabytes that two steps add to the peak of this process, which has trained on patches of 32 pixels before.

    With the default allocator, which hands what is freed back to the system: the peak is that of tensors in use.
    """
    step = Step(*arguments)
    step.run(size=32)  # code and AdamW's averages are there now
    before = peak_megabytes()
    for _ in range(2):
        step.run()
    return peak_megabytes() - before


def in_child(function: Any, *arguments: Any) -> Any:
    """In a process of its own. It inherits this one's peak: ask before anything large is made here."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def times(networks: str, size: int, batch_size: int, repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of a step of each arm, taken in turns, and how far loss and gradient norm differ, relatively."""
    keep_freed_memory()
    steps = {arm: Step(arm, networks, size, batch_size) for arm in ARMS}
    first, second = (step.run() for step in steps.values())  # warms up as well
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm, step in steps.items():
            seconds[arm].append(timed(step))
    difference = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    return {arm: statistics.median(values) for arm, values in seconds.items()}, difference


def on_cpu(options: argparse.Namespace) -> list[str]:
    lines = [
        f"Stage 2, float32, batch {options.batch_size}, {torch.get_num_threads()} thread(s), torch {torch.__version__},"
        f" {platform.machine()}; median of {options.repeats} steps, in turns.",
        "",
        "| network | size | literal, s | ours, s | faster | literal, MB | ours, MB | less | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for networks in options.networks:
        for size in options.sizes:
            peak = {arm: in_child(memory, arm, networks, size, options.batch_size) for arm in ARMS}
            seconds, difference = in_child(times, networks, size, options.batch_size, options.repeats)
            lines.append(
                f"| {networks} | {size}x{size} | {seconds['literal']:.2f} | {seconds['ours']:.2f}"
                f" | {seconds['literal'] / seconds['ours']:.2f}x | {peak['literal']:.0f} | {peak['ours']:.0f}"
                f" | {peak['literal'] / peak['ours']:.2f}x | {difference:.0e} |"
            )
            print(lines[-1], file=sys.stderr)
    return [
        *lines,
        "",
        "MB: what two steps add to the peak resident memory of a fresh process that has trained on patches of 32 pixels,",
        "with the default allocator. Seconds: with `keep_freed_memory`, as the training scripts set it, for both.",
        "Difference: of the first step's loss and gradient norm, relative.",
    ]


def on_gpu(options: argparse.Namespace) -> list[str]:
    lines = [
        f"Stage 2, ours, batch {options.batch_size}, torch {torch.__version__}, {torch.cuda.get_device_name()};"
        f" median of {options.repeats} steps.",
        "",
        "| network | size | float32 eager, images/s | bf16 compiled, images/s | faster | float32, GiB | bf16, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for networks in options.networks:
        for size in options.sizes:
            rates, peaks = [], []
            for compiled in (False, True):
                torch.cuda.reset_peak_memory_stats()
                step = Step("ours", networks, size, options.batch_size, "cuda", compiled)
                for _ in range(3):
                    step.run()
                rates.append(options.batch_size / statistics.median(timed(step) for _ in range(options.repeats)))
                peaks.append(torch.cuda.max_memory_allocated() / 2**30)
                del step
            lines.append(
                f"| {networks} | {size}x{size} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.2f}x"
                f" | {peaks[0]:.2f} | {peaks[1]:.2f} |"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=["full", "small"], default=["full", "small"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256], help="height and width, multiples of 8")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many steps is reported")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda is untried")
    parser.add_argument("--output", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    table = "\n".join((on_gpu if options.device == "cuda" else on_cpu)(options))
    show(table, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
