"""RealBlur's registration: a restored image is brought to the ground truth before they are compared.

H, W pixels
"""

from dataclasses import dataclass

import numpy as np

ITERATIONS, FILTER_SIZE = 100, 5


class AlignmentError(ValueError):
    """No homography was found between the two images."""


@dataclass(frozen=True)
class AlignedPair:
    """Two images that lie on each other.

    Args:
        restored: Warped and scaled, float32 [H, W, 3]; 0 outside the mask. May leave [0, 1].
        sharp: Ground truth, float32 [H, W, 3] in [0, 1]; 0 outside the mask.
        mask: 1 where the warped image has pixels, else 0; float32 [H, W, 3].
    """

    restored: np.ndarray
    sharp: np.ndarray
    mask: np.ndarray


def align(restored: np.ndarray, sharp: np.ndarray) -> AlignedPair:
    """Scales the intensities of `restored` and warps it by a homography, so that it fits `sharp`.

    Args:
        restored: uint8 [H, W, 3].
        sharp: Ground truth of the same shape.
    Raises:
        ValueError: The shapes differ.
        AlignmentError: The search does not converge (images without structure, or too unlike), or leaves no pixel.
    Source:
        The evaluation published with RealBlur (Rim et al. 2020): OpenCV's ECC on grey images.
    """
    import cv2  # noqa: PLC0415

    if restored.shape != sharp.shape:
        raise ValueError(f"`restored` and `sharp` must have the same shape, got {restored.shape} and {sharp.shape}.")
    x, z = as_float(sharp), as_float(restored)
    if not z.any():
        raise AlignmentError("The alignment does not converge: the restored image is black.")
    z = (np.sum(x * z) / np.sum(z * z)) * z
    size = (x.shape[1], x.shape[0])
    grey_x, grey_z = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (x, z))
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, ITERATIONS, 0)
    start = np.eye(3, dtype=np.float32)
    try:
        _, homography = cv2.findTransformECC(  # type: ignore[call-overload]  # OpenCV's annotations know no None here
            grey_x, grey_z, start, cv2.MOTION_HOMOGRAPHY, criteria, inputMask=None, gaussFiltSize=FILTER_SIZE
        )
    except cv2.error as error:
        raise AlignmentError(
            f"The alignment does not converge: {error.err or 'OpenCV finds no homography'}."
        ) from error
    if not np.isfinite(homography).all():
        raise AlignmentError("The alignment does not converge: the homography is not finite.")

    inverse = cv2.WARP_INVERSE_MAP
    warped = cv2.warpPerspective(z, homography, size, flags=cv2.INTER_CUBIC | inverse, borderMode=cv2.BORDER_REFLECT)
    mask = cv2.warpPerspective(np.ones_like(z), homography, size, flags=cv2.INTER_NEAREST | inverse)
    if not mask.any():
        raise AlignmentError("The alignment does not converge: the homography leaves no pixel.")
    return AlignedPair(warped * mask, x * mask, mask)


def as_float(image: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)
