"""Stage-1 and stage-2 objectives: models and a batch -> total and named parts (HI-Diff, arXiv:2305.12966, eq. 6 and 9)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from .sampling import sample_prior


@dataclass
class Loss:
    """An objective.

    Args:
        total: What is differentiated, a scalar.
        parts: What it is the sum of, detached, by name.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def stage1_loss(latent_encoder: nn.Module, transformer: nn.Module, blurry: Tensor, sharp: Tensor) -> Loss:
    """L1 between the image restored with the prior of the pair itself and the sharp one; both networks learn.

    Args:
        latent_encoder: `HIDiffLatentEncoder` with six input channels.
        transformer: `HIDiffTransformer`.
        blurry: [B, 3, H, W], RGB in [0, 1].
        sharp: The same.
    """
    prior = latent_encoder(blurry, sharp, return_dict=False)[0]
    restored = transformer(blurry, prior, return_dict=False)[0]
    image = F.l1_loss(restored.to(sharp.dtype), sharp)
    return Loss(image, {"image": image.detach()})


def stage2_loss(
    latent_encoder: nn.Module,
    condition_encoder: nn.Module,
    denoiser: nn.Module,
    transformer: nn.Module,
    scheduler: SchedulerMixin,
    blurry: Tensor,
    sharp: Tensor,
    noise: Tensor,
) -> Loss:
    """L1 of the image plus L1 of the prior, through the whole reverse chain; the latent encoder is a frozen teacher.

    The chain and the denoiser run in float32 under autocast too: a step multiplies rounding by up to 174.

    Args:
        latent_encoder: Stage 1's, without gradient.
        condition_encoder: `HIDiffLatentEncoder` with three input channels.
        denoiser: `HIDiffMixerDenoiser` or `HIDiffMLPDenoiser`.
        transformer: `HIDiffTransformer`.
        scheduler: `HIDiffScheduler`; its timesteps are set to all T.
        blurry: [B, 3, H, W], RGB in [0, 1].
        sharp: The same.
        noise: Standard normal, [B, N, D].
    """
    with torch.no_grad():
        target = latent_encoder(blurry, sharp, return_dict=False)[0].float()
    condition = condition_encoder(blurry, return_dict=False)[0]
    num_timesteps = scheduler.config.num_train_timesteps
    last = torch.full((len(target),), num_timesteps - 1, device=target.device)
    latents = scheduler.add_noise(target, noise, last)  # x_T = √ᾱ_T·z + √(1-ᾱ_T)·noise
    scheduler.set_timesteps(num_timesteps, device=target.device)
    with torch.autocast(blurry.device.type, enabled=False):
        prior = sample_prior(denoiser, scheduler, condition.to(next(denoiser.parameters()).dtype), latents)
    restored = transformer(blurry, prior.to(blurry.dtype), return_dict=False)[0]
    image, latent = F.l1_loss(restored.to(sharp.dtype), sharp), F.l1_loss(prior, target)
    return Loss(image + latent, {"image": image.detach(), "prior": latent.detach()})
