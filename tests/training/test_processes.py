"""Several processes are one process with a larger batch."""

import pytest
import torch
from training_runs import log, stage1_flags, train, weights


def test_two_processes_with_half_the_batch_each_give_the_weights_of_one_with_the_whole(folders, tmp_path):
    """Over gloo, as torchrun starts them. Sums in another order: 1e-5 where the weights moved by up to 8e-3."""
    options = {"learning_rate": 1e-3, "max_train_steps": 8, "lr_constant_steps": 8}
    one = stage1_flags(folders, tmp_path / "one", train_batch_size=4, **options)
    two = stage1_flags(folders, tmp_path / "two", train_batch_size=2, **options)
    assert (train(1, one), train(2, two)) == ([0], [0, 0])
    whole, halves = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in whole.items():
        torch.testing.assert_close(halves[name], weight, rtol=0, atol=1e-5)
    for first, second in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert first == pytest.approx(second, rel=1e-5)
