"""The reverse chain of one image, step by step: what the transformer would make of each clean estimate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..image_processor import pad_to_multiple, preprocess
from ..metrics.psnr import psnr_of_arrays
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..utils.panels import BAR, TEXT_SIZE, WIDTH, Panel, draw, empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PICTURES = 5
SMALLEST_RANGE = 0.2  # dB; a curve within less is shown as flat as it is


@dataclass(frozen=True)
class ChainStep:
    """One step of the chain.

    Args:
        timestep: Before the step.
        clean_prior: The denoiser's estimate of the clean prior x̂₀, [1, N, D].
        image: What the transformer makes of it, uint8 [H, W, 3].
    """

    timestep: int
    clean_prior: Tensor
    image: np.ndarray


@torch.no_grad()
def follow_chain(
    pipeline: HIDiffPipeline, blurry: np.ndarray, steps: int | None = None, seed: int = 0
) -> list[ChainStep]:
    """All steps of the chain, first to last.

    Args:
        pipeline: Its scheduler must return the clean estimate (`HIDiffScheduler`, DDPM, DDIM, Euler do).
        blurry: uint8 [H, W, 3].
        steps: Of the chain; all T unless given.
        seed: Of the initial noise.
    Raises:
        ValueError: The scheduler does not return the clean estimate.
    """
    pipeline.set_timesteps(steps, None)
    scheduler = pipeline.scheduler
    pixels = pad_to_multiple(preprocess(blurry)[0].pixels)[None].to(pipeline.device)
    condition = pipeline.encode([([0], pixels)])
    (latents,) = pipeline.draw_noise(1, 1, torch.Generator().manual_seed(seed), None)
    followed = []
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(latents, timestep)
        prediction = pipeline.denoiser(sample.to(condition.dtype), timestep, condition, return_dict=False)[0].float()
        result = scheduler.step(prediction, timestep, latents)
        clean = getattr(result, "pred_original_sample", None)
        if clean is None:
            raise ValueError(f"{type(scheduler).__name__} does not return the clean estimate; use HIDiffScheduler.")
        image = np.asarray(pipeline(blurry, prior=clean, return_dict=False)[0][0])
        followed.append(ChainStep(round(float(timestep)), clean, image))
        latents = result.prev_sample
    return followed


def chain_figure(followed: Sequence[ChainStep], blurry: np.ndarray, sharp: np.ndarray | None) -> "Figure":
    """Prior and picture against the steps as curves; below, the pictures of a few steps and what they lack of the last."""
    last = followed[-1]
    numbers = np.arange(1, len(followed) + 1)
    distances = np.array([(step.clean_prior - last.clean_prior).square().mean().sqrt().item() for step in followed])
    changes = [np.abs(step.image.astype(np.float32) - last.image).mean(axis=2) for step in followed]
    chosen = sorted({round(i) for i in np.linspace(0, len(followed) - 1, NUM_PICTURES)})
    limits = 0.0, max(1.0, *(float(np.percentile(changes[i], 99.5)) for i in chosen))

    column, (height, width) = WIDTH / (NUM_PICTURES + BAR), blurry.shape[:2]
    pictures = 2 * column * height / width + 0.7
    heading = "The reverse chain: what each step takes for the clean prior, and the picture that it gives"
    figure = empty_figure(heading, pictures + 2.6)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.6, pictures])[:, 0]
    left = top.subplots()
    left.plot(numbers[:-1], distances[:-1], "o-", color="tab:blue")
    left.set_yscale("log")
    left.set_xticks(numbers)
    left.set_xlabel("step of the chain", fontsize=TEXT_SIZE)
    left.set_ylabel("prior: RMS distance\nto the last estimate", color="tab:blue", fontsize=TEXT_SIZE)
    left.grid(alpha=0.3)
    right = left.twinx()
    if sharp is None:
        right.plot(numbers, [change.mean() for change in changes], "s-", color="tab:red")
        right.set_ylabel("picture: change\nto the last, levels", color="tab:red", fontsize=TEXT_SIZE)
    else:
        psnrs = np.array([psnr_of_arrays(step.image, sharp) for step in followed])
        right.plot(numbers, psnrs, "s-", color="tab:red")
        middle, reach = (psnrs.max() + psnrs.min()) / 2, max(SMALLEST_RANGE, np.ptp(psnrs)) * 0.55
        right.set_ylim(middle - reach, middle + reach)
        right.set_ylabel("picture: PSNR, dB", color="tab:red", fontsize=TEXT_SIZE)
        right.ticklabel_format(axis="y", useOffset=False)
    for axis in (left, right):
        axis.tick_params(labelsize=TEXT_SIZE)

    grid = bottom.subplots(2, len(chosen) + 1, gridspec_kw={"width_ratios": [1.0] * len(chosen) + [BAR]})
    for axes, i in zip(grid.T, chosen, strict=False):
        draw(axes[0], Panel(f"step {i + 1}", followed[i].image))
        title = "the last" if i == chosen[-1] else f"differs by {changes[i].mean():.2f}"
        draw(axes[1], Panel(title, changes[i], limits))
    grid[0, -1].set_axis_off()
    bar = bottom.colorbar(grid[1, 0].images[0], cax=grid[1, -1])
    bar.set_label("difference to the\nlast, levels of 255", fontsize=TEXT_SIZE)
    bar.ax.tick_params(labelsize=TEXT_SIZE)
    return figure
