import cv2
import numpy as np
import pytest
from scored import golden_pair, noise

from diffusers_hidiff.metrics.alignment import AlignmentError, align, as_float


def test_a_shifted_and_dimmed_image_comes_to_lie_on_the_sharp_one():
    _, sharp = golden_pair("street")
    shift = np.array([[1, 0, 2.5], [0, 1, -1.5]], np.float32)
    moved = cv2.warpAffine(sharp, shift, sharp.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
    dimmed = (0.8 * moved).astype(np.uint8)
    pair = align(dimmed, sharp)
    before = np.abs(as_float(moved) - as_float(sharp)).mean()
    assert np.abs(pair.restored - pair.sharp).mean() < before / 4


def test_the_mask_leaves_out_what_the_warp_brings_in_from_outside():
    _, sharp = golden_pair("street")
    moved = np.roll(sharp, 4, axis=1)
    pair = align(moved, sharp)
    assert not pair.mask[:, -3:].any()
    assert pair.mask[16:-16, 16:-16].all()
    assert not pair.restored[pair.mask == 0].any()
    assert not pair.sharp[pair.mask == 0].any()


def test_identical_images_stay_as_they_are():
    _, sharp = golden_pair("odd")
    pair = align(sharp, sharp)
    assert pair.mask.all()
    np.testing.assert_allclose(pair.restored, as_float(sharp), atol=1e-4)


@pytest.mark.parametrize(
    ("restored", "sharp"),
    [
        (np.zeros((32, 32, 3), np.uint8), noise(32, 32)),
        (np.full((32, 32, 3), 90, np.uint8), noise(32, 32)),
        (noise(32, 32), np.full((32, 32, 3), 90, np.uint8)),
    ],
    ids=["black", "flat", "flat ground truth"],
)
def test_images_without_structure_are_refused(restored, sharp):
    with pytest.raises(AlignmentError, match="does not converge"):
        align(restored, sharp)


def test_images_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="must have the same shape"):
        align(noise(16, 24), noise(24, 16))
