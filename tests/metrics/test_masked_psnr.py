import numpy as np
import pytest
from scored import FIGURES, golden_pair

from diffusers_hidiff.metrics.alignment import AlignedPair, align
from diffusers_hidiff.metrics.masked_psnr import masked_psnr


@pytest.mark.parametrize("name", FIGURES)
def test_psnr_after_alignment_is_that_of_the_published_evaluation(name):
    assert masked_psnr(align(*golden_pair(name))) == pytest.approx(FIGURES[name]["realblur_psnr"], abs=0.01)


def test_only_values_inside_the_mask_count():
    sharp, mask = np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), np.float32)
    mask[:2] = 1
    assert masked_psnr(AlignedPair(sharp + 0.1 * mask, sharp, mask)) == pytest.approx(20, abs=1e-4)


def test_identical_images_give_infinity():
    ones = np.ones((4, 4, 3), np.float32)
    assert masked_psnr(AlignedPair(ones, ones, ones)) == float("inf")
