"""The benchmark of training compares like with like."""

import pytest
from training_speed import Step


def test_both_arms_take_the_same_step():
    literal, ours = (Step(arm, "small", size=32, batch_size=2).run() for arm in ("literal", "ours"))
    assert ours == pytest.approx(literal, rel=1e-4)  # loss and gradient norm
