from itertools import pairwise

import pytest
import torch

from diffusers_hidiff.pipelines.overlapping_tiles import restore_in_tiles, spans


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(8, 64, 16), (64, 64, 16), (200, 64, 16), (136, 64, 32), (72, 64, 0)]
)
def test_pieces_cover_every_pixel_and_count_one_together(length, tile, overlap):
    pieces, total = spans(length, tile, overlap), torch.zeros(length)
    for piece, weight in pieces:
        assert piece.stop - piece.start == min(tile, length)
        assert piece.start % 8 == 0
        total[piece] += weight
    torch.testing.assert_close(total, torch.ones(length))
    assert all(first.stop - second.start >= overlap for (first, _), (second, _) in pairwise(pieces))


def test_tiles_that_are_restored_alike_show_no_seam():
    pixels = torch.rand(2, 3, 104, 200)
    torch.testing.assert_close(restore_in_tiles(pixels, 64, 16, lambda tile: 1 - tile), 1 - pixels)


def test_the_seam_between_tiles_of_different_brightness_is_a_ramp():
    brightness = iter([0.0, 1.0])
    row = restore_in_tiles(torch.rand(1, 3, 64, 112), 64, 16, lambda tile: torch.full_like(tile, next(brightness)))[
        0, 0, 0
    ]
    assert (row[:48] == 0).all()
    assert (row[64:] == 1).all()
    assert (row.diff()[47:64] > 0).all()


def test_a_tile_as_large_as_the_image_changes_nothing_and_a_smaller_one_does(gopro_pipeline):
    image = torch.rand(3, 60, 90)
    options = {"latents": torch.randn(1, 16, 16), "output_type": "pt"}
    expected = gopro_pipeline(image, **options).images
    torch.testing.assert_close(gopro_pipeline(image, **options, tile=128).images, expected)
    found = gopro_pipeline(image, **options, tile=32, tile_overlap=16).images
    assert 1e-7 < (found - expected).abs().max() < 0.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tile": 20}, "`tile` must be a positive multiple of 8, got 20"),
        ({"tile": 0}, "`tile` must be a positive multiple of 8, got 0"),
        ({"tile": 64, "tile_overlap": 40}, "`tile_overlap` must be a multiple of 8, at most half of `tile`, got 40"),
        ({"tile": 64, "tile_overlap": 4}, "`tile_overlap` must be a multiple of 8"),
    ],
)
def test_tiles_that_cannot_be_are_refused(gopro_pipeline, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        gopro_pipeline(torch.rand(3, 8, 8), **options)
