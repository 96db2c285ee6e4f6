import subprocess
import sys

import pytest
import torch
from tiny import tiny_condition_encoder, tiny_images, tiny_prior, tiny_transformer
from torch import nn

from diffusers_hidiff.models.attention import ChannelAttention, ChannelProducts
from diffusers_hidiff.models.latent_encoder import pool
from diffusers_hidiff.models.layers import GatedFeedForward
from diffusers_hidiff.models.slicing import WHOLE, Slicing, tile_side, tiles


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 5, 300, 4), (1, 64, 80, 4), (3, 17, 33, 4)])
@pytest.mark.parametrize("margin", [0, 1])
def test_tiles_cover_every_pixel_once_and_see_their_margin(shape, margin):
    seen = torch.zeros(shape)
    numbers = torch.arange(seen.numel()).view(shape)
    for row in tiles(shape, side=16, margin=margin):
        for tile in row:
            seen[tile.inner] += 1
            assert torch.equal(numbers[tile.outer][tile.crop], numbers[tile.inner])
            (_, rows, columns), (_, outer_rows, outer_columns) = tile.inner, tile.outer
            assert outer_rows.start == max(0, rows.start - margin)
            assert outer_columns.stop == min(shape[2], columns.stop + margin)
            assert max(rows.stop - rows.start, columns.stop - columns.start) <= 16
    assert (seen == 1).all()


def test_the_largest_tensor_of_a_tile_is_as_large_as_asked():
    side = tile_side((2, 500, 400, 4), tile_bytes=2**20, bytes_per_pixel=32)
    assert 0.9 * 2**20 < 2 * 32 * side**2 <= 2**20
    assert tile_side((2, 500, 400, 4), tile_bytes=1, bytes_per_pixel=32) == 16
    assert tile_side((2, 500, 400, 4), tile_bytes=None, bytes_per_pixel=32) == 500


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("size", [(64, 80), (8, 304), (200, 40)])
def test_slicing_changes_nothing_but_rounding(batch_size, size):
    model = tiny_transformer(num_blocks=[2, 1, 1, 1], num_refinement_blocks=2).double()
    blurry, prior = tiny_images(batch_size, *size).double(), tiny_prior(batch_size).double()
    model.disable_slicing()
    expected = model(blurry, prior).sample
    model.enable_slicing(megabytes=1e-6)
    torch.testing.assert_close(model(blurry, prior).sample, expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda: ChannelAttention(8, 2), lambda: GatedFeedForward(8, 2.66)])
def test_several_tiles_are_added_in_place_and_a_single_one_is_not(build):
    module, image = build(), torch.randn(1, 40, 50, 8)
    before = image.clone()
    expected = module(image, nn.Identity(), WHOLE)
    assert torch.equal(image, before)
    found = module(image, nn.Identity(), Slicing(tile_bytes=1))
    assert found is image
    torch.testing.assert_close(found, expected)


def test_training_never_slices():
    model = tiny_transformer()
    model.enable_slicing(megabytes=1e-6)
    model.enable_local_statistics(window=8)
    assert model.slicing_for(tiny_images()) == WHOLE
    model(tiny_images(1, 64, 64), tiny_prior()).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_the_cpu_slices_unless_told_otherwise():
    model = tiny_transformer()
    assert model.tile_bytes_for(tiny_images()) == 16 * 2**20
    model.enable_slicing(megabytes=2)
    assert model.tile_bytes_for(tiny_images()) == 2 * 2**20
    model.disable_slicing()
    assert model.tile_bytes_for(tiny_images()) is None


@pytest.mark.parametrize("megabytes", [0, -1, float("nan")])
def test_a_tile_of_no_size_is_refused(megabytes):
    with pytest.raises(ValueError, match="`megabytes` must be positive"):
        tiny_transformer().enable_slicing(megabytes)


@torch.no_grad()
@pytest.mark.parametrize("window", [64, 72, 128])
def test_a_window_as_large_as_the_image_is_the_published_method(window):
    model = tiny_transformer().double()
    blurry, prior = tiny_images(1, 64, 40).double(), tiny_prior().double()
    expected = model(blurry, prior).sample
    model.enable_local_statistics(window)
    torch.testing.assert_close(model(blurry, prior).sample, expected, rtol=0, atol=1e-12)
    model.enable_local_statistics(32)
    assert (model(blurry, prior).sample - expected).abs().max() > 1e-6
    model.disable_local_statistics()
    assert torch.equal(model(blurry, prior).sample, expected)


@torch.no_grad()
def test_channel_attention_over_a_window_is_that_of_the_window_cut_out():
    attention, image = ChannelAttention(8, 2).double(), torch.randn(1, 32, 20, 8).double()
    found = attention(image.clone(), nn.Identity(), Slicing(window=12))  # tiles of 4, the window begins 4 before one
    query, key, value = (part[..., :8] for part in attention.depthwise(attention.to_qkv(image), (slice(None),) * 3))
    tile, window = (slice(None), slice(12, 16), slice(8, 12)), (slice(None), slice(8, 20), slice(4, 16))
    matrix = ChannelProducts.of(query[window], key[window], 2).attention(attention.temperature)
    torch.testing.assert_close(found[tile], image[tile] + attention.to_out(value[tile], matrix))


def test_pooling_over_windows_averages_their_grids():
    features = torch.rand(2, 3, 12, 8)
    assert torch.equal(pool(features, 4, None), pool(features, 4, 12))
    expected = torch.stack([pool(features[:, :, y : y + 8], 4, None) for y in (0, 4)]).mean(dim=0)
    torch.testing.assert_close(pool(features, 4, 8), expected)


@pytest.mark.parametrize("build", [tiny_transformer, tiny_condition_encoder])
def test_local_statistics_are_saved_with_the_model(build, tmp_path):
    model = build(local_window=64)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.local_window == 64
    model.disable_local_statistics()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.local_window is None


@pytest.mark.parametrize("window", [0, -8, 20])
@pytest.mark.parametrize("build", [tiny_transformer, tiny_condition_encoder])
def test_a_window_that_is_no_positive_multiple_of_8_is_refused(build, window):
    with pytest.raises(ValueError, match=f"`window` must be a positive multiple of 8, got {window}"):
        build().enable_local_statistics(window)
    with pytest.raises(ValueError, match=f"`window` must be a positive multiple of 8, got {window}"):
        build(local_window=window)


PEAK = """
import resource, sys, torch
from diffusers_hidiff import HIDIFF_SMALL, HIDiffTransformer
torch.set_grad_enabled(False)
model = HIDiffTransformer.from_pretrained(HIDIFF_SMALL, subfolder="transformer")
if sys.argv[1] == "whole":
    model.disable_slicing()
blurry, prior = torch.rand(1, 3, 1024, 1024), torch.randn(1, 16, 128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(blurry, prior)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX")
def test_slicing_takes_less_than_half_the_memory():
    sliced, whole = (
        int(subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("sliced", "whole")
    )
    assert sliced < whole / 2
