"""Crops, tiles and flips that treat a pair as one image."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def random_crop(images: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The same random square of every image [H, W, C].

    Raises:
        ValueError: An image is smaller than the square.
    """
    height, width = images[0].shape[:2]
    if min(height, width) < size:
        raise ValueError(f"`size` must fit into the image, got size={size} and an image of {width}x{height}.")
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return [image[top : top + size, left : left + size] for image in images]


def random_flip_rotation(images: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """The same one of the eight flips and rotations for every image [H, W, C]."""
    flip, turns = rng.integers(2), int(rng.integers(4))
    return [np.rot90(image[:, ::-1] if flip else image, turns) for image in images]


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of `size` begin that cover `length` pixels and overlap by `overlap`; the last one ends at the edge.

    A length below `size` is kept whole: it has one tile, shorter than the others.
    """
    last = max(0, length - size)
    return sorted({*range(0, last, size - overlap), last})


def random_tile(images: Sequence[np.ndarray], size: int, overlap: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The same one of the overlapping square tiles that every image [H, W, C] can be cut into, as `tile_starts` says."""
    places = []
    for length in images[0].shape[:2]:
        starts = tile_starts(length, size, overlap)
        start = starts[int(rng.integers(len(starts)))]
        places.append(slice(start, start + size))
    return [image[tuple(places)] for image in images]


def as_tensor(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float32 in [0, 1], [3, H, W]."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
