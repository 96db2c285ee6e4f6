import numpy as np
import torch
from torch import Tensor


def psnr(restored: Tensor, sharp: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image.

    Args:
        restored: Images to judge, [B, C, H, W], RGB in [0, data_range].
        sharp: Ground truth of the same shape and range.
        data_range: Largest value a pixel can take.
    Returns:
        [B] in dB, float64. Identical images give infinity.
    Raises:
        ValueError: The shapes differ.
    Source:
        skimage.metrics.peak_signal_noise_ratio, matched in tests/metrics/test_psnr.py.
    """
    if restored.shape != sharp.shape:
        raise ValueError(
            f"`restored` and `sharp` must have the same shape, got {tuple(restored.shape)} and {tuple(sharp.shape)}."
        )
    mean_squared_error = (restored.double() - sharp.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / mean_squared_error)


def psnr_of_arrays(restored: np.ndarray, sharp: np.ndarray) -> float:
    """PSNR in dB of two images as files hold them, uint8 [H, W, 3]."""
    restored_tensor, sharp_tensor = (torch.tensor(array)[None] for array in (restored, sharp))
    return psnr(restored_tensor, sharp_tensor, data_range=255).item()
