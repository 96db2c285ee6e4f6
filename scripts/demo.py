"""Deblurs the sample photo with the bundled model and shows what it did.

    python scripts/demo.py --output demo_output [--device auto]

The photo is one of the GoPro data set's, so the sharp one is known and the gain can be measured.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from diffusers_hidiff import HIDIFF_SMALL, HIDiffPipeline
from diffusers_hidiff.cli.restorer import side_by_side
from diffusers_hidiff.data.paired_images import read_rgb
from diffusers_hidiff.metrics.psnr import psnr_of_arrays
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
    restored = np.asarray(pipeline(blurry, generator=torch.Generator().manual_seed(0), return_dict=False)[0][0])
    seconds = time.perf_counter() - start

    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "compare.png"
    PIL.Image.fromarray(restored).save(options.output / "restored.png")
    PIL.Image.fromarray(side_by_side(blurry / 255, restored / 255)).save(picture)

    print(f"PSNR  blurry {psnr_of_arrays(blurry, sharp):.2f} dB -> restored {psnr_of_arrays(restored, sharp):.2f} dB")
    print(f"Time  {seconds:.1f} s for {blurry.shape[1]}x{blurry.shape[0]} pixels on {options.device}")
    print(f"Look  {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
