"""Speed and memory of the full-size transformer against a literal transcription of the papers, side by side in one run.

    python benchmarks/transformer_speed.py [--sizes 256x256 512x512] [--repeats 3] [--keep_freed_memory] [--output table.md]

Both have the same weights (float32, the published GoPro size) and see the same image.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import official
from literal import LiteralTransformer

from diffusers_hidiff.conversion import from_original
from diffusers_hidiff.utils.allocator import keep_freed_memory

Size = tuple[int, int]
Forward = Callable[[Tensor, Tensor], Tensor]
NAMES = ("literal", "ours")


def build(name: str) -> Forward:
    """The transformer of that name with the stand-in weights."""
    weights = official.state_dict("gopro", "net_g")
    if name == "ours":
        model = from_original("net_g", weights)
        return lambda blurry, prior: model(blurry, prior, return_dict=False)[0]
    with torch.device("meta"):
        literal = LiteralTransformer()
    literal.load_state_dict(weights, assign=True)
    return literal.eval()


def inputs(size: Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, *size, generator=generator), torch.randn(1, 16, 256, generator=generator)


@torch.no_grad()
def measure_memory(name: str, size: Size, keep: bool) -> float:
    """Megabytes that one forward pass adds to the peak of a fresh process, which holds the weights already."""
    if keep:
        keep_freed_memory()
    forward, (blurry, prior) = build(name), inputs(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward(blurry, prior)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - before) / (1024 if platform.system() == "Linux" else 1024**2)  # kilobytes there, bytes on macOS


def memory_in_child(name: str, size: Size, keep: bool) -> float:
    """`measure_memory` in a process of its own. It inherits this one's peak: ask before anything large is made here."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_memory, (name, size, keep))


@torch.no_grad()
def measure_time(forwards: dict[str, Forward], size: Size, repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of each, taken in turns, and the largest difference between their outputs."""
    blurry, prior = inputs(size)
    first, second = (forward(blurry, prior) for forward in forwards.values())  # warms up as well
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(repeats):
        for name, forward in forwards.items():
            start = time.perf_counter()
            forward(blurry, prior)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians, (first - second).abs().max().item()


def parse_size(text: str) -> Size:
    height, width = (int(side) for side in text.split("x"))
    if height % 8 or width % 8:
        raise argparse.ArgumentTypeError(f"height and width must be multiples of 8, got {text}")
    return height, width


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(256, 256), (512, 512)], metavar="HxW")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many passes is reported")
    parser.add_argument("--keep_freed_memory", action="store_true", help="call keep_freed_memory() first, for both")
    parser.add_argument("--output", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)

    memory = {
        (name, size): memory_in_child(name, size, options.keep_freed_memory) for size in options.sizes for name in NAMES
    }
    if options.keep_freed_memory:
        keep_freed_memory()
    forwards = {name: build(name) for name in NAMES}

    allocator = "`keep_freed_memory()` for both" if options.keep_freed_memory else "the default allocator"
    lines = [
        f"Transformer, float32, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {platform.machine()}, "
        f"{allocator}; median of {options.repeats}.",
        "",
        "| size | literal, s | ours, s | faster | largest difference | literal, MB | ours, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in options.sizes:
        seconds, difference = measure_time(forwards, size, options.repeats)
        literal, ours = (seconds[name] for name in NAMES)
        lines.append(
            f"| {size[0]}x{size[1]} | {literal:.3f} | {ours:.3f} | {literal / ours:.2f}x | {difference:.1e} "
            f"| {memory['literal', size]:.0f} | {memory['ours', size]:.0f} |"
        )
    lines += [
        "",
        "MB: what one forward pass adds to the peak resident memory of a fresh process that holds the weights.",
    ]
    table = "\n".join(lines)
    print(table)
    if options.output:
        options.output.write_text(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
