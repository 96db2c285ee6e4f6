"""Schedulers x steps x seeds: what each does to the prior, to the picture and to the time.

B = 1 image at a time · N prior tokens · D prior width
"""

import csv
import io
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from ..image_processor import pad_to_multiple, preprocess
from ..models.latent_encoder import HIDiffLatentEncoder
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..sampling import sample_prior
from ..schedulers.compatibility import check_scheduler, check_timesteps

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
        image_ms: Time of the transformer, milliseconds.
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
    image_ms: float


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
        image_ms: Median.
    """

    scheduler: str
    steps: int
    psnr: float
    ssim: float
    spread: float
    to_full: float
    to_oracle: float
    chain_ms: float
    image_ms: float


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
    pairs: Iterable[tuple[str, np.ndarray, np.ndarray]],
    score: Score,
    latent_encoder: HIDiffLatentEncoder | None = None,
    num_pairs: int | None = None,
) -> list[Trial]:
    """Restores every image with every combination and seed.

    Args:
        pipeline: The model; its own scheduler in all its steps is the reference.
        schedulers: By name.
        grid: Combinations of name and steps that work.
        seeds: Of the initial noise.
        pairs: Name, blurry and sharp image, uint8 [H, W, 3].
        score: (restored, sharp) -> {"psnr": …, "ssim": …}.
        latent_encoder: Stage 1's, for `to_oracle`.
        num_pairs: How many pairs there are, for the progress bar.
    """
    device, trials = pipeline.device, []
    own = pipeline.scheduler
    bar = tqdm(total=None if num_pairs is None else num_pairs * len(grid) * len(seeds), unit=" images")
    for image_name, blurry, sharp in pairs:
        pixels, sharp_pixels = (
            pad_to_multiple(preprocess(image)[0].pixels)[None].to(device) for image in (blurry, sharp)
        )
        condition = pipeline.encode([([0], pixels)])
        oracle = None
        if latent_encoder is not None:
            oracle = latent_encoder(pixels, sharp_pixels, return_dict=False)[0]

        def draw(scheduler: SchedulerMixin, steps: int, seed: int, condition: Tensor = condition) -> Tensor:
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
            trials.append(
                Trial(
                    *(image_name, name, steps, seed, values["psnr"], values["ssim"]),
                    to_full=root_mean_square(prior - full[seed]),
                    to_oracle=float("nan") if oracle is None else root_mean_square(prior - oracle),
                    chain_ms=1000 * (middle - start),
                    image_ms=1000 * (end - middle),
                )
            )
            bar.update()
    bar.close()
    return trials


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
                image_ms=statistics.median(trial.image_ms for trial in chosen),
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


def as_markdown(cells: Sequence[Cell], refused: Sequence[tuple[str, int, str]], heading: str) -> str:
    """A table of the cells and a list of what was not run."""
    lines = [
        heading,
        "",
        "| scheduler | steps | PSNR, dB | over seeds, dB | SSIM | prior to full | prior to oracle | chain, ms | image, ms |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {c.scheduler} | {c.steps} | {c.psnr:.3f} | ±{c.spread:.4f} | {c.ssim:.4f} | {c.to_full:.4f} "
            f"| {c.to_oracle:.4f} | {c.chain_ms:.1f} | {c.image_ms:.0f} |"
            for c in cells
        ),
        "",
        "Prior to full: root mean square difference to the prior of the model's own scheduler in all its steps; to oracle:"
        " to that of stage 1, which sees the sharp image.",
    ]
    if refused:
        lines += ["", "Not run:", "", *(f"* {name}, {steps} steps: {reason}" for name, steps, reason in refused)]
    return "\n".join(lines) + "\n"


def figure_of(cells: Sequence[Cell]) -> bytes:
    """Quality and distance to the full-step prior against steps, one line a scheduler, spread over seeds as a band; PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.ticker import ScalarFormatter  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, name in enumerate(dict.fromkeys(cell.scheduler for cell in cells)):
        line = sorted((cell for cell in cells if cell.scheduler == name), key=lambda cell: cell.steps)
        steps, psnr, spread = (np.array([getattr(c, key) for c in line]) for key in ("steps", "psnr", "spread"))
        style = {"marker": "osD^vP*X"[number % 8], "label": name, "markersize": 5, "alpha": 0.85}
        (drawn,) = left.plot(steps, psnr, **style)
        left.fill_between(steps, psnr - spread, psnr + spread, color=drawn.get_color(), alpha=0.15, linewidth=0)
        right.plot(steps, [cell.to_full for cell in line], **style)
    left.set(ylabel="PSNR, dB (band: over seeds)", title="Picture")
    right.set(ylabel="RMS difference", title="Prior, against the model's own scheduler in all steps")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    left.ticklabel_format(axis="y", useOffset=False)
    right.legend(fontsize=8)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    plt.close(figure)
    return encoded.getvalue()
