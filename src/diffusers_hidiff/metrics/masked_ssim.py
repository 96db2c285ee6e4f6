"""SSIM where the aligned images overlap, as RealBlur's evaluation has it."""

import numpy as np

from .alignment import AlignedPair

SIGMA = 1.5
BORDER = int(3.5 * SIGMA + 0.5)  # scikit-image's window reaches so far, and the map's border is left out


def masked_ssim(pair: AlignedPair) -> float:
    """Structural similarity, weighted by the mask; at most 1.

    Raises:
        ValueError: An image of less than 11 x 11 pixels, or no pixel of the mask inside the border.
    Source:
        The evaluation published with RealBlur (Rim et al. 2020): scikit-image's map of SSIM with Gaussian weights (sigma
        1.5, population covariance, data range 1), without its border, averaged in each channel and over the channels.
    """
    from skimage.metrics import structural_similarity  # noqa: PLC0415

    height, width = pair.mask.shape[:2]
    smallest = 2 * BORDER + 1
    if min(height, width) < smallest:
        raise ValueError(f"SSIM needs images of at least {smallest}x{smallest} pixels, got {width}x{height}.")
    _, similarity = structural_similarity(
        pair.sharp,
        pair.restored,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=SIGMA,
        use_sample_covariance=False,
        data_range=1.0,
        full=True,
    )
    inside = (slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    weights = pair.mask[inside].astype(np.float64)
    if not weights.any():
        raise ValueError("SSIM needs a pixel inside the border where the aligned images overlap, got none.")
    return float(np.mean((similarity[inside] * weights).sum((0, 1)) / weights.sum((0, 1))))
