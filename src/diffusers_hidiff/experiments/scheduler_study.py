"""Schedulers x steps x seeds: what each does to the prior, to the picture and to the time.

B = 1 image at a time · N prior tokens · D prior width
"""

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..image_processor import pad_to_multiple, preprocess
from ..models.latent_encoder import HIDiffLatentEncoder
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..sampling import sample_prior
from ..schedulers.compatibility import check_scheduler, check_timesteps
from ..utils.panels import TEXT_SIZE, empty_figure
from .prior_sensitivity import oracle_prior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = 0.01  # dB that nobody sees
SMALLEST_RANGE = 0.2  # dB; curves within less are shown as flat as they are
LARGEST_RANGE = 2.0  # dB below the best

Score = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """One image restored once.

    Args:
        image: Name of the image.
        scheduler: Name of the scheduler.
        steps: Steps of the reverse chain.
        seed: Of the initial noise.
        psnr: Of the restored image, dB.
        ssim: Of the restored image.
        to_full: Root mean square difference to the prior of the model's own scheduler in all its steps, same noise.
        to_oracle: The same to the prior of stage 1, which sees the sharp image; NaN without its encoder.
        chain_ms: Time of the reverse chain, milliseconds.
        whole_ms: Time of condition encoder, chain and transformer, milliseconds.
    """

    image: str
    scheduler: str
    steps: int
    seed: int
    psnr: float
    ssim: float
    to_full: float
    to_oracle: float
    chain_ms: float
    whole_ms: float


@dataclass(frozen=True)
class Cell:
    """All trials of a scheduler in a number of steps, averaged.

    Args:
        scheduler: Name of the scheduler.
        steps: Steps of the reverse chain.
        psnr: Mean, dB.
        ssim: Mean.
        spread: Standard deviation of the PSNR over the seeds of an image, mean over images, dB; NaN for one seed.
        to_full: Mean.
        to_oracle: Mean.
        chain_ms: Median.
        whole_ms: Median.
    """

    scheduler: str
    steps: int
    psnr: float
    ssim: float
    spread: float
    to_full: float
    to_oracle: float
    chain_ms: float
    whole_ms: float


def split_grid(
    schedulers: Mapping[str, SchedulerMixin], steps: Sequence[int], device: torch.device
) -> tuple[list[tuple[str, int]], list[tuple[str, int, str]]]:
    """Combinations that work, and those that do not with the reason."""
    good, refused = [], []
    for (name, scheduler), number in product(schedulers.items(), steps):
        try:
            check_scheduler(scheduler, number)
            scheduler.set_timesteps(number, device=device)
            check_timesteps(scheduler, scheduler.timesteps)
        except (ValueError, IndexError, ImportError) as error:  # diffusers' own schedulers raise the others
            refused.append((name, number, str(error).splitlines()[0]))
        else:
            good.append((name, number))
    return good, refused


def root_mean_square(difference: Tensor) -> float:
    return difference.float().square().mean().sqrt().item()


@torch.no_grad()
def run_trials(
    pipeline: HIDiffPipeline,
    schedulers: Mapping[str, SchedulerMixin],
    grid: Sequence[tuple[str, int]],
    seeds: Sequence[int],
    pair: tuple[str, np.ndarray, np.ndarray],
    score: Score,
    latent_encoder: HIDiffLatentEncoder | None = None,
) -> Iterator[Trial]:
    """Restores an image with every combination and seed.

    Args:
        pipeline: The model; its own scheduler in all its steps is the reference.
        schedulers: By name.
        grid: Combinations of name and steps that work.
        seeds: Of the initial noise.
        pair: Name, blurry and sharp image, uint8 [H, W, 3].
        score: (restored, sharp) -> {"psnr": …, "ssim": …}.
        latent_encoder: Stage 1's, for `to_oracle`.
    """
    device, own, (image_name, blurry, sharp) = pipeline.device, pipeline.scheduler, pair
    pixels = pad_to_multiple(preprocess(blurry)[0].pixels)[None].to(device)
    start = time.perf_counter()
    condition = pipeline.encode([([0], pixels)])
    encoder_ms = 1000 * (time.perf_counter() - start)
    oracle = None if latent_encoder is None else oracle_prior(latent_encoder, blurry, sharp)

    def draw(scheduler: SchedulerMixin, steps: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(condition.shape, generator=generator).to(device)
        scheduler.set_timesteps(steps, device=device)
        return sample_prior(pipeline.denoiser, scheduler, condition, noise * scheduler.init_noise_sigma, generator)

    full = {seed: draw(own, own.config.num_train_timesteps, seed) for seed in seeds}
    for (name, steps), seed in product(grid, seeds):
        start = time.perf_counter()
        prior = draw(schedulers[name], steps, seed)
        middle = time.perf_counter()
        restored = np.asarray(pipeline(blurry, prior=prior, return_dict=False)[0][0])
        end = time.perf_counter()
        values = score(restored, sharp)
        yield Trial(
            *(image_name, name, steps, seed, values["psnr"], values["ssim"]),
            to_full=root_mean_square(prior - full[seed]),
            to_oracle=float("nan") if oracle is None else root_mean_square(prior - oracle),
            chain_ms=1000 * (middle - start),
            whole_ms=encoder_ms + 1000 * (end - start),
        )


def summarise(trials: Sequence[Trial]) -> list[Cell]:
    """Means over images and seeds of every combination, in the order of the trials."""
    cells = []
    for name, steps in dict.fromkeys((trial.scheduler, trial.steps) for trial in trials):
        chosen = [trial for trial in trials if (trial.scheduler, trial.steps) == (name, steps)]
        of_images: dict[str, list[float]] = {}
        for trial in chosen:
            of_images.setdefault(trial.image, []).append(trial.psnr)
        several = all(len(values) > 1 for values in of_images.values())
        cells.append(
            Cell(
                name,
                steps,
                psnr=statistics.fmean(trial.psnr for trial in chosen),
                ssim=statistics.fmean(trial.ssim for trial in chosen),
                spread=statistics.fmean(map(statistics.stdev, of_images.values())) if several else float("nan"),
                to_full=statistics.fmean(trial.to_full for trial in chosen),
                to_oracle=statistics.fmean(trial.to_oracle for trial in chosen),
                chain_ms=statistics.median(trial.chain_ms for trial in chosen),
                whole_ms=statistics.median(trial.whole_ms for trial in chosen),
            )
        )
    return cells


def as_csv(trials: Sequence[Trial]) -> str:
    """A row for every trial."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, [field.name for field in fields(Trial)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(trial) for trial in trials)
    return stream.getvalue()


def conclusion(cells: Sequence[Cell], own: str) -> list[str]:
    """How few steps lose nothing, how much the seed matters, which schedulers are safe: a sentence each.

    Args:
        cells: Of the study.
        own: Name of the model's own scheduler; its most steps are what the others are held against.
    """
    steps_of_own = sorted((cell for cell in cells if cell.scheduler == own), key=lambda cell: cell.steps)
    if not steps_of_own:
        return []
    full = steps_of_own[-1]

    def loses_nothing(cell: Cell) -> bool:
        return abs(cell.psnr - full.psnr) <= NOTHING

    enough = full
    for cell in reversed(steps_of_own):
        if not loses_nothing(cell):
            break
        enough = cell
    worst = min(steps_of_own, key=lambda cell: cell.psnr)
    less = "" if loses_nothing(worst) else f"; the worst choice, {worst.steps}, loses {full.psnr - worst.psnr:.2f} dB"
    sentences = [f"From {enough.steps} of {full.steps} steps on, {own} stays within {NOTHING} dB of all of them{less}."]
    at_full = [cell for cell in cells if cell.steps == full.steps]
    if not math.isnan(full.spread):
        wild = max(at_full, key=lambda cell: cell.spread)
        sentences.append(
            f"Another seed moves the PSNR of an image by {full.spread:.4f} dB (standard deviation) with {own} in"
            f" {full.steps} steps; by {wild.spread:.4f} dB with {wild.scheduler}, the most of all."
        )
    safe = [cell.scheduler for cell in at_full if loses_nothing(cell)]
    unsafe = [f"{cell.scheduler} ({cell.psnr - full.psnr:+.2f} dB)" for cell in at_full if not loses_nothing(cell)]
    others = f"; these are not: {', '.join(unsafe)}." if unsafe else "."
    return [*sentences, f"In {full.steps} steps these are within {NOTHING} dB of {own}: {', '.join(safe)}{others}"]


def as_markdown(
    cells: Sequence[Cell], refused: Sequence[tuple[str, int, str]], heading: str, sentences: Sequence[str] = ()
) -> str:
    """Sentences, a table of the cells and a list of what was not run."""
    lines = [
        heading,
        "",
        *(f"* {sentence}" for sentence in sentences),
        "" if sentences else None,
        "| scheduler | steps | PSNR, dB | over seeds, dB | SSIM | prior to full | prior to oracle | chain, ms | whole, ms |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {c.scheduler} | {c.steps} | {c.psnr:.3f} | ±{c.spread:.4f} | {c.ssim:.4f} | {c.to_full:.4f} "
            f"| {c.to_oracle:.4f} | {c.chain_ms:.1f} | {c.whole_ms:.0f} |"
            for c in cells
        ),
        "",
        "Over seeds: standard deviation of an image's PSNR, mean over images. Prior to full: root mean square difference to"
        " the prior of the model's own scheduler in all its steps; to oracle: to that of stage 1, which sees the sharp"
        " image. Chain and whole (condition encoder, chain, transformer): median times.",
    ]
    if refused:
        reasons: dict[tuple[str, str], list[int]] = {}
        for name, steps, reason in refused:
            reasons.setdefault((name, reason), []).append(steps)
        lines += ["", "Not run:", ""]
        lines += [f"* {name}, {listed(steps)} steps: {reason}" for (name, reason), steps in reasons.items()]
    return "\n".join(line for line in lines if line is not None) + "\n"


def listed(steps: Sequence[int]) -> str:
    return " ".join(map(str, steps))


def figure_of(cells: Sequence[Cell]) -> "Figure":
    """Quality and distance to the full-step prior against steps, one line a scheduler, spread over seeds as a band."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter  # noqa: PLC0415 - an extra

    figure = empty_figure("How many steps which scheduler needs", 5.4)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(cell.scheduler for cell in cells))
    for number, name in enumerate(names):
        line = sorted((cell for cell in cells if cell.scheduler == name), key=lambda cell: cell.steps)
        steps, psnr, spread, to_full = (
            np.array([getattr(cell, key) for cell in line]) for key in ("steps", "psnr", "spread", "to_full")
        )
        # Many lie on each other: the first are drawn largest, so that all are seen
        style = {"marker": "osD^vP*X"[number % 8], "markersize": 14 - 9 * number / len(names), "label": name}
        width = 4 - 3 * number / len(names)
        spread = np.nan_to_num(spread)  # of a single seed
        (drawn,) = left.plot(steps, psnr, **style, linewidth=width)
        left.fill_between(steps, psnr - spread, psnr + spread, color=drawn.get_color(), alpha=0.25, linewidth=0)
        right.plot(steps[to_full > 0], to_full[to_full > 0], **style, linewidth=width, color=drawn.get_color())
    low, high = left.get_ylim()
    if high - low < SMALLEST_RANGE:
        left.set_ylim((low + high - SMALLEST_RANGE) / 2, (low + high + SMALLEST_RANGE) / 2)
    best = max((cell.psnr for cell in cells if np.isfinite(cell.psnr)), default=0.0)
    if left.get_ylim()[0] < best - LARGEST_RANGE:  # what fails would make the others one line
        left.set_ylim(best - LARGEST_RANGE, best + 0.05 * LARGEST_RANGE)
        left.set_ylabel(f"lines that leave below are more than {LARGEST_RANGE:g} dB worse", fontsize=TEXT_SIZE)
    left.set_title("picture: PSNR, dB (band: over seeds)", fontsize=TEXT_SIZE)
    right.set_title("prior: RMS distance to that of all steps", fontsize=TEXT_SIZE)
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({cell.steps for cell in cells}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("steps", fontsize=TEXT_SIZE)
        axes.tick_params(labelsize=TEXT_SIZE)
        axes.grid(alpha=0.3)
    left.ticklabel_format(axis="y", useOffset=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=TEXT_SIZE)
    return figure
