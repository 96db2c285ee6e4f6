from math import ceil

import pytest
import torch
from torch import nn

from diffusers_hidiff.models.attention import WINDOW_CELLS, ChannelAttention, ChannelProducts
from diffusers_hidiff.models.slicing import Slicing, spans
from diffusers_hidiff.models.windows import Cuts, as_cells, from_cells, sum_around


def one_window_after_the_other(attention, hidden_states, window):
    """Local statistics as they are meant: each cell with the attention of the window around it."""
    features = attention.depthwise(attention.to_qkv(hidden_states), (slice(None),) * 3)
    query, key, value = (part[..., : hidden_states.shape[-1]] for part in features)
    rows, columns = (
        [inner for inner, *_ in spans(length, ceil(window / WINDOW_CELLS), 0)] for length in hidden_states.shape[1:3]
    )

    def around(pieces, i):
        first = max(0, min(i - WINDOW_CELLS // 2, len(pieces) - WINDOW_CELLS))
        chosen = pieces[first : first + WINDOW_CELLS]
        return slice(chosen[0].start, chosen[-1].stop)

    result = hidden_states.clone()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            seen = (slice(None), around(rows, i), around(columns, j))
            matrix = ChannelProducts.of(query[seen], key[seen], len(attention.temperature)).attention(
                attention.temperature
            )
            result[:, row, column] += attention.to_out(value[:, row, column], matrix)
    return result


@torch.no_grad()
@pytest.mark.parametrize("tile_bytes", [None, 1, 2 * 16 * 4 * 33**2], ids=["one tile", "a cell a tile", "four cells"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (53, 61), (5, 60)], ids=["even", "uneven", "thin"])
def test_attention_over_windows_is_that_of_a_plain_loop(height, width, tile_bytes):
    torch.manual_seed(0)
    attention, image = ChannelAttention(16, 2), torch.randn(2, height, width, 16)
    nn.init.uniform_(attention.temperature)
    expected = one_window_after_the_other(attention, image, window=48)
    found = attention(image.clone(), nn.Identity(), Slicing(tile_bytes, window=48))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - attention(image, nn.Identity(), Slicing())).abs().max() > 1e-3


@pytest.mark.parametrize(("length", "longest"), [(12, 4), (13, 4), (3, 8), (17, 5)])
def test_pieces_are_put_together_again(length, longest):
    cuts, features = Cuts.of(length, longest), torch.rand(2, length, 3)
    pieces = cuts.take(features, 1)
    assert pieces.shape == (2, ceil(length / longest), cuts.longest, 3)
    assert pieces.sum() == pytest.approx(features.sum().item())  # what fills up a piece is zero
    assert torch.equal(cuts.give(pieces, 1), features)


def test_a_group_of_cells_is_cut_where_the_image_is():
    image = torch.rand(1, 29, 23, 2)
    rows, columns = Cuts.of(29, 7), Cuts.of(23, 7)
    whole = as_cells(image, rows, columns)
    assert torch.equal(from_cells(whole, rows, columns), image)
    (first, second), part = rows.groups(3), columns.groups(9)[0]
    assert (first.number, second.number, part) == (3, 2, columns)
    assert torch.equal(as_cells(image[:, 17:], second, part), whole[3 * columns.number :, : second.longest])


def test_a_sum_around_a_cell_moves_inside_at_the_border():
    numbers = (10 * torch.arange(4)[:, None] + torch.arange(6))[None]  # row and column
    sums = sum_around(numbers, 3)[0]
    assert sums[2, 3] == sum([12, 13, 14, 22, 23, 24, 32, 33, 34])
    assert sums[0, 5] == sum([3, 4, 5, 13, 14, 15, 23, 24, 25])
    assert (sum_around(numbers, 9) == numbers.sum()).all()
