"""`hidiff deblur`: blurry image files in, sharp ones out.

H, W pixels · C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha
"""

import argparse
import errno
import glob
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tqdm import tqdm

from ..image_files import (
    FORMATS,
    IMAGE_SUFFIXES,
    ImageFile,
    UnreadableImageError,
    over_white,
    read_image,
    stored_size,
    write_image,
)
from ..image_processor import postprocess, preprocess
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..schedulers.compatibility import check_scheduler
from ..schedulers.names import named_classes, scheduler_class
from ..utils.allocator import keep_freed_memory
from . import DEVICES, CommandError, at_least, first_line, load_pipeline, pick_device, quiet_diffusers

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

Exit status: 0 all done, 1 some images failed, 2 nothing could begin, 130 interrupted.
"""


@dataclass(frozen=True)
class Job:
    """One image to restore.

    Args:
        source: The blurry image.
        output: Where the restored one goes.
        comparison: Where both go side by side, if anywhere.
    """

    source: Path
    output: Path
    comparison: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """What is written, the restored image last: where it stands, all is done."""
        return (self.output,) if self.comparison is None else (self.comparison, self.output)


class DiskFullError(Exception):
    """No image after this one could be written either."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "deblur",
        help="restore image files",
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
    """What `ready_pipeline` and `run_pipeline` need to know."""
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


def run(options: argparse.Namespace) -> int:
    """Restores what `options` name; returns the exit status."""
    # 1. Refuse before any work is done
    jobs, unmatched = plan(options.inputs, options.output, options.format, options.compare)
    refuse_clashes(jobs)
    device = pick_device(options.device)
    pipeline = ready_pipeline(device, options)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"The folder {str(options.output)!r} cannot be made: {error.strerror}") from error

    # 2. Restore what is not there yet
    for problem in unmatched:
        print(problem, file=sys.stderr)
    todo = [job for job in jobs if options.overwrite or not all(file.exists() for file in job.files)]
    with tqdm(total=len(todo), unit=" images", file=sys.stderr) as bar:
        restorer = Restorer(pipeline, options, bar)
        start, stopped = time.perf_counter(), None
        try:
            for batch in batches(todo, options.batch_size):
                restorer.restore(batch)
        except DiskFullError as error:
            stopped = (1, f"Stopped, {error}")
        except KeyboardInterrupt:
            stopped = (130, "Interrupted")
        seconds = time.perf_counter() - start

    # 3. Say what was done
    if stopped is not None:
        status, reason = stopped
        print(f"{reason}: {restorer.restored} of {len(todo)} images were restored.", file=sys.stderr)
        return status
    failed = len(unmatched) + restorer.failed
    skipped = len(jobs) - len(todo)
    counts = f"{restorer.restored} restored, {skipped} skipped{' (already there)' if skipped else ''}, {failed} failed"
    speed = f" ({seconds / restorer.restored:.2f} s per image)" if restorer.restored else ""
    print(f"{counts}; in {options.output}{speed}")
    return 1 if failed else 0


# Which files


def plan(inputs: Sequence[str], output: Path, file_format: str, compare: bool) -> tuple[list[Job], list[str]]:
    """What to restore, and a line for each input that is nothing to restore.

    Raises:
        CommandError: There is nothing to restore at all.
    """
    jobs: dict[tuple[Path, Path], Job] = {}  # an image that was named twice is restored once
    unmatched = []
    for argument in inputs:
        found = find_images(argument, output)
        for source, below in found:
            target = output / output_name(below, file_format)
            comparison = target.with_name(f"{target.stem}.compare.png") if compare else None
            jobs[source.resolve(), target] = Job(source, target, comparison)
        if not found:
            holds_none = f"no image in it ({' '.join(IMAGE_SUFFIXES)})"
            unmatched.append(f"{argument}: {holds_none if Path(argument).is_dir() else 'no such file'}")
    if not jobs:
        raise CommandError(f"There is nothing to restore: {'; '.join(unmatched)}.")
    return list(jobs.values()), unmatched


def find_images(argument: str, output: Path) -> list[tuple[Path, Path]]:
    """The files that one INPUT means, each with its path below the output folder; sorted.

    In a folder, or where a pattern finds them, files of other kinds, hidden files and what an earlier run wrote to
    `output` are left out.
    """
    path = Path(argument)
    if path.is_dir():
        root, found = path, sorted(path.rglob("*"))
    elif path.exists():
        return [(path, Path(path.name))]
    else:
        fixed = takewhile(lambda part: not set(part) & set("*?["), path.parts[:-1])
        root, found = Path(*fixed), sorted(Path(file) for file in glob.glob(argument, recursive=True))
    outside, inside = root.resolve(), output.resolve()
    earlier = inside.relative_to(outside) if inside != outside and inside.is_relative_to(outside) else None
    images = []
    for file in found:
        below = file.relative_to(root)
        is_hidden = any(part.startswith(".") for part in below.parts)
        is_earlier = earlier is not None and below.is_relative_to(earlier)
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not is_hidden and not is_earlier:
            images.append((file, below))
    return images


def output_name(name: Path, file_format: str) -> Path:
    """`name` with the suffix that goes with `file_format`; left alone where it is of that format already."""
    suffix = name.suffix.lower()
    if file_format == "same":
        return name if suffix in FORMATS else name.with_suffix(".png")
    wanted = f".{file_format}"
    return name if FORMATS.get(suffix) == FORMATS[wanted] else name.with_suffix(wanted)


def refuse_clashes(jobs: Sequence[Job]) -> None:
    """Refuses to write two images to one file, or to an original.

    Raises:
        CommandError: Naming the files.
    """
    originals = {identity(job.source) for job in jobs}
    written: dict[str, Path] = {}
    for job in jobs:
        for file in job.files:
            if file.exists() and identity(file) in originals:
                raise CommandError(
                    f"{file} is itself an input, and originals are never overwritten; choose another --output."
                )
            other = written.setdefault(os.path.normcase(file), job.source)
            if other != job.source:
                raise CommandError(
                    f"{other} and {job.source} would both be written to {file}; restore them separately."
                )


def identity(file: Path) -> tuple[int, int]:
    """The file itself, whatever links and spellings lead to it."""
    status = file.stat()
    return status.st_dev, status.st_ino


def batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    """`size` jobs at a time, those of one image size together."""
    if size > 1:
        jobs = sorted(jobs, key=lambda job: stored_size(job.source))
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


# The pipeline


def ready_pipeline(device: str, options: argparse.Namespace) -> HIDiffPipeline:
    """The pipeline on its device, tried on a tiny image with the options of this run.

    Raises:
        CommandError: Options that cannot work.
    """
    if device == "cpu":
        keep_freed_memory()
    pipeline = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    with quiet_diffusers():  # warns of half precision on the CPU
        pipeline.to(device)
    if options.scheduler is not None:
        pipeline.scheduler = make_scheduler(pipeline.scheduler, options.scheduler)
    for network in (pipeline.transformer, pipeline.condition_encoder):
        if options.local_statistics == 0:
            network.disable_local_statistics()
        elif options.local_statistics is not None:
            try:
                network.enable_local_statistics(options.local_statistics)
            except ValueError as error:
                raise CommandError(f"--local_statistics cannot be so: {first_line(error)}") from error
    gradient = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    try:
        (restored,) = run_pipeline(pipeline, [gradient], options)
    except Exception as error:  # whatever a scheduler, a dtype or a device does not support
        raise CommandError(f"The model does not run with these options: {first_line(error)}") from error
    if not np.isfinite(restored).all():
        raise CommandError(f"With --dtype {options.dtype} the model returns no numbers (NaN).")
    return pipeline


def make_scheduler(current: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler that `name` means, made from the config of the current one.

    Raises:
        CommandError: None is called so, or it does not fit the model.
    """
    known, kind = known_schedulers(current), scheduler_class(name)
    for scheduler in known.values():
        if type(scheduler) is kind:
            return scheduler
    raise CommandError(f"--scheduler must be one of {', '.join(sorted(known))}, got {name!r}.")


def known_schedulers(current: SchedulerMixin) -> dict[str, SchedulerMixin]:
    """Short name -> scheduler made from the config of `current`, for all that fit it."""
    known = {}
    for name, kind in named_classes():
        try:
            with quiet_diffusers():
                scheduler = kind.from_config(current.config)
            check_scheduler(scheduler, 1)
        except (ValueError, ImportError):  # refused, or in need of another library
            continue
        known[name] = scheduler
    return known


def run_pipeline(
    pipeline: HIDiffPipeline, images: Sequence[PIL.Image.Image | np.ndarray], options: argparse.Namespace
) -> list[np.ndarray]:
    """The restored images, each [H, W, C] float32 in [0, 1] and as if it were alone."""
    (restored,) = pipeline(
        list(images),
        options.steps,
        generator=[torch.Generator().manual_seed(options.seed) for _ in images],
        output_type="np",
        num_priors=options.num_priors,
        average=options.average,
        self_ensemble=options.self_ensemble,
        return_dict=False,
    )
    return list(restored)


class Restorer:
    """Reads, restores and writes images; counts, and tells what failed."""

    def __init__(self, pipeline: HIDiffPipeline, options: argparse.Namespace, bar: tqdm) -> None:
        self.pipeline = pipeline
        self.options = options
        self.bar = bar
        self.restored = self.failed = 0

    def restore(self, jobs: Sequence[Job]) -> None:
        """Restores one batch; an image that fails does not keep the others from being restored.

        Raises:
            DiskFullError: There is no room for an image.
        """
        batch = []
        for job in jobs:
            try:
                batch.append((job, read_image(job.source)))
            except UnreadableImageError as error:
                self.fail(job, first_line(error))
        if batch:
            self.restore_images(batch)

    def restore_images(self, batch: Sequence[tuple[Job, ImageFile]]) -> None:
        images = [blurry.image for _, blurry in batch]
        try:
            results = run_pipeline(self.pipeline, images, self.options)
        except (RuntimeError, ValueError, MemoryError) as error:  # of PyTorch, too, when memory does not suffice
            if len(batch) == 1:
                self.fail(batch[0][0], first_line(error))
                return
            for single in batch:
                self.restore_images([single])
            return
        for (job, blurry), restored in zip(batch, results, strict=True):
            self.write(job, blurry, restored)

    def write(self, job: Job, blurry: ImageFile, restored: np.ndarray) -> None:
        if not np.isfinite(restored).all():
            self.fail(job, f"the model returned no numbers (NaN) with --dtype {self.options.dtype}")
            return
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            for file in job.files:
                if file.exists() and not self.options.overwrite:
                    continue
                if file == job.comparison:
                    picture = side_by_side(as_blurry(blurry), restored)
                    write_image(file, picture, icc_profile=blurry.icc_profile)
                else:
                    write_image(file, as_integers(restored, blurry.bits), blurry.exif, blurry.icc_profile)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"no room left for {job.output}") from error
            self.fail(job, f"cannot be written: {(error.strerror or str(error)).lower()}")
        except ValueError as error:
            self.fail(job, f"cannot be written: {first_line(error)}")
        else:
            self.restored += 1
            self.bar.update()

    def fail(self, job: Job, reason: str) -> None:
        self.failed += 1
        self.bar.write(f"{job.source}: {reason}", file=sys.stderr)
        self.bar.update()


# Pixels


def as_integers(pixels: np.ndarray, bits: int) -> np.ndarray:
    """[0, 1] as uint8 or uint16."""
    return (pixels * (2**bits - 1)).round().astype(np.uint16 if bits == 16 else np.uint8)


def as_blurry(blurry: ImageFile) -> np.ndarray:
    """The image as the pipeline returns it when it changes nothing, [H, W, C] in [0, 1]."""
    (picture,) = preprocess(blurry.image)
    return np.asarray(postprocess([picture.pixels], [picture], "np"))[0]


def side_by_side(blurry: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """Both images on white, each under its name; [H, W, C] in [0, 1] in, uint8 RGB out."""
    height, width = blurry.shape[:2]
    text_size = max(16, min(height, width) // 24)
    font = PIL.ImageFont.load_default(text_size)
    gap, top = text_size // 2, 2 * text_size
    column = max(width, round(font.getlength("restored")))  # a name may be wider than a tiny image
    canvas = PIL.Image.new("RGB", (2 * column + 3 * gap, top + height + gap), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for name, pixels, left in (("blurry", blurry, gap), ("restored", restored, 2 * gap + column)):
        draw.text((left, top // 2), name, fill="black", font=font, anchor="lm")
        rgb = np.broadcast_to(over_white(pixels), (height, width, 3))
        canvas.paste(PIL.Image.fromarray(as_integers(rgb, 8)), (left, top))
    return np.asarray(canvas)
