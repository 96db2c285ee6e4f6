"""The reverse chain of one image, step by step: what the transformer would make of each clean estimate."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..image_processor import pad_to_multiple, preprocess
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from .panels import Panel, sheet


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


def chain_sheet(followed: list[ChainStep], blurry: np.ndarray, sharp: np.ndarray | None) -> bytes:
    """The pictures of the chain, each with its distance to the last prior; PNG."""
    last = followed[-1].clean_prior
    panels = [Panel("blurry", blurry, sharp)]
    for step in followed:
        distance = (step.clean_prior - last).square().mean().sqrt().item()
        panels.append(Panel(f"t = {step.timestep}, prior {distance:.3f} from the last", step.image, sharp))
    if sharp is not None:
        panels.append(Panel("sharp", sharp))
    return sheet(panels)
