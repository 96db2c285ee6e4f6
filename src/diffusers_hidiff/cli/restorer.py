"""Restores image files.

H, W pixels · C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha
"""

import argparse
import errno
import sys
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from tqdm import tqdm

from ..image_files import ImageFile, UnreadableImageError, over_white, read_image, write_image
from ..image_processor import postprocess, preprocess
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from . import first_line
from .jobs import Job
from .pipeline import run_pipeline


class DiskFullError(Exception):
    """No image after this one could be written either."""


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
