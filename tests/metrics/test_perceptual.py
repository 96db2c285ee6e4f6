"""pyiqa needs a torchvision that fits torch, and weights from the network: here it is a stand-in with the same functions."""

import importlib.util
import sys

import numpy as np
import pytest

from diffusers_hidiff.metrics.perceptual import PerceptualMetrics

STAND_IN = """
class Metric:
    def __init__(self, mode):
        self.metric_mode = mode

    def __call__(self, *images):
        assert all(image.shape == (1, 3, 4, 6) for image in images)
        assert len(images) == (2 if self.metric_mode == "FR" else 1)
        return sum(image.max() * 10**i for i, image in enumerate(images))


def list_models():
    return ["lpips", "niqe", "far away"]


def create_metric(name, device):
    if name == "far away":
        raise OSError("no route to host")
    return Metric("FR" if name == "lpips" else "NR")
"""


@pytest.fixture
def pyiqa(tmp_path, monkeypatch):
    """Writes what is imported as pyiqa."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    yield (tmp_path / "pyiqa.py").write_text
    sys.modules.pop("pyiqa", None)


def test_metrics_that_compare_see_both_images_and_the_others_one(pyiqa):
    pyiqa(STAND_IN)
    restored, sharp = np.full((4, 6, 3), 51, np.uint8), np.full((4, 6, 3), 255, np.uint8)
    scores = PerceptualMetrics(["lpips", "niqe"]).score(restored, sharp)
    assert scores == pytest.approx({"lpips": 10.2, "niqe": 0.2})


@pytest.mark.parametrize(
    ("module", "name", "kind", "sentence"),
    [
        (STAND_IN, "nonsense", ValueError, "pyiqa has no metric 'nonsense'"),
        (STAND_IN, "far away", ValueError, "pyiqa cannot make the metric 'far away': no route to host"),
        (
            "raise RuntimeError('operator does not exist')",
            "lpips",
            ImportError,
            "cannot be imported: operator does not",
        ),
        ("import no_such_library", "lpips", ImportError, "needs no_such_library; install it with"),
    ],
)
def test_what_pyiqa_cannot_do_is_told_in_a_sentence(pyiqa, module, name, kind, sentence):
    pyiqa(module)
    with pytest.raises(kind, match=sentence):
        PerceptualMetrics([name])


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is not None, reason="what is said where pyiqa is missing")
def test_without_pyiqa_one_sentence_says_how_to_get_it():
    with pytest.raises(ImportError, match=r"needs pyiqa; install it with .*diffusers-hidiff\[iqa\]"):
        PerceptualMetrics(["lpips"])


def test_no_metric_needs_no_library():
    assert PerceptualMetrics([]).metrics == {}
