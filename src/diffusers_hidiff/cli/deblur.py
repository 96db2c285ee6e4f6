"""`hidiff deblur`: blurry image files in, sharp ones out."""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile

from tqdm import tqdm

from ..image_files import IMAGE_SUFFIXES
from . import DEVICES, CommandError, at_least
from .jobs import batches, plan, refuse_clashes

EPILOG = f"""
INPUT may be a file, a folder (searched with its subfolders for {" ".join(IMAGE_SUFFIXES)};
hidden files are left out) or a pattern such as 'photos/**/*.jpg'. Folders are mirrored under DIR.

An output bears its input's name. With --format same, PNG, JPEG, WebP and TIFF stay what they are
and every other kind becomes PNG.

Kept: EXIF (the image is turned upright and its orientation says so), colour profile, alpha, grey,
and 16 bits a channel in PNG and TIFF. JPEG and WebP have 8 bits (quality 95, JPEG in 4:4:4). JPEG
has no alpha: transparent parts become white. Palettes become RGB, CMYK becomes RGB without its
profile. Animations and files of several pages are refused.

Each image gets its own random numbers from --seed, so the result does not depend on which other
images are restored, in what order or in batches of what size.

Images are decoded and encoded while the network runs. `torchrun --nproc_per_node N -m
diffusers_hidiff deblur …` (or accelerate launch) shares the files among N processes, on N GPUs
where there are so many (untried; two processes on CPUs are tested). All must see INPUT and DIR.

Exit status: 0 all done, 1 some images failed, 2 nothing could begin, 130 interrupted.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "deblur",
        description="Restores blurry image files. Originals are never changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or pattern")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write to")
    add_pipeline_options(parser)
    add("--batch_size", type=at_least(1), default=1, metavar="N", help="images of one size run together (default: 1)")
    add("--format", choices=("same", "png", "jpg", "webp", "tiff"), default="same", help="default: same")
    add("--overwrite", action="store_true", help="restore again what is already in DIR")
    add("--compare", action="store_true", help="also write NAME.compare.png, blurry and restored side by side")
    parser.set_defaults(run=run)


def add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    """What `pipeline.ready_pipeline` and `run_pipeline` need to know."""
    add = parser.add_argument
    add("--model", help="folder or Hub id of a pipeline (default: the bundled checkpoint)")
    add("--device", choices=("auto", *DEVICES), default="auto", help="default: auto, the first of cuda, mps, cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    add("--steps", type=at_least(1), metavar="N", help="steps of the diffusion (default: as many as in training)")
    add("--scheduler", metavar="NAME", help="another scheduler, e.g. ddim or euler (default: the model's)")
    add("--seed", type=at_least(0), default=0, help="default: 0")
    add(
        "--num_priors",
        type=at_least(1),
        default=1,
        metavar="N",
        help="priors drawn per image and averaged (default: 1)",
    )
    add("--average", choices=("prior", "image"), default="prior", help="what --num_priors averages (default: prior)")
    add("--self_ensemble", action="store_true", help="average over flips and rotations, in eight times the time")
    add(
        "--local_statistics",
        type=at_least(0),
        metavar="WINDOW",
        help="attention and pooling over windows of so many pixels, 0 for the whole image (default: the model's own setting)",
    )
    add(
        "--max_memory",
        metavar="SIZE",
        help="most memory to use, e.g. 4GB or 800MB; slower where it is tight, the same picture (default: what is free)",
    )
    add("--tile", type=at_least(8), metavar="N", help="restore tiles of N pixels apart: little memory, another picture")
    add("--tile_overlap", type=at_least(0), default=64, metavar="N", help="pixels that tiles share (default: 64)")


def run(options: argparse.Namespace) -> int:
    """Restores what `options` name; returns the exit status."""
    # 1. Refuse before any work is done, and before torch and diffusers are loaded
    jobs, unmatched = plan(options.inputs, options.output, options.format, options.compare)
    refuse_clashes(jobs)
    todo = [job for job in jobs if options.overwrite or not all(file.exists() for file in job.files)]

    from accelerate.utils import gather_object  # noqa: PLC0415

    from .pipeline import pick_device, ready_pipeline, start_processes  # noqa: PLC0415
    from .restorer import Restorer  # noqa: PLC0415

    state = start_processes(pick_device(options.device))
    pipeline = ready_pipeline(str(state.device), options)
    make_folder(options.output)
    state.wait_for_everyone()  # all have looked at what is there before anybody writes

    # 2. Restore what is not there yet, each process its share
    share = list(batches(todo, options.batch_size))[state.process_index :: state.num_processes]
    total, whose = sum(map(len, share)), "" if state.num_processes == 1 else f" of process {state.process_index}"
    if state.is_main_process:
        for problem in unmatched:
            print(problem, file=sys.stderr)
    start = time.perf_counter()
    with tqdm(total=total, unit=f" images{whose}", file=sys.stderr, disable=not state.is_main_process) as bar:
        restorer = Restorer(pipeline, options, bar)
        try:
            restorer.restore(share)
        except KeyboardInterrupt:
            bar.close()
            print(f"Interrupted: {restorer.restored} of {total} images{whose} were restored.", file=sys.stderr)
            return 130
    outcomes = gather_object([(restorer.restored, restorer.failed, restorer.stopped)])
    seconds = time.perf_counter() - start

    # 3. Say what was done
    if not state.is_main_process:
        return 0
    restored, failed, stops = zip(*outcomes, strict=True)
    if any(stops):
        reason = next(filter(None, stops))
        print(f"Stopped, {reason}: {sum(restored)} of {len(todo)} images were restored.", file=sys.stderr)
        return 1
    return summarise(options.output, sum(restored), len(jobs) - len(todo), len(unmatched) + sum(failed), seconds)


def make_folder(folder: Path) -> None:
    """
    Raises:
        CommandError: It cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"The folder {str(folder)!r} cannot be made: {error.strerror}") from error
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CommandError(f"The folder {str(folder)!r} cannot be written to: {error.strerror}") from error


def summarise(output: Path, restored: int, skipped: int, failed: int, seconds: float) -> int:
    """Prints what was done; returns the exit status."""
    counts = f"{restored} restored, {skipped} skipped{' (already there)' if skipped else ''}, {failed} failed"
    speed = f" ({seconds / restored:.2f} s per image)" if restored else ""
    print(f"{counts}; in {output}{speed}")
    return 1 if failed else 0
