"""How much of the time the device is busy while `hidiff deblur` restores a folder of JPEGs.

    python benchmarks/folder_throughput.py [--images 12] [--size 1280x720] [--threads 1] [--device cpu] [--output table.md]

Three ways to restore the same files with the bundled model: the network alone on images in memory; read, restore, write
one after the other; and as the command does it. `--threads 1` leaves the other cores of a machine without an accelerator
to decoding and encoding.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import show
from tqdm import tqdm

from diffusers_hidiff.cli.deblur import add_pipeline_options
from diffusers_hidiff.cli.info import image_size
from diffusers_hidiff.cli.jobs import Job, batches
from diffusers_hidiff.cli.pipeline import ready_pipeline, run_pipeline
from diffusers_hidiff.cli.restorer import Restorer
from diffusers_hidiff.data.paired_images import read_rgb
from diffusers_hidiff.image_files import read_image, write_image
from diffusers_hidiff.image_processor import to_integers

SAMPLE = Path(__file__).resolve().parents[1] / "docs" / "sample" / "blurry.png"


def write_photos(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """So many JPEGs of the sample photo, continued by reflection to the size; each a little different."""
    photo = read_rgb(SAMPLE)
    files = [folder / f"{number:03}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        shifted = np.roll(photo, 16 * number, axis=1)
        missing = ((0, max(0, height - len(photo))), (0, max(0, width - photo.shape[1])), (0, 0))
        write_image(file, np.pad(shifted, missing, mode="symmetric")[:height, :width])
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=image_size, default=(1280, 720), metavar="WxH")
    parser.add_argument("--threads", type=int, help="threads of the network on the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to write the table to as well")
    add_pipeline_options(parser)
    parser.set_defaults(device="cpu")
    options = parser.parse_args(arguments)
    options.overwrite = True
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pipeline = ready_pipeline(options.device, options)

    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder), options.images, *options.size)
        output = Path(folder, "out")
        output.mkdir()
        decoded = [read_image(file).image for file in files]

        def network_alone() -> None:
            for image in decoded:
                run_pipeline(pipeline, [image], options)

        def one_after_the_other() -> None:
            for file in files:
                blurry = read_image(file)
                (restored,) = run_pipeline(pipeline, [blurry.image], options)
                write_image(output / file.name, to_integers(restored, 8), blurry.exif, blurry.icc_profile)

        def as_the_command() -> None:
            jobs = [Job(file, output / file.name, None) for file in files]
            restorer = Restorer(pipeline, options, tqdm(disable=True))
            restorer.restore(batches(jobs, 1))
            assert restorer.restored == len(files)

        ways: dict[str, Callable[[], None]] = {
            "network alone": network_alone,
            "one after the other": one_after_the_other,
            "hidiff deblur": as_the_command,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):  # in turns, so that a disturbance meets all of them
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)

    lines = ["| way | images/s | of the network alone |", "|---|---|---|"]
    alone = statistics.median(seconds["network alone"])
    for name, measured in seconds.items():
        median = statistics.median(measured)
        lines.append(f"| {name} | {options.images / median:.3f} | {alone / median:.1%} |")
    show("\n".join(lines), options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
