"""MATLAB's volumetric SSIM: the figure that papers report on GoPro and HIDE.

H, W pixels
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW_SIZE, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@torch.no_grad()
def volumetric_ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    """Structural similarity of two colour images, each taken as one volume of H x W x 3 grey values.

    Single precision over all 1331 taps one after the other is slow, and part of the published figures: a sum of squares
    as large as a bright, flat region's loses what the variance there is made of, which moves the mean by up to 1e-4.

    Args:
        restored: Image to judge, uint8 [H, W, 3].
        sharp: Ground truth of the same shape. Any size will do: edges are replicated.
    Returns:
        The mean over all values, at most 1.
    Raises:
        ValueError: The shapes differ.
    Source:
        MATLAB's `ssim` (Wang et al. 2004): 11 x 11 x 11 Gaussian, sigma 1.5, K (0.01, 0.03), L 255. Agrees with the figures
        of the published GoPro evaluation in tests/golden/metrics/metrics.json.
    """
    if restored.shape != sharp.shape:
        raise ValueError(f"`restored` and `sharp` must have the same shape, got {restored.shape} and {sharp.shape}.")
    x, y = (torch.tensor(image, dtype=torch.float32).permute(2, 0, 1) for image in (restored, sharp))  # [3, H, W] each
    window = gaussian_window()
    mean_x, mean_y = local_mean(x, window), local_mean(y, window)
    variance_x = local_mean(x * x, window) - mean_x**2
    variance_y = local_mean(y * y, window) - mean_y**2
    covariance = local_mean(x * y, window) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return (likeness / ((mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2))).mean().item()


def gaussian_window() -> Tensor:
    """[11, 11, 11], rows by columns by channels, of sum 1."""
    offsets = torch.arange(WINDOW_SIZE, dtype=torch.float64) - WINDOW_SIZE // 2
    line = torch.exp(-offsets.square() / (2 * SIGMA**2))
    line /= line.sum()
    return torch.einsum("i,j,k->ijk", line, line, line).float()


def local_mean(volume: Tensor, window: Tensor) -> Tensor:
    """Weighted mean around every value of [3, H, W], edges replicated along all three axes."""
    reach = WINDOW_SIZE // 2
    padded = F.pad(volume[None, None], (reach,) * 6, mode="replicate")[0, 0]  # [3 + 10, H + 10, W + 10]
    weight = window.permute(2, 0, 1)[None]  # its third axis as input channels: twice as fast as conv3d
    return torch.stack([F.conv2d(padded[None, i : i + WINDOW_SIZE], weight)[0, 0] for i in range(3)])
