"""Sub-layers on a large feature map, tile by tile: what is wide stays in the cache, and memory holds only what must last.

This is exact, unlike cutting the image: convolutions see a margin around each tile, and what depends on the whole image is
summed over the tiles first.

B batch · H, W pixels · C channels
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import TypeVar

from torch import Tensor

Index = tuple[slice, slice, slice]
Element = TypeVar("Element")


@dataclass(frozen=True)
class Tile:
    """A rectangle of [B, H, W, C], all images and channels.

    Args:
        inner: Index of the rectangle.
        outer: Index of the rectangle and a margin around it, as far as the image goes.
        crop: Index of the rectangle within `outer`.
    """

    inner: Index
    outer: Index
    crop: Index


def spans(length: int, longest: int, margin: int) -> Iterator[tuple[slice, slice, slice]]:
    """`length` in nearly equal pieces no longer than `longest`: each as inner, outer and crop."""
    number = ceil(length / longest)
    for i in range(number):
        start, stop = length * i // number, length * (i + 1) // number
        first, last = max(0, start - margin), min(length, stop + margin)
        yield slice(start, stop), slice(first, last), slice(start - first, stop - first)


def tiles(shape: Sequence[int], tile_bytes: int | None, bytes_per_pixel: int, margin: int = 0) -> list[list[Tile]]:
    """Rows of nearly square tiles that cover [B, H, W, C].

    Args:
        shape: B, H, W, C.
        tile_bytes: How large the largest tensor of a tile may be; None for one tile.
        bytes_per_pixel: What that tensor takes for a pixel of one image.
        margin: How far a tile's result depends on its neighbours, in pixels.
    """
    batch_size, height, width = shape[:3]
    side = max(height, width)
    if tile_bytes is not None:
        side = max(16, isqrt(tile_bytes // (batch_size * bytes_per_pixel)))
    every = slice(None)
    return [
        [
            Tile(*((every, row, column) for row, column in zip(rows, columns, strict=True)))
            for columns in spans(width, side, margin)
        ]
        for rows in spans(height, side, margin)
    ]


def only(rows: Sequence[Sequence[Element]]) -> Element | None:
    """The element, if there is but one."""
    return rows[0][0] if len(rows) == len(rows[0]) == 1 else None


def add_by_tiles(
    hidden_states: Tensor, rows: Sequence[Sequence[Tile]], branch: Callable[[Tensor, Index], Tensor]
) -> Tensor:
    """hidden_states + branch(hidden_states); in place if there are several tiles.

    Args:
        hidden_states: [B, H, W, C].
        rows: Tiles that cover it, with a margin no larger than a tile.
        branch: (features of `tile.outer`, `tile.crop`) -> what is added to `tile.inner`.
    """
    if (tile := only(rows)) is not None:
        return hidden_states + branch(hidden_states, tile.crop)
    waiting: list[tuple[Tile, Tensor]] = []  # the next row of tiles still reads a margin of what was there before
    for row in rows:
        done = [(tile, branch(hidden_states[tile.outer], tile.crop)) for tile in row]
        for tile, result in waiting:
            hidden_states[tile.inner].add_(result)
        waiting = done
    for tile, result in waiting:
        hidden_states[tile.inner].add_(result)
    return hidden_states
