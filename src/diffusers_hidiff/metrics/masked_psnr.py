"""PSNR where the aligned images overlap, as RealBlur's evaluation has it."""

import numpy as np

from .alignment import AlignedPair


def masked_psnr(pair: AlignedPair) -> float:
    """PSNR in dB over the values inside the mask; identical images give infinity.

    Source:
        The evaluation published with RealBlur (Rim et al. 2020), data range 1.
    """
    mean_squared_error = np.sum((pair.sharp - pair.restored) ** 2, dtype=np.float64) / np.sum(
        pair.mask, dtype=np.float64
    )
    return float("inf") if mean_squared_error == 0 else float(-10 * np.log10(mean_squared_error))
