"""Restoring an image in overlapping tiles, each as if it were all: little memory, but not the same picture.

H, W pixels
"""

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor


def check_tiles(tile: int | None, tile_overlap: int) -> None:
    """
    Raises:
        ValueError: `tile` is no positive multiple of 8, or `tile_overlap` no multiple of 8 up to half of it.
    """
    if tile is None:
        return
    if tile <= 0 or tile % 8:
        raise ValueError(f"`tile` must be a positive multiple of 8, got {tile}.")
    if tile_overlap < 0 or tile_overlap % 8 or 2 * tile_overlap > tile:
        raise ValueError(
            f"`tile_overlap` must be a multiple of 8, at most half of `tile`, got {tile_overlap} with tile={tile}."
        )


def spans(length: int, tile: int, overlap: int) -> list[tuple[slice, Tensor]]:
    """Pieces that overlap, and what each counts at its pixels; together the pieces count 1 everywhere.

    Args:
        length: Pixels to cover.
        tile: Length of a piece, if there are so many.
        overlap: Pixels that two neighbours share at least, and over which one gives way to the other.
    """
    if length <= tile:
        return [(slice(0, length), torch.ones(length))]
    number = ceil((length - overlap) / (tile - overlap))
    starts = [min(i * (tile - overlap), length - tile) for i in range(number)]
    ramp = (torch.arange(tile) + 0.5).clamp(max=max(overlap, 0.5)) / max(overlap, 0.5)
    weight = torch.minimum(ramp, ramp.flip(0))
    total = torch.zeros(length)
    for start in starts:
        total[start : start + tile] += weight
    return [(slice(start, start + tile), weight / total[start : start + tile]) for start in starts]


def restore_in_tiles(pixels: Tensor, tile: int, overlap: int, restore: Callable[[Tensor], Tensor]) -> Tensor:
    """Restores each tile alone and blends them where they overlap.

    Args:
        pixels: [B, 3, H, W], H and W multiples of 8.
        tile: Height and width of a tile, a multiple of 8.
        overlap: Pixels that neighbouring tiles share, a multiple of 8.
        restore: [B, 3, h, w] -> the same, restored.
    """
    blended = torch.zeros_like(pixels)
    height, width = pixels.shape[-2:]
    for rows, row_weight in spans(height, tile, overlap):
        for columns, column_weight in spans(width, tile, overlap):
            weight = (row_weight[:, None] * column_weight).to(pixels.device)
            blended[..., rows, columns] += restore(pixels[..., rows, columns]) * weight
    return blended
