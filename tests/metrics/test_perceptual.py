import importlib.util

import pytest

from diffusers_hidiff.metrics.perceptual import PerceptualMetrics


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_without_pyiqa_one_sentence_says_how_to_get_it():
    with pytest.raises(ImportError, match=r"needs pyiqa; install it with .*diffusers-hidiff\[iqa\]"):
        PerceptualMetrics(["lpips"])


def test_no_metric_needs_no_library():
    assert PerceptualMetrics([]).metrics == {}
