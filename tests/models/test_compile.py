"""torch.compile takes every size of image with what it made for the first: prepared here, for GPUs, and counted on a CPU.

The backend counts the graphs and runs them as they are, so that nothing but the tracing is tested.
"""

import pytest
import torch
from tiny import tiny_images, tiny_mixer_denoiser, tiny_prior, tiny_transformer
from torch._dynamo.testing import CompileCounter

from diffusers_hidiff import HIDiffScheduler
from diffusers_hidiff.sampling import sample_prior

# Wide, high, square. The first must not be square, or squares are all it takes. The areas are alike because PyTorch chooses
# another convolution on CPUs for less than 20480 numbers, which costs one more graph; photographs are beyond that.
SIZES = ((48, 80), (120, 32), (64, 64))
FEW_BLOCKS = {"num_blocks": [1, 0, 0, 1], "num_refinement_blocks": 0}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_after_each_size(model, counter):
    """How many graphs there are after each of `SIZES`; the pictures must be those of the model as it is."""
    plain = tiny_transformer(**FEW_BLOCKS)
    plain.disable_slicing()
    counts = []
    for size in SIZES:
        blurry, prior = tiny_images(1, *size), tiny_prior()
        torch.testing.assert_close(model(blurry, prior).sample, plain(blurry, prior).sample)
        counts.append(counter.frame_count)
    return counts


@torch.no_grad()
def test_one_graph_of_the_whole_transformer_takes_every_size():
    model, counter = tiny_transformer(**FEW_BLOCKS), CompileCounter()
    model.compile(backend=counter, dynamic=True, fullgraph=True)
    assert graphs_after_each_size(model, counter) == [1, 1, 1]


@torch.no_grad()
def test_one_graph_a_width_of_block_takes_every_size():
    model, counter = tiny_transformer(**FEW_BLOCKS), CompileCounter()
    model.disable_slicing()
    model.compile_repeated_blocks(backend=counter, dynamic=True, fullgraph=True)
    assert graphs_after_each_size(model, counter) == [3, 3, 3]  # the outermost encoder's, decoder's and the innermost


@torch.no_grad()
def test_one_graph_of_the_denoiser_takes_every_step():
    denoiser, scheduler, counter = tiny_mixer_denoiser(), HIDiffScheduler(), CompileCounter()
    scheduler.set_timesteps(8)
    expected = sample_prior(denoiser, scheduler, tiny_prior(seed=1), tiny_prior())
    compiled = torch.compile(denoiser, backend=counter, fullgraph=True)
    torch.testing.assert_close(sample_prior(compiled, scheduler, tiny_prior(seed=1), tiny_prior()), expected)
    assert counter.frame_count == 1
