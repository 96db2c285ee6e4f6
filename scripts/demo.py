"""Deblurs the sample photo with the bundled model and shows what it did.

    python scripts/demo.py --output demo_output [--device auto]

The photo is one of the GoPro data set's, so the sharp one is known and the gain can be measured.
"""

import argparse
import time
from pathlib import Path

import torch

from diffusers_hidiff import HIDIFF_SMALL, HIDiffPipeline
from diffusers_hidiff.cli.deblur import side_by_side
from diffusers_hidiff.data.paired_images import read_rgb
from diffusers_hidiff.metrics.psnr import psnr
from diffusers_hidiff.utils.allocator import keep_freed_memory

SAMPLES = Path(__file__).parent.parent / "docs" / "sample"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    keep_freed_memory()

    blurry, sharp = (read_rgb(SAMPLES / f"{name}.png") for name in ("blurry", "sharp"))
    pipeline = HIDiffPipeline.from_pretrained(HIDIFF_SMALL).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    restored = pipeline(blurry, generator=torch.Generator().manual_seed(0)).images[0]
    seconds = time.perf_counter() - start

    options.output.mkdir(parents=True, exist_ok=True)
    restored.save(options.output / "restored.png")
    picture = options.output / "compare.png"
    side_by_side(blurry, restored).save(picture)

    def decibels(image: object) -> float:
        a, b = (torch.tensor(read_rgb(image) if isinstance(image, Path) else image).double() for image in (image, sharp))
        return psnr(a[None], b[None], data_range=255).item()

    print(f"PSNR  blurry {decibels(blurry):.2f} dB -> restored {decibels(options.output / 'restored.png'):.2f} dB")
    print(f"Time  {seconds:.1f} s for {blurry.shape[1]}x{blurry.shape[0]} pixels on {options.device}")
    print(f"Look  {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
