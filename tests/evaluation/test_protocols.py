import pickle

import pytest
from scored import FIGURES, golden_pair, noise

from diffusers_hidiff.evaluation.protocols import METRICS, PROTOCOLS

TOLERANCES = {"gopro": (1e-4, 1e-5), "realblur": (0.01, 1e-3)}  # dB, SSIM


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_those_of_the_published_evaluation(protocol, name):
    scores = PROTOCOLS[protocol].score(*golden_pair(name))
    assert tuple(scores) == METRICS
    for metric, tolerance in zip(METRICS, TOLERANCES[protocol], strict=True):
        assert scores[metric] == pytest.approx(FIGURES[name][f"{protocol}_{metric}"], abs=tolerance)


def test_identical_images_have_infinite_psnr_and_an_ssim_of_one():
    assert PROTOCOLS["gopro"].score(noise(), noise()) == {"psnr": float("inf"), "ssim": 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_images_of_different_shape_are_refused(protocol):
    with pytest.raises(ValueError, match="same shape"):
        PROTOCOLS[protocol].score(noise(16, 24), noise(16, 25))


@pytest.mark.parametrize("protocol", PROTOCOLS.values())
def test_a_protocol_can_be_sent_to_another_process(protocol):
    assert pickle.loads(pickle.dumps(protocol)) == protocol
