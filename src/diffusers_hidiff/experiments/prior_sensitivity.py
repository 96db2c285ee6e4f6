"""How much the picture depends on the prior: another image's, shuffled, none at all, or the oracle's."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..image_processor import pad_to_multiple, preprocess
from ..metrics.psnr import psnr_of_arrays
from ..models.latent_encoder import HIDiffLatentEncoder
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..utils.panels import Panel, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def oracle_prior(latent_encoder: HIDiffLatentEncoder, blurry: np.ndarray, sharp: np.ndarray) -> Tensor:
    """The prior of stage 1, which sees the sharp image: what the diffusion learns to draw.

    Args:
        latent_encoder: Stage 1's.
        blurry: uint8 [H, W, 3].
        sharp: Its ground truth.
    Returns:
        [1, N, D].
    """
    device, dtype = latent_encoder.device, latent_encoder.dtype
    pixels = [pad_to_multiple(preprocess(image)[0].pixels)[None].to(device, dtype) for image in (blurry, sharp)]
    return latent_encoder(*pixels, return_dict=False)[0]


@torch.no_grad()
def priors_to_try(
    pipeline: HIDiffPipeline,
    blurry: np.ndarray,
    other: np.ndarray | None = None,
    sharp: np.ndarray | None = None,
    latent_encoder: HIDiffLatentEncoder | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Priors by name, [1, N, D] each.

    Args:
        pipeline: The model.
        blurry: uint8 [H, W, 3].
        other: Another image, whose prior is tried.
        sharp: Ground truth, for the oracle.
        latent_encoder: Stage 1's, for the oracle.
        seed: Of the noise.
    """

    def draw(image: np.ndarray, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(image, generator=generator, output_type="latent", return_dict=False)[0]

    own = draw(blurry, seed)
    order = torch.randperm(own.shape[1], generator=torch.Generator().manual_seed(seed))
    tried = {"its own": own, "another seed": draw(blurry, seed + 1), "tokens shuffled": own[:, order]}
    if other is not None:
        tried["another image's"] = draw(other, seed)
    tried["zero"] = torch.zeros_like(own)
    if sharp is not None and latent_encoder is not None:
        tried["oracle (sees sharp)"] = oracle_prior(latent_encoder, blurry, sharp)
    return tried


@torch.no_grad()
def sensitivity_sheet(
    pipeline: HIDiffPipeline, blurry: np.ndarray, priors: dict[str, Tensor], sharp: np.ndarray | None
) -> tuple["Figure", dict[str, float]]:
    """The picture that each prior gives, beside it the change against the first; and the mean changes in 8-bit levels."""
    images = {
        name: np.asarray(pipeline(blurry, prior=prior, return_dict=False)[0][0]) for name, prior in priors.items()
    }
    first = next(iter(images.values())).astype(np.float32)
    changes = {name: np.abs(image - first).mean(axis=2) for name, image in images.items()}
    means = {name: float(change.mean()) for name, change in changes.items()}
    limits = 0.0, max(1.0, *(float(np.percentile(change, 99.5)) for change in changes.values()))

    def pair(name: str) -> list[Panel]:
        quality = "" if sharp is None else f"\n{psnr_of_arrays(images[name], sharp):.2f} dB"
        change = Panel(f"changes by {means[name]:.2f}", changes[name], limits, "change, levels of 255")
        return [Panel(f"prior: {name}{quality}", images[name]), change]

    panels = [panel for name in images for panel in pair(name)]
    panels += [Panel("", np.full_like(blurry, 255))] * (-len(panels) % 4)
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    return sheet(
        rows, "The same blurry image restored with other priors, and what that changes (mean levels of 255)"
    ), means
