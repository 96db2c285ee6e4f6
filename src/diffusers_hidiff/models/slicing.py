"""A network on a large image, tile by tile: what is wide stays in the cache, and memory holds only what must last.

This is exact, unlike cutting the image: convolutions see a margin around each tile, and what depends on the whole image is
summed over the tiles first. The feature maps between the layers are changed in place, so that there is one of each; they may
lie where there is more room than on the device that computes, and come to it tile by tile.

B batch · H, W pixels · C channels
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil, isqrt
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..utils.allocator import return_freed_memory
from .memory import Place, empty, format_memory, free_memory, parse_memory, used_memory

Index = tuple[slice, slice, slice]
MB = 2**20
TENSORS_OF_A_TILE = 10  # so many times its largest tensor is what work on a tile takes, measured and rounded up
ALWAYS_FITS = 512 * MB  # below this the system is not asked what is free
EVERYTHING: Index = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Slicing:
    """How layers go through a feature map.

    Args:
        tile_bytes: How large the largest tensor of a tile may be; None for whole feature maps.
        window: Height and width of the windows whose pixels share an attention between channels, at the level at hand;
            None for the whole image.
        device: What computes; None is the device where the feature maps are.
        place: Where feature maps of several tiles lie.
        report: Told after each tile how many numbers of a feature map were gone through.
    """

    tile_bytes: int | None = None
    window: int | None = None
    device: torch.device | None = None
    place: Place = "device"
    report: Callable[[int], None] | None = None

    def inner(self, level: int) -> "Slicing":
        """The same at a level of 1 / 2^level the height and width."""
        return self if self.window is None else replace(self, window=max(1, self.window // 2**level))

    def fetch(self, part: Tensor) -> Tensor:
        """A part of a feature map, on the device that computes."""
        return part if self.device is None else part.to(self.device)

    def done(self, part: Tensor, times: int = 1) -> None:
        """A tile of a feature map has been gone through."""
        if self.place == "file":  # memory is short
            return_freed_memory()
        if self.report is not None:
            self.report(times * part.numel())


WHOLE = Slicing()


class SlicingMixin:
    """For networks that see images: how much memory they may take when no gradients are needed."""

    tile_megabytes: float | Literal["auto"] | None = "auto"  # None for whole feature maps
    max_memory: int | None = None  # bytes; None for what is free

    def enable_slicing(self, megabytes: float = 16.0) -> None:
        """Works tile by tile when no gradients are needed: less memory, the same picture to rounding.

        Args:
            megabytes: Size of the largest tensor of a tile; on a CPU as much as its last cache holds.
        Raises:
            ValueError: `megabytes` is not positive.
        """
        if not megabytes > 0:
            raise ValueError(f"`megabytes` must be positive, got {megabytes}.")
        self.tile_megabytes = float(megabytes)

    def disable_slicing(self) -> None:
        """Works on whole feature maps, however large."""
        self.tile_megabytes = None

    def limit_memory(self, max_memory: int | float | str | None) -> None:
        """Keeps to an amount of memory when no gradients are needed; the picture stays the same to rounding.

        The limit is for all that the process occupies (on a GPU, for what torch does there), weights and images included.
        Whole feature maps are used if they fit and are faster, else tiles; where the feature maps that must last do not fit,
        they lie in the host's memory, and if they do not fit there, in a file without a name in `TMPDIR`. Without a limit,
        four fifths of what is free when an image comes take its place. It ends `disable_slicing`.

        Args:
            max_memory: Bytes, or text such as "4GB"; None for no limit.
        Raises:
            ValueError: `max_memory` is no amount of memory.
        """
        self.max_memory = None if max_memory is None else parse_memory(max_memory)
        if self.tile_megabytes is None:
            self.tile_megabytes = "auto"

    def works_whole(self) -> bool:
        """Whether whole feature maps are used in any case."""
        if self.tile_megabytes is None or torch.is_grad_enabled():
            return True
        # A loop over tiles would make a graph of thousands of nodes
        return self.tile_megabytes == "auto" and self.max_memory is None and torch.compiler.is_compiling()

    def plan_slicing(self, blurry: Tensor, whole: int, maps: int, result: int = 0) -> Slicing:
        """How to work on [B, 3, H, W].

        Args:
            blurry: The images.
            whole: Bytes that whole feature maps take at their peak.
            maps: Bytes that remain of it when layers work tile by tile.
            result: Bytes that are needed afterwards, in place of all that.
        Raises:
            ValueError: `max_memory` does not suffice.
        """
        device = blurry.device
        if self.max_memory is not None:
            used = used_memory(device)
            room, smallest = self.max_memory - used, used + max(result, TENSORS_OF_A_TILE * MB)
            if self.max_memory < smallest:
                raise ValueError(
                    f"`max_memory` must be at least {format_memory(smallest)} for an image of {blurry.shape[-1]}x"
                    f"{blurry.shape[-2]} pixels, got {format_memory(self.max_memory)}."
                )
        elif whole <= ALWAYS_FITS:
            room = ALWAYS_FITS
        else:
            room = int(0.8 * free) if (free := free_memory(device)) is not None else sys.maxsize

        if self.tile_megabytes == "auto":
            if device.type != "cpu" and whole <= room:
                return WHOLE
            tile_bytes = (16 if device.type == "cpu" else 64) * MB
            tile_bytes = max(MB, min(tile_bytes, room // (2 * TENSORS_OF_A_TILE)))
        else:
            assert self.tile_megabytes is not None  # see `works_whole`
            tile_bytes = int(self.tile_megabytes * MB)
        maps += TENSORS_OF_A_TILE * tile_bytes
        if maps <= room:
            return Slicing(tile_bytes)
        host = free_memory(torch.device("cpu"))
        fits_host = device.type != "cpu" and (host is None or maps <= 0.8 * host)
        return Slicing(tile_bytes, device=device, place="host" if fits_host else "file")


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


def tile_side(shape: Sequence[int], tile_bytes: int | None, bytes_per_pixel: int) -> int | None:
    """Height and width of tiles of [B, H, W, C] whose largest tensor has at most `tile_bytes`, but at least 16.

    Args:
        shape: B, H, W, C.
        tile_bytes: None for one tile, however large.
        bytes_per_pixel: What that tensor takes for a pixel of one image.
    """
    if tile_bytes is None:
        return None
    return max(16, isqrt(tile_bytes // (shape[0] * bytes_per_pixel)))


def tiles(shape: Sequence[int], side: int | None, margin: int = 0) -> list[list[Tile]]:
    """Rows of nearly square tiles that cover [B, H, W, C].

    Args:
        shape: B, H, W, C.
        side: No tile is higher or wider; None for one tile. Its indices then do not depend on H and W, which compiled
            and exported graphs leave open.
        margin: How far a tile's result depends on its neighbours, in pixels.
    """
    every = slice(None)
    if side is None:
        return [[Tile(EVERYTHING, EVERYTHING, EVERYTHING)]]
    return [
        [
            Tile(*((every, row, column) for row, column in zip(rows, columns, strict=True)))
            for columns in spans(shape[2], side, margin)
        ]
        for rows in spans(shape[1], side, margin)
    ]


def scaled(index: Index, factor: int) -> Index:
    """The same rectangle of a feature map of `factor` times the height and width."""
    if index == EVERYTHING:
        return index
    images, rows, columns = index
    return images, slice(rows.start * factor, rows.stop * factor), slice(columns.start * factor, columns.stop * factor)


def only(rows: Sequence[Sequence[Element]]) -> Element | None:
    """The element, if there is but one."""
    return rows[0][0] if len(rows) == len(rows[0]) == 1 else None


def originals(features: Tensor, rows: Sequence[Sequence[Tile]]) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with a copy of what lies in `tile.outer`, as it was before the tiles that came first were changed.

    Kept of those are the pixels along the edges that tiles to come still look at, however wide the image.

    Args:
        features: [B, H, W, C].
        rows: Tiles that cover it, with a margin no larger than a tile. Each may be changed once it was handed out.
    """
    above = features[:, :0]
    for row in rows:
        height = row[0].inner[1]
        margin = row[0].outer[1].stop - height.stop
        below = features[:, height.stop - margin : height.stop].clone()
        left = features[:, height, :0]
        for tile in row:
            outer = features[tile.outer].clone()
            _, inside, columns = tile.crop
            outer[:, : inside.start] = above[:, :, tile.outer[2]]
            outer[:, inside, : columns.start] = left
            right = tile.inner[2].stop
            left = features[:, height, right - (tile.outer[2].stop - right) : right].clone()
            yield tile, outer
        above = below


def add_by_tiles(
    features: Tensor, rows: Sequence[Sequence[Tile]], slicing: Slicing, branch: Callable[[Tensor, Tile], Tensor]
) -> Tensor:
    """features + branch(features); in place if there are several tiles.

    Args:
        features: [B, H, W, C].
        rows: Tiles that cover it, with a margin no larger than a tile.
        slicing: What computes.
        branch: (features of `tile.outer`, tile) -> what is added to `tile.inner`.
    """
    if (tile := only(rows)) is not None:
        features = slicing.fetch(features)
        slicing.done(features)
        return features + branch(features, tile)
    for tile, outer in originals(features, rows):
        part = features[tile.inner]
        part.add_(branch(slicing.fetch(outer), tile).to(part.device))
        slicing.done(part)
    return features


def fill_by_tiles(
    shape: Sequence[int],
    rows: Sequence[Sequence[Tile]],
    slicing: Slicing,
    make: Callable[[Tile], Tensor],
    factor: int = 1,
    into: Tensor | None = None,
) -> Tensor:
    """A feature map whose tiles are made one after the other; a single one is returned as it was made.

    Args:
        shape: B, H, W, C of the feature map.
        rows: Tiles that cover it, or one of 1 / `factor` the height and width.
        slicing: Where the feature map goes.
        make: tile -> what comes to `tile.inner`.
        factor: How much larger the feature map is than what `rows` cover.
        into: A feature map that is no longer needed, to be overwritten.
    """
    if (tile := only(rows)) is not None:
        made = make(tile)
        slicing.done(made)
        return made
    features = into
    for tile in chain.from_iterable(rows):
        made = make(tile)
        if features is None:
            features = empty(shape, made.dtype, made.device, slicing.place)
        part = features[scaled(tile.inner, factor)]
        part.copy_(made)
        slicing.done(part)
    assert features is not None
    return features
