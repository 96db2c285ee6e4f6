import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_condition_encoder, tiny_images, tiny_latent_encoder, tiny_prior, tiny_transformer
from torch import nn

from diffusers_hidiff.models import slicing
from diffusers_hidiff.models.attention import ChannelAttention, ChannelProducts
from diffusers_hidiff.models.latent_encoder import pooling_weights
from diffusers_hidiff.models.layers import GatedFeedForward
from diffusers_hidiff.models.memory import used_memory
from diffusers_hidiff.models.slicing import WHOLE, Slicing, originals, tile_side, tiles

CPU = torch.device("cpu")


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
    assert tile_side((2, 500, 400, 4), tile_bytes=None, bytes_per_pixel=32) is None
    assert tiles((2, 500, 400, 4), None, margin=1) == tiles((2, 8, 8, 4), None)


@pytest.mark.parametrize("shape", [(1, 16, 40, 2), (2, 50, 33, 2), (1, 90, 17, 2)])
@pytest.mark.parametrize("margin", [0, 1, 3])
def test_a_tile_sees_its_surroundings_as_they_were_before_the_tiles_around_it_were_changed(shape, margin):
    features = torch.randn(shape)
    before, seen = features.clone(), torch.zeros(shape)
    for tile, outer in originals(features, tiles(shape, side=16, margin=margin)):
        assert torch.equal(outer, before[tile.outer])
        features[tile.inner] = -1
        seen[tile.inner] += 1
    assert (seen == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("place", ["device", "file"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("size", [(64, 48), (8, 144), (104, 40)])
def test_neither_slicing_nor_a_file_changes_anything_but_rounding(place, batch_size, size):
    model = tiny_transformer(num_blocks=[2, 1, 1, 1], num_refinement_blocks=2).double()
    blurry, prior = tiny_images(batch_size, *size).double(), tiny_prior(batch_size).double()
    model.disable_slicing()
    expected = model(blurry, prior).sample
    model.slicing_for = lambda blurry: Slicing(1, device=blurry.device, place=place)
    torch.testing.assert_close(model(blurry, prior).sample, expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("family", [{}, {"activation": "leaky_relu", "wide_head": True, "num_blocks": 2}])
@pytest.mark.parametrize("size", [(256, 256), (204, 332), (8, 400)])
def test_an_encoder_that_slices_gives_the_same_tokens(family, size):
    blurry, sharp = tiny_images(2, *size).double(), tiny_images(2, *size, seed=7).double()
    for model, images in (
        (tiny_condition_encoder(**family), [blurry]),
        (tiny_latent_encoder(**family), [blurry, sharp]),
    ):
        model.double().disable_slicing()
        expected = model(*images).sample
        model.enable_slicing(megabytes=1e-6)
        torch.testing.assert_close(model(*images).sample, expected, rtol=0, atol=1e-12)
        model.enable_local_statistics(64)
        found = model(*images).sample
        model.disable_slicing()
        torch.testing.assert_close(found, model(*images).sample, rtol=0, atol=1e-12)


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
@pytest.mark.parametrize("build", [tiny_transformer, tiny_condition_encoder])
def test_the_cpu_slices_unless_told_otherwise(build):
    model = build()
    assert model.slicing_for(tiny_images()) == Slicing(tile_bytes=16 * 2**20)
    model.enable_slicing(megabytes=2)
    assert model.slicing_for(tiny_images()) == Slicing(tile_bytes=2 * 2**20)
    model.disable_slicing()
    assert model.slicing_for(tiny_images()) == WHOLE


@torch.no_grad()
def test_feature_maps_that_do_not_fit_go_to_a_file():
    model, large = tiny_transformer(), torch.empty(1, 3, 1, 1).expand(1, 3, 8192, 8192)
    model.limit_memory(used_memory(CPU) + 2**30)
    assert model.slicing_for(tiny_images()).place == "device"
    assert model.slicing_for(large).place == "file"
    model.limit_memory("1TB")
    assert model.slicing_for(large).place == "device"


@torch.no_grad()
def test_without_a_limit_what_is_free_decides(monkeypatch):
    model, large = tiny_transformer(), torch.empty(1, 3, 1, 1).expand(1, 3, 8192, 8192)
    for free, place in ((2**40, "device"), (2**30, "file"), (None, "device")):
        monkeypatch.setattr(slicing, "free_memory", lambda device, free=free: free)
        assert model.slicing_for(large).place == place


@torch.no_grad()
def test_a_limit_ends_whole_feature_maps_and_a_small_one_makes_small_tiles():
    model = tiny_transformer()
    model.disable_slicing()
    model.limit_memory(used_memory(CPU) + 40 * 2**20)
    assert 2**20 <= model.slicing_for(tiny_images()).tile_bytes < 4 * 2**20
    model.limit_memory(None)
    assert model.slicing_for(tiny_images()).tile_bytes == 16 * 2**20


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_transformer, tiny_condition_encoder])
def test_a_limit_too_small_to_work_at_all_is_refused_with_the_smallest_that_would_do(build):
    model = build()
    model.limit_memory("20MB")
    with pytest.raises(ValueError, match=r"`max_memory` must be at least (\d+)MB .* 24x16 pixels, got 20MB") as refusal:
        model.slicing_for(tiny_images())
    smallest = int(re.search(r"least (\d+)MB", str(refusal.value))[1])
    model.limit_memory(f"{smallest + 20}MB")  # what this process occupies goes on growing a little
    model.slicing_for(tiny_images())


@torch.no_grad()
@pytest.mark.parametrize("megabytes", [1e-6, 16, None])
@pytest.mark.parametrize("local_window", [None, 32])
def test_progress_rises_to_the_whole(megabytes, local_window):
    model, shares = tiny_transformer(num_blocks=[2, 1, 3, 1], num_refinement_blocks=0, local_window=local_window), []
    model.on_progress = shares.append
    model.tile_megabytes = megabytes
    model(tiny_images(2, 64, 80), tiny_prior(2))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


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


@pytest.mark.parametrize("length", [1, 3, 4, 11, 40])
def test_pooling_weights_are_those_of_adaptive_pooling(length):
    features = torch.rand(2, 3, length, dtype=torch.float64)
    expected = F.adaptive_avg_pool1d(features, 4)
    torch.testing.assert_close(features @ pooling_weights(length, 4, None).T, expected)
    torch.testing.assert_close(features @ pooling_weights(length, 4, length + 1).T, expected)


def test_pooling_over_windows_averages_their_grids():
    features = torch.rand(2, 3, 12, dtype=torch.float64)
    expected = torch.stack([F.adaptive_avg_pool1d(features[..., y : y + 8], 4) for y in (0, 4)]).mean(dim=0)
    torch.testing.assert_close(features @ pooling_weights(12, 4, 8).T, expected)


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
blurry, prior = torch.rand(1, 3, 768, 768), torch.randn(1, 16, 128)
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
