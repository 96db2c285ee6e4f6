"""Restores and scores the images of a data set: in several processes, to be continued where it was stopped.

Every image leaves one small file behind. What is not there yet is shared out among the processes that Accelerate started;
other processes align and score while the network runs. Each image is restored by itself, so that nothing depends on how many
processes there are.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..image_files import write_whole
from ..metrics.perceptual import PerceptualMetrics
from . import EvaluationError
from .datasets import Pair
from .protocols import Protocol

SETTINGS_FILE, ROWS_FOLDER = "settings.json", "rows"

Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Job:
    """An evaluation.

    Args:
        pairs: The images.
        restore: Pair -> restored image, uint8 [H, W, 3]. Any exception of it is the failure of that image.
        protocol: How it is scored.
        output: Folder for rows and report.
        settings: All that the figures depend on, as JSON. A folder holds the results of one setting.
        workers: Processes that score beside this one; 0 scores in this one.
        perceptual: Further metrics, computed in this process.
        beside: Name -> another image made of a pair, scored as the restored one is: the blurry image, say.
    """

    pairs: Sequence[Pair]
    restore: Callable[[Pair], np.ndarray]
    protocol: Protocol
    output: Path
    settings: Mapping[str, Any]
    workers: int = 0
    perceptual: PerceptualMetrics | None = None
    beside: Mapping[str, Callable[[Pair], np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What came of one image.

    Args:
        index: Its place in the data set.
        name: Its name there.
        width, height: Size of the sharp image in pixels, 0 where it could not be read.
        seconds: What the restoration took.
        scores: Name of the metric -> value; empty for an image that failed. A PSNR may be infinite. What `Job.beside` makes
            has scores of its own, such as "blurry_psnr".
        error: Why it failed.
    """

    index: int
    name: str
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def run(job: Job, state: PartialState) -> list[Row] | None:
    """Restores and scores what is not there yet.

    Returns:
        One row for each pair, in their order, in the main process; None in the others.
    Raises:
        EvaluationError: The folder holds the results of other settings, or a scoring process died.
        OSError: The folder cannot be written to.
    """
    # 1. Share out what is not there yet: all look before anybody writes
    refuse_other_settings(job.output, job.settings)
    done = {index: row for index, row in read_rows(job).items() if row.error is None}
    todo = [index for index in range(len(job.pairs)) if index not in done]
    state.wait_for_everyone()
    if state.is_main_process:
        begin(job, todo)
    state.wait_for_everyone()

    # 2. Restore and score
    with (
        tqdm(total=len(job.pairs), initial=len(done), unit=" images", disable=not state.is_main_process) as bar,
        Progress(job, bar, list(done.values())) as progress,
    ):
        for index in todo[state.process_index :: state.num_processes]:
            progress.restore(index)
        progress.finish()
        state.wait_for_everyone()
        progress.show()

    # 3. Collect
    if not state.is_main_process:
        return None
    rows = read_rows(job)
    return [rows[index] for index in range(len(job.pairs))]


def begin(job: Job, todo: Sequence[int]) -> None:
    """Makes the folder; forgets what failed, which is tried again."""
    begin_folder(job.output, job.settings)
    for index in todo:
        row_file(job, index).unlink(missing_ok=True)


def begin_folder(output: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder for the rows of one setting."""
    (output / ROWS_FOLDER).mkdir(parents=True, exist_ok=True)
    write_whole(output / SETTINGS_FILE, as_json(settings))


def refuse_other_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        EvaluationError: The folder holds the results of other settings.
    """
    file = output / SETTINGS_FILE
    if not file.exists():
        return
    try:
        before = json.loads(file.read_bytes())
    except ValueError as error:
        raise EvaluationError(f"{file} is damaged; choose another --output.") from error
    before, now = flat(before), flat(json.loads(as_json(settings)))
    changed = [
        f"{name} is {now.get(name)!r} and was {before.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise EvaluationError(
            f"{str(output)!r} holds results of other settings ({'; '.join(changed)}); choose another --output."
        )


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the groups: {"model": {"name": 1}} as {"model.name": 1}."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        values |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return values


def as_json(values: Any) -> bytes:
    """Strict JSON for reading."""
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# Rows


def row_file(job: Job, index: int) -> Path:
    return job.output / ROWS_FOLDER / f"{index:06d}.json"


def write_row(job: Job, row: Row) -> None:
    """Python's JSON, which has a word for infinity."""
    write_whole(row_file(job, row.index), json.dumps(asdict(row)).encode())


def read_rows(job: Job) -> dict[int, Row]:
    """Index -> row, for the images that were tried."""
    files = (job.output / ROWS_FOLDER).glob("[0-9]*.json")
    rows = [Row(**json.loads(file.read_bytes())) for file in files]
    return {row.index: row for row in rows if row.index < len(job.pairs)}


# Work


class Progress:
    """Restores images one after the other, has them scored, and writes and shows what is known.

    Args:
        job: What is to be done.
        bar: Shows the images of all processes, and the mean PSNR of those that this one knows.
        known: Rows of an earlier run.
    """

    def __init__(self, job: Job, bar: tqdm, known: Sequence[Row]) -> None:
        self.job = job
        self.bar = bar
        self.psnrs = [row.scores["psnr"] for row in known]
        self.waiting: dict[Future[dict[str, float]], Row] = {}
        self.pool = None if job.workers == 0 else scoring_pool(job.workers)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def restore(self, index: int) -> None:
        """Restores one image and hands it on; images that wait to be scored are few, so that memory suffices."""
        pair = self.job.pairs[index]
        row = Row(index, pair.name)
        try:
            sharp = pair.read_sharp()
            row = Row(index, pair.name, sharp.shape[1], sharp.shape[0])
            start = time.perf_counter()
            images = {"": self.job.restore(pair)}
            row = Row(index, pair.name, row.width, row.height, time.perf_counter() - start)
            images |= {f"{name}_": make(pair) for name, make in self.job.beside.items()}
            for prefix, image in images.items():
                if image.shape != sharp.shape:
                    which = prefix.removesuffix("_") or "restored"
                    raise ValueError(f"The {which} image is {size(image)} pixels, the sharp one {size(sharp)}.")
                if self.job.perceptual is not None:
                    values = self.job.perceptual.score(image, sharp)
                    row.scores.update({f"{prefix}{metric}": value for metric, value in values.items()})
        except Exception as error:  # whatever a file or a network may raise: the image is named, the others go on
            self.fail(row, error)
            return
        score = self.job.protocol.score
        if self.pool is None:
            try:
                self.succeed(row, score_all(score, images, sharp))
            except ValueError as error:
                self.fail(row, error)
            return
        self.waiting[self.submit(score, images, sharp)] = row
        while len(self.waiting) >= 2 * self.job.workers:
            self.collect()

    def submit(self, score: Score, images: Mapping[str, np.ndarray], sharp: np.ndarray) -> Future[dict[str, float]]:
        assert self.pool is not None
        try:
            return self.pool.submit(score_all, score, images, sharp)
        except BrokenProcessPool as error:
            raise pool_died() from error

    def collect(self) -> None:
        """Waits for some image to be scored."""
        for future in wait(self.waiting, return_when=FIRST_COMPLETED).done:
            row = self.waiting.pop(future)
            try:
                self.succeed(row, future.result())
            except BrokenProcessPool as error:
                raise pool_died() from error
            except ValueError as error:
                self.fail(row, error)

    def finish(self) -> None:
        while self.waiting:
            self.collect()

    def succeed(self, row: Row, scores: dict[str, float]) -> None:
        scores = scores | row.scores
        self.psnrs.append(scores["psnr"])
        write_row(self.job, Row(row.index, row.name, row.width, row.height, row.seconds, scores))
        self.show()

    def fail(self, row: Row, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.bar.write(f"{row.name}: {reason}", file=sys.stderr)
        write_row(self.job, Row(row.index, row.name, row.width, row.height, row.seconds, error=reason))
        self.show()

    def show(self) -> None:
        if self.bar.disable:
            return
        finite = [psnr for psnr in self.psnrs if np.isfinite(psnr)]
        if finite:
            self.bar.set_postfix_str(f"PSNR {np.mean(finite):.2f} dB", refresh=False)
        written = len(list((self.job.output / ROWS_FOLDER).glob("[0-9]*.json")))
        self.bar.update(written - self.bar.n)


def score_all(score: Score, images: Mapping[str, np.ndarray], sharp: np.ndarray) -> dict[str, float]:
    """Prefix and name of the metric -> value, for images by prefix."""
    return {
        f"{prefix}{metric}": value for prefix, image in images.items() for metric, value in score(image, sharp).items()
    }


def size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


# Processes that score


def scoring_pool(workers: int) -> ProcessPoolExecutor:
    """Spawned, not forked: a network on a GPU does not survive a fork."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)


def start_worker() -> None:
    """One core for each; Ctrl-C is the parent's business, and so is a parent that was killed the end."""
    import cv2  # noqa: PLC0415

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def pool_died() -> EvaluationError:
    return EvaluationError(
        "A process that scores images died, perhaps for lack of memory; run the same command again with fewer --workers, "
        "and it goes on where it was."
    )


def default_workers() -> int:
    """The cores that this process may use, shared with the others that Accelerate started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
