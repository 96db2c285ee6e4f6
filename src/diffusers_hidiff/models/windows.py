"""Local statistics: sums over a window around each part of an image, for all parts at once (TLC, arXiv:2112.04491).

The image is cut into cells, and a window is a square of cells. Cells are small; gathered into a batch they cost one call
instead of one each, and no margin around each.

B batch · H, W pixels · C channels · n, m cells along height and width
"""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from .slicing import Tile


@dataclass(frozen=True)
class Cuts:
    """Where an axis is cut into nearly equal pieces.

    Args:
        bounds: Start of each piece, and the end of the last.
    """

    bounds: tuple[int, ...]

    @classmethod
    def of(cls, length: int, longest: int) -> "Cuts":
        """Pieces of `length` no longer than `longest`."""
        number = ceil(length / longest)
        return cls(tuple(length * i // number for i in range(number + 1)))

    @property
    def number(self) -> int:
        return len(self.bounds) - 1

    def groups(self, size: int) -> list["Cuts"]:
        """So many pieces at a time."""
        return [Cuts(self.bounds[i : i + size + 1]) for i in range(0, self.number, size)]

    @property
    def longest(self) -> int:
        return max(stop - start for start, stop in pairwise(self.bounds))

    def take(self, features: Tensor, dim: int) -> Tensor:
        """[…, length, …] -> […, n, longest, …], with zeros at the end of shorter pieces."""
        length, longest = features.shape[dim], self.longest
        if length < self.number * longest:
            first = [start - self.bounds[0] for start in self.bounds[:-1]]
            places = torch.tensor([min(start + i, length - 1) for start in first for i in range(longest)])
            inside = torch.tensor([i < stop - start for start, stop in pairwise(self.bounds) for i in range(longest)])
            features = features.index_select(dim, places.to(features.device))
            features = features * inside.to(features.device).view(-1, *[1] * (features.ndim - dim - 1))
        return features.unflatten(dim, (self.number, longest))

    def give(self, pieces: Tensor, dim: int) -> Tensor:
        """The inverse of `take`."""
        features, longest = pieces.flatten(dim, dim + 1), self.longest
        if self.bounds[-1] - self.bounds[0] == self.number * longest:
            return features
        ends = [stop - start for start, stop in pairwise(self.bounds)]
        places = torch.tensor([number * longest + i for number, end in enumerate(ends) for i in range(end)])
        return features.index_select(dim, places.to(pieces.device))


def as_cells(features: Tensor, rows: Cuts, columns: Cuts) -> Tensor:
    """[B, H, W, C] -> [B·n·m, height, width, C] of the largest cell."""
    cells = columns.take(rows.take(features, 1), 3)  # [B, n, height, m, width, C]
    return cells.transpose(2, 3).flatten(0, 2)


def from_cells(cells: Tensor, rows: Cuts, columns: Cuts) -> Tensor:
    """The inverse of `as_cells`."""
    cells = cells.unflatten(0, (-1, rows.number, columns.number)).transpose(2, 3)
    return rows.give(columns.give(cells, 3), 1)


def sum_around(cells: Tensor, width: int) -> Tensor:
    """Sum over the square of `width` x `width` cells around each, moved inside where it would stick out; [B, n, m, …]."""
    for dim in (1, 2):
        number = cells.shape[dim]
        reach = min(width, number)
        first = (torch.arange(number, device=cells.device) - reach // 2).clamp(0, number - reach)
        cells = cells.unfold(dim, reach, 1).sum(dim=-1).index_select(dim, first)
    return cells


def tile_of(rows: Cuts, columns: Cuts, shape: torch.Size) -> Tile:
    """The rectangle of those cells in [B, H, W, C], with a margin of one pixel."""
    slices = []
    for cuts, length in ((rows, shape[1]), (columns, shape[2])):
        start, stop = cuts.bounds[0], cuts.bounds[-1]
        first, last = max(0, start - 1), min(length, stop + 1)
        slices.append((slice(start, stop), slice(first, last), slice(start - first, stop - first)))
    return Tile(*((slice(None), row, column) for row, column in zip(*slices, strict=True)))
