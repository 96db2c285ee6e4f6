"""How much the picture depends on the prior: another image's, shuffled, none at all, or the oracle's."""

import numpy as np
import torch
from torch import Tensor

from ..image_processor import pad_to_multiple, preprocess
from ..models.latent_encoder import HIDiffLatentEncoder
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from .panels import Panel, sheet


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
        pixels = [pad_to_multiple(preprocess(image)[0].pixels)[None].to(own.device) for image in (blurry, sharp)]
        tried["oracle (sees sharp)"] = latent_encoder(*pixels, return_dict=False)[0]
    return tried


@torch.no_grad()
def sensitivity_sheet(
    pipeline: HIDiffPipeline, blurry: np.ndarray, priors: dict[str, Tensor], sharp: np.ndarray | None
) -> tuple[bytes, dict[str, float]]:
    """The picture that each prior gives, under it the change against the first; PNG, and the mean changes in 8-bit levels."""
    images = {
        name: np.asarray(pipeline(blurry, prior=prior, return_dict=False)[0][0]) for name, prior in priors.items()
    }
    first = next(iter(images.values())).astype(np.float32)
    changes = {name: np.abs(image - first).mean(axis=2) for name, image in images.items()}
    means = {name: float(change.mean()) for name, change in changes.items()}
    limits = 0.0, max(1.0, *(float(change.max()) for change in changes.values()))
    panels = [Panel("blurry", blurry, sharp)]
    panels += [Panel(name, image, sharp) for name, image in images.items()]
    panels += [Panel("sharp" if sharp is not None else "blurry", sharp if sharp is not None else blurry)]
    panels += [Panel(f"change: {means[name]:.2f} levels", change, limits=limits) for name, change in changes.items()]
    return sheet(panels, columns=len(images) + 1), means
