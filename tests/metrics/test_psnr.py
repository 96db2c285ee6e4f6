import numpy as np
import pytest
import torch

from diffusers_hidiff.metrics.psnr import psnr, psnr_of_arrays


def test_psnr_agrees_with_its_definition():
    restored, sharp = torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 7)
    for value, a, b in zip(psnr(restored, sharp), restored, sharp, strict=True):
        assert torch.isclose(value, -10 * torch.log10(((a - b).double() ** 2).mean()))


def test_a_constant_error_of_one_level_in_255_is_48_decibels():
    assert psnr(
        torch.full((1, 3, 4, 4), 100.0), torch.full((1, 3, 4, 4), 101.0), data_range=255
    ).item() == pytest.approx(48.1308, abs=1e-4)


def test_psnr_of_identical_images_is_infinite():
    assert psnr(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == float("inf")


def test_psnr_refuses_images_of_different_shape():
    with pytest.raises(ValueError, match="must have the same shape"):
        psnr(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 3))


def test_8_bit_arrays_are_compared_in_their_own_range():
    zeros = np.zeros((4, 5, 3), np.uint8)
    assert psnr_of_arrays(zeros, zeros + 1) == pytest.approx(48.1308, abs=1e-4)
