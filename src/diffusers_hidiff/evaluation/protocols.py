"""The two published ways to score a restored image."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..metrics.alignment import align
from ..metrics.masked_psnr import masked_psnr
from ..metrics.masked_ssim import masked_ssim
from ..metrics.psnr import psnr_of_arrays
from ..metrics.ssim import volumetric_ssim

METRICS = ("psnr", "ssim")  # what every protocol gives, in this order


@dataclass(frozen=True)
class Protocol:
    """How images of a benchmark are scored.

    Args:
        name: Its name on the command line.
        score: Restored and sharp image, uint8 [H, W, 3], -> name of the metric -> value. Identical images may have a PSNR
            of infinity. Raises ValueError where there is no figure: other shapes, too small, no alignment.
        libraries: What it imports beside the package's own requirements.
    """

    name: str
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    libraries: tuple[str, ...] = ()


def score_gopro(restored: np.ndarray, sharp: np.ndarray) -> dict[str, float]:
    """GoPro and HIDE: PSNR over all 8-bit RGB values, MATLAB's volumetric SSIM."""
    return {"psnr": psnr_of_arrays(restored, sharp), "ssim": volumetric_ssim(restored, sharp)}


def score_realblur(restored: np.ndarray, sharp: np.ndarray) -> dict[str, float]:
    """RealBlur: the restored image is aligned with the sharp one; PSNR and SSIM where they overlap."""
    pair = align(restored, sharp)
    return {"psnr": masked_psnr(pair), "ssim": masked_ssim(pair)}


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (Protocol("gopro", score_gopro), Protocol("realblur", score_realblur, ("skimage",)))
}
