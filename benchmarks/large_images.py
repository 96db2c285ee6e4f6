"""Pictures whose features do not fit into memory, restored by `hidiff deblur --max_memory`, each in a process of its own.

    python benchmarks/large_images.py [--runs small:12240x8160:4GB full:3840x2160:4GB] [--output docs/results/large_images.md]

`small` is the bundled checkpoint, `full` the published GoPro size with random weights. The picture is the sample photo,
enlarged, as a JPEG. Memory is what the system cannot take back from the process; beside it stands the resident set, which
counts cached pages of the files that hold the features. How far the streamed picture is from that of whole feature maps is
measured at 640x480, where both fit.
"""

import argparse
import contextlib
import multiprocessing
import platform
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from measure import peak_megabytes, show

from diffusers_hidiff import (
    HIDIFF_SMALL,
    HIDiffLatentEncoder,
    HIDiffMixerDenoiser,
    HIDiffPipeline,
    HIDiffScheduler,
    HIDiffTransformer,
)
from diffusers_hidiff.cli.main import main as hidiff
from diffusers_hidiff.models.memory import format_memory, parse_memory, used_memory

SAMPLE = Path(__file__).resolve().parents[1] / "docs" / "sample" / "blurry.png"
CPU, MB = torch.device("cpu"), 2**20


@dataclass(frozen=True)
class Run:
    """One picture: model ("small" or "full"), width, height, and the limit in bytes."""

    model: str
    width: int
    height: int
    max_memory: int

    @classmethod
    def parse(cls, text: str) -> "Run":
        """MODEL:WIDTHxHEIGHT:LIMIT."""
        model, size, limit = text.split(":")
        if model not in ("small", "full"):
            raise ValueError(model)
        width, height = map(int, size.split("x"))
        return cls(model, width, height, parse_memory(limit))


def model_folder(model: str, folder: Path) -> Path:
    """Where the pipeline of that name is saved; a random one is made in `folder`."""
    if model == "small":
        return HIDIFF_SMALL
    torch.manual_seed(0)
    networks = HIDiffLatentEncoder(), HIDiffMixerDenoiser(), HIDiffScheduler(), HIDiffTransformer()
    HIDiffPipeline(*networks).save_pretrained(folder / "full")
    return folder / "full"


def write_picture(file: Path, width: int, height: int) -> None:
    with PIL.Image.open(SAMPLE) as sample:
        sample.convert("RGB").resize((width, height), PIL.Image.Resampling.BICUBIC).save(file, quality=95)


def restore(run: Run, folder: Path) -> dict[str, float]:
    """Seconds, and the peaks of both kinds of memory in MB, of `hidiff deblur` in this process."""
    picture = folder / "picture.jpg"
    peak, working = 0, True

    def watch() -> None:
        nonlocal peak
        while working:
            peak = max(peak, used_memory(CPU))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    options = ["--model", str(model_folder(run.model, folder)), "--max_memory", str(run.max_memory), "--device", "cpu"]
    try:
        status = hidiff(["deblur", str(picture), "--output", str(folder / "restored"), *options])
    finally:
        working = False
        watcher.join()
    if status:
        raise RuntimeError(f"hidiff deblur ended with status {status}.")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak / MB, "resident": peak_megabytes()}


def largest_difference(model: str, folder: Path) -> float:
    """Of a pixel in [0, 1] between the picture from whole feature maps and the one from a file, at 640x480."""
    pipeline = HIDiffPipeline.from_pretrained(model_folder(model, folder))
    pipeline.set_progress_bar_config(disable=True)
    with PIL.Image.open(SAMPLE) as sample:
        image = sample.convert("RGB").resize((640, 480))
    images = []
    for whole in (True, False):
        pipeline.limit_memory(None if whole else used_memory(CPU) + 64 * MB)  # features of `small` take 69
        if whole:
            pipeline.condition_encoder.disable_slicing()
            pipeline.transformer.disable_slicing()
        images.append(pipeline(image, generator=torch.Generator().manual_seed(0), output_type="np").images)
    return float(np.abs(images[0] - images[1]).max())


def in_child(function, *arguments):  # type: ignore[no-untyped-def]
    """Calls a function in a fresh process, so that memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [Run.parse("small:12240x8160:4GB"), Run.parse("full:3840x2160:4GB")]
    parser.add_argument("--runs", nargs="+", type=Run.parse, default=default, metavar="MODEL:WxH:LIMIT")
    parser.add_argument("--output", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)

    lines = [
        f"`hidiff deblur --max_memory LIMIT`, float32, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{platform.machine()}.",
        "",
        "| model | picture | megapixels | limit | seconds | peak memory, MB | resident with cached files, MB "
        "| largest difference to whole feature maps, at 640x480 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in options.runs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            in_child(write_picture, folder / "picture.jpg", run.width, run.height)
            found = in_child(restore, run, folder)
            with contextlib.redirect_stdout(sys.stderr):
                difference = in_child(largest_difference, run.model, folder)
        lines.append(
            f"| {run.model} | {run.width}x{run.height} | {run.width * run.height / 1e6:.1f} "
            f"| {format_memory(run.max_memory)} | {found['seconds']:.0f} | {found['peak']:.0f} "
            f"| {found['resident']:.0f} | {difference:.1e} |"
        )
    table = "\n".join(lines)
    show(table, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
