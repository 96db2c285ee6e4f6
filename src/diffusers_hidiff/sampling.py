"""The reverse chain, written once: inference and stage-2 training both call it.

B batch · N prior tokens · D prior width
"""

import inspect
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn


def noise_level(scheduler: SchedulerMixin, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1-ᾱ) at an integer or fractional timestep, ᾱ interpolated in its logarithm of signal to noise."""
    alphas_cumprod = scheduler.alphas_cumprod.to(device=timestep.device, dtype=torch.float64)
    position = timestep.to(torch.float64).clamp(0, len(alphas_cumprod) - 1)
    low, high = alphas_cumprod[position.floor().long()], alphas_cumprod[position.ceil().long()]
    alpha_prod = torch.sigmoid(torch.lerp(torch.logit(low), torch.logit(high), position.frac()))
    return alpha_prod.sqrt().float(), (1 - alpha_prod).sqrt().float()


def clamp_clean_estimate(scheduler: SchedulerMixin, model_output: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
    """The prediction whose clean estimate is that of `model_output`, clamped to ±`clip_sample_range`.

    Args:
        scheduler: Tells prediction type, range and ᾱ.
        model_output: What the denoiser predicts from `sample`, [B, N, D].
        sample: The noisy prior as the denoiser saw it, so with signal and noise in proportion √ᾱ to √(1-ᾱ), [B, N, D].
        timestep: Of `sample`.
    """
    limit = scheduler.config.get("clip_sample_range", 1.0)
    if scheduler.config.prediction_type == "sample":
        return model_output.clamp(-limit, limit)
    signal, noise = noise_level(scheduler, timestep)
    clean = ((sample - noise * model_output) / signal).clamp(-limit, limit)
    return (sample - signal * clean) / noise


def sample_prior(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    condition: Tensor,
    latents: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    after_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs the reverse chain from `latents` over `scheduler.timesteps`, differentiable.

    The chain is kept in float32 whatever the denoiser's dtype: at T = 8 a step multiplies rounding by up to 174.
    Where the scheduler's config asks for a clamp of the clean estimate (`clip_sample`) that its class does not know
    (Euler, DPM-Solver …), the clamp is done here.

    Args:
        denoiser: Called with (sample, timestep, condition).
        scheduler: Its timesteps are set.
        condition: [B, N, D].
        latents: x_T with the standard deviation that the scheduler begins with, [B, N, D].
        generator: For schedulers that draw noise.
        after_step: Called with step number, timestep and latents; what it returns takes the latents' place.
    Returns:
        The prior, [B, N, D], float32.
    """
    dtype = condition.dtype
    latents = latents.float()
    takes = inspect.signature(scheduler.step).parameters
    knows = inspect.signature(type(scheduler).__init__).parameters
    clamps_here = bool(scheduler.config.get("clip_sample")) and "clip_sample" not in knows
    options = {"generator": generator} if "generator" in takes else {}
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, timestep)
        model_output = denoiser(sample.to(dtype), timestep, condition, return_dict=False)[0].float()
        if clamps_here:
            model_output = clamp_clean_estimate(scheduler, model_output, sample, timestep)
        latents = scheduler.step(model_output, timestep, latents, **options, return_dict=False)[0]
        if after_step is not None:
            latents = after_step(index, timestep, latents)
    return latents
