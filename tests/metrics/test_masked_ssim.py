import numpy as np
import pytest
from scored import FIGURES, golden_pair, noise

from diffusers_hidiff.metrics.alignment import AlignedPair, align, as_float
from diffusers_hidiff.metrics.masked_ssim import masked_ssim


@pytest.mark.parametrize("name", FIGURES)
def test_ssim_after_alignment_is_that_of_the_published_evaluation(name):
    assert masked_ssim(align(*golden_pair(name))) == pytest.approx(FIGURES[name]["realblur_ssim"], abs=1e-3)


def test_identical_images_give_one():
    sharp = as_float(noise())
    assert masked_ssim(AlignedPair(sharp, sharp, np.ones_like(sharp))) == pytest.approx(1)


def test_what_lies_outside_the_mask_does_not_count():
    sharp, restored = as_float(noise(40, 24)), as_float(noise(40, 24))
    restored[30:] = as_float(noise(10, 24, seed=1))
    mask = np.ones_like(sharp)
    assert masked_ssim(AlignedPair(restored, sharp, mask)) < 0.95
    mask[25:] = 0  # the window reaches five pixels
    assert masked_ssim(AlignedPair(restored, sharp, mask)) == pytest.approx(1)


def test_images_smaller_than_the_window_are_refused():
    tiny = as_float(noise(10, 24))
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 24x10"):
        masked_ssim(AlignedPair(tiny, tiny, np.ones_like(tiny)))
    smallest = as_float(noise(11, 11))
    assert masked_ssim(AlignedPair(smallest, smallest, np.ones_like(smallest))) == pytest.approx(1)


def test_an_overlap_at_the_border_alone_is_refused():
    sharp = as_float(noise())
    mask = np.zeros_like(sharp)
    mask[:3] = 1
    with pytest.raises(ValueError, match="inside the border"):
        masked_ssim(AlignedPair(sharp, sharp, mask))
