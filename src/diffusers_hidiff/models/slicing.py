"""Sub-layers on a large feature map, tile by tile: what is wide stays in the cache, and memory holds only what must last.

This is exact, unlike cutting the image: convolutions see a margin around each tile, and what depends on the whole image is
summed over the tiles first.

B batch · H, W pixels · C channels
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, isqrt
from typing import TypeVar

from torch import Tensor

Index = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Slicing:
    """How sub-layers go through a feature map.

    Args:
        tile_bytes: How large the largest tensor of a tile may be; None for whole feature maps.
        window: Height and width of the windows whose pixels share an attention between channels, at the level at hand;
            None for the whole image.
    """

    tile_bytes: int | None = None
    window: int | None = None

    def inner(self, level: int) -> "Slicing":
        """The same at a level of 1 / 2^level the height and width."""
        return self if self.window is None else replace(self, window=max(1, self.window // 2**level))


WHOLE = Slicing()


def check_window(window: int) -> None:
    """
    Raises:
        ValueError: `window` is no positive multiple of 8.
    """
    if window <= 0 or window % 8:
        raise ValueError(f"`window` must be a positive multiple of 8, got {window}.")


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


def tile_side(shape: Sequence[int], tile_bytes: int | None, bytes_per_pixel: int) -> int:
    """Height and width of tiles of [B, H, W, C] whose largest tensor has at most `tile_bytes`, but at least 16.

    Args:
        shape: B, H, W, C.
        tile_bytes: None for one tile.
        bytes_per_pixel: What that tensor takes for a pixel of one image.
    """
    batch_size, height, width = shape[:3]
    if tile_bytes is None:
        return max(height, width)
    return max(16, isqrt(tile_bytes // (batch_size * bytes_per_pixel)))


def tiles(shape: Sequence[int], side: int, margin: int = 0) -> list[list[Tile]]:
    """Rows of nearly square tiles that cover [B, H, W, C].

    Args:
        shape: B, H, W, C.
        side: No tile is higher or wider.
        margin: How far a tile's result depends on its neighbours, in pixels.
    """
    every = slice(None)
    return [
        [
            Tile(*((every, row, column) for row, column in zip(rows, columns, strict=True)))
            for columns in spans(shape[2], side, margin)
        ]
        for rows in spans(shape[1], side, margin)
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
