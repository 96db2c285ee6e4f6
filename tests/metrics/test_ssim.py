import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scored import FIGURES, golden_pair, noise

from diffusers_hidiff.metrics.ssim import volumetric_ssim


def literal_ssim(a, b):
    """The definition in double precision, with SciPy's Gaussian along all three axes."""
    x, y = a.astype(np.float64), b.astype(np.float64)

    def mean(volume):
        return gaussian_filter(volume, 1.5, radius=5, mode="nearest")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean(x) * mean(y) + c1) * (2 * (mean(x * y) - mean(x) * mean(y)) + c2)
    spread = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2 + c2
    return (likeness / ((mean(x) ** 2 + mean(y) ** 2 + c1) * spread)).mean()


@pytest.mark.parametrize("name", FIGURES)
def test_ssim_is_that_of_the_published_evaluation(name):
    assert volumetric_ssim(*golden_pair(name)) == pytest.approx(FIGURES[name]["gopro_ssim"], abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(23, 17), (4, 30), (1, 1)])
def test_ssim_agrees_with_its_definition_at_any_size(height, width):
    restored, sharp = noise(height, width, 1), noise(height, width, 2)
    assert volumetric_ssim(restored, sharp) == pytest.approx(literal_ssim(restored, sharp), abs=1e-5)


def test_the_channels_are_an_axis_of_the_volume():
    sharp = noise()
    one_channel_off = sharp.copy()
    one_channel_off[..., 0] = noise(seed=1)[..., 0]
    middle_off = one_channel_off[..., [1, 0, 2]]
    assert volumetric_ssim(one_channel_off, sharp) != pytest.approx(
        volumetric_ssim(middle_off, sharp[..., [1, 0, 2]]), abs=1e-3
    )


def test_ssim_of_identical_images_is_one():
    assert volumetric_ssim(noise(), noise()) == 1


def test_ssim_refuses_images_of_different_shape():
    with pytest.raises(ValueError, match="must have the same shape"):
        volumetric_ssim(noise(16, 24), noise(24, 16))
