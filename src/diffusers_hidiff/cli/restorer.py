"""Restores image files: decodes what comes next and encodes what is done while the network runs.

H, W pixels · C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha
"""

import argparse
import errno
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import Lock

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from tqdm import tqdm

from ..image_files import ImageFile, UnreadableImageError, over_white, read_image, write_image
from ..image_processor import postprocess, preprocess, to_integers
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from . import first_line
from .jobs import Job, pixels_of
from .pipeline import run_pipeline

# How many batches of decoded images may wait for the network, and how many restored images for being written. That is few,
# for memory, and enough: decoding and encoding a JPEG take less than the network. A batch of more than so many pixels
# passes through alone.
BATCHES_AHEAD, IMAGES_BEHIND, MANY_PIXELS = 2, 4, 2**25
PROGRESS_SECONDS = 1.0  # between two looks at a large image

ReadJob = tuple[Job, ImageFile | UnreadableImageError]
HandOn = Callable[[Job, ImageFile, np.ndarray], None]  # takes the restored image


class DiskFullError(Exception):
    """No image after this one could be written either."""


def read_ahead(batches: Iterable[Sequence[Job]]) -> Generator[list[ReadJob], None, None]:
    """The images of each batch, those of the next batches being decoded meanwhile."""
    with ThreadPoolExecutor(BATCHES_AHEAD, "read") as readers:
        ahead: deque[Future[list[ReadJob]]] = deque()
        try:
            for batch in batches:
                alone = pixels_of(batch) > MANY_PIXELS
                while ahead and (alone or len(ahead) > BATCHES_AHEAD):
                    yield ahead.popleft().result()
                ahead.append(readers.submit(read_batch, batch))
                if alone:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def read_batch(jobs: Sequence[Job]) -> list[ReadJob]:
    """Each image, or why it cannot be read."""
    images: list[ReadJob] = []
    for job in jobs:
        try:
            images.append((job, read_image(job.source)))
        except UnreadableImageError as error:
            images.append((job, error))
    return images


class Restorer:
    """Reads, restores and writes images; counts, and tells what failed.

    The network runs in the thread that calls, other threads read and write.

    Args:
        pipeline: On its device.
        options: Of the command.
        bar: Counts the images that are done, restored or failed.
    """

    def __init__(self, pipeline: HIDiffPipeline, options: argparse.Namespace, bar: tqdm) -> None:
        self.pipeline = pipeline
        self.options = options
        self.bar = bar
        self.restored = self.failed = 0
        self.stopped: str | None = None  # why no further image can be written
        self.lock = Lock()  # of the counts and the bar
        self.progress_due = 0.0
        pipeline.transformer.on_progress = self.show_progress

    def restore(self, batches: Iterable[Sequence[Job]]) -> None:
        """Restores all batches, or as many as there is room for; an image that fails does not keep the others from being
        restored.

        Also when it is interrupted: what has been restored by then is written and counted.
        """
        behind: deque[Future[None]] = deque()
        with ThreadPoolExecutor(IMAGES_BEHIND, "write") as writers, closing(read_ahead(batches)) as ahead:

            def hand_on(job: Job, blurry: ImageFile, restored: np.ndarray) -> None:
                if len(behind) >= IMAGES_BEHIND:
                    behind.popleft().result()
                behind.append(writers.submit(self.write, job, blurry, restored))

            try:
                for batch in ahead:
                    alone = pixels_of([job for job, _ in batch]) > MANY_PIXELS
                    while behind and (alone or behind[0].done()):
                        behind.popleft().result()
                    self.restore_batch(batch, hand_on)
                for future in behind:
                    future.result()
            except DiskFullError as error:
                self.stopped = str(error)

    def restore_batch(self, batch: Sequence[ReadJob], hand_on: HandOn) -> None:
        readable = []
        for job, blurry in batch:
            if isinstance(blurry, UnreadableImageError):
                self.fail(job, first_line(blurry))
            else:
                readable.append((job, blurry))
        if readable:
            self.restore_images(readable, hand_on)

    def show_progress(self, share: float) -> None:
        """Tells once a second how far the image at hand is, or its batch; small ones are done by then."""
        if time.monotonic() >= self.progress_due:
            self.progress_due = time.monotonic() + PROGRESS_SECONDS
            with self.lock:
                self.bar.set_postfix_str(f"{share:.0%} of this image")

    def restore_images(self, batch: Sequence[tuple[Job, ImageFile]], hand_on: HandOn) -> None:
        self.progress_due = time.monotonic() + PROGRESS_SECONDS
        with self.lock:
            self.bar.set_postfix_str("", refresh=False)
        try:
            results = run_pipeline(self.pipeline, [blurry.image for _, blurry in batch], self.options)
        except (RuntimeError, ValueError, MemoryError) as error:  # of PyTorch, too, when memory does not suffice
            if len(batch) == 1:
                self.fail(batch[0][0], first_line(error))
                return
            for single in batch:
                self.restore_images([single], hand_on)
            return
        for (job, blurry), restored in zip(batch, results, strict=True):
            hand_on(job, blurry, restored)

    def write(self, job: Job, blurry: ImageFile, restored: np.ndarray) -> None:
        """
        Raises:
            DiskFullError: There is no room for it.
        """
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
                    write_image(file, to_integers(restored, blurry.bits), blurry.exif, blurry.icc_profile)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"no room left for {job.output}") from error
            self.fail(job, f"cannot be written: {(error.strerror or str(error)).lower()}")
        except ValueError as error:
            self.fail(job, f"cannot be written: {first_line(error)}")
        else:
            with self.lock:
                self.restored += 1
                self.bar.update()

    def fail(self, job: Job, reason: str) -> None:
        with self.lock:
            self.failed += 1
            self.bar.write(f"{job.source}: {reason}", file=sys.stderr)
            self.bar.update()


# Pixels


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
        canvas.paste(PIL.Image.fromarray(to_integers(rgb, 8)), (left, top))
    return np.asarray(canvas)
