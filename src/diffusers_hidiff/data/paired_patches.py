"""Training patches from real pairs: what the paper trains on."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .transforms import as_tensor, random_crop, random_flip_rotation, random_tile


class Pairs(Protocol):
    """Where pairs come from: `FilePairs`, `TablePairs`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where pair `index` lies."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Blurry and sharp image, uint8 RGB, [H, W, 3] each; a ValueError names what cannot be read."""


@dataclass(frozen=True)
class PatchCutter:
    """Cuts a training patch out of a pair: a random crop, in one of eight flips and rotations.

    Args:
        patch_size: Height and width of the patches.
        seed: The patch of sample i depends on (seed, i) alone.
        tile_size: If set, a patch lies within one of the tiles of this size that the image can be cut into. GoPro is
            trained on 512-pixel tiles; drawing them here has the same distribution and needs no second copy of the data.
        tile_overlap: How far neighbouring tiles overlap.
    Raises:
        ValueError: The tiles are smaller than a patch.
    """

    patch_size: int
    seed: int
    tile_size: int | None = None
    tile_overlap: int = 0

    def __post_init__(self) -> None:
        if self.tile_size is not None and not (
            0 <= self.tile_overlap < self.tile_size and self.patch_size <= self.tile_size
        ):
            raise ValueError(
                f"`tile_size` must be at least the patch size and more than `tile_overlap`, got {self.tile_size},"
                f" patches of {self.patch_size} and an overlap of {self.tile_overlap}."
            )

    def __call__(self, pair: tuple[np.ndarray, np.ndarray], index: int) -> dict[str, Tensor]:
        """`blurry` and `sharp`, [3, patch_size, patch_size], float32 in [0, 1], and `index`.

        Raises:
            ValueError: The images are smaller than a patch.
        """
        rng = np.random.default_rng((self.seed, 0, index))
        images = list(pair)
        if self.tile_size is not None:
            images = random_tile(images, self.tile_size, self.tile_overlap, rng)
        blurry, sharp = random_flip_rotation(random_crop(images, self.patch_size, rng), rng)
        return {"blurry": as_tensor(blurry), "sharp": as_tensor(sharp), "index": torch.tensor(index)}


class PairedPatchesDataset(torch.utils.data.Dataset):
    """Blurry/sharp patches of pairs; item `i` is the same on any number of workers and after any restart.

    Every pair is visited once before one is visited again.

    Args:
        pairs: Where they come from.
        cutter: Makes a patch of a pair.
        length: How many items there are.
    """

    def __init__(self, pairs: Pairs, cutter: PatchCutter, length: int) -> None:
        self.pairs = pairs
        self.cutter = cutter
        self.length = length
        self.epoch = -1
        self.order = np.arange(0)  # of the pairs in this epoch

    def __len__(self) -> int:
        return self.length

    def pair_number(self, index: int) -> int:
        """Which pair item `index` is cut from."""
        epoch, place = divmod(index, len(self.pairs))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.cutter.seed, 1, epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self.pairs))
        return int(self.order[place])

    def source(self, index: int) -> str:
        """Where item `index` comes from."""
        return self.pairs.name(self.pair_number(index))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`blurry` and `sharp`, [3, patch_size, patch_size], float32 in [0, 1], and `index`.

        Raises:
            ValueError: An image cannot be read or is smaller than a patch, or the images of a pair differ in size.
        """
        number = self.pair_number(index)
        pair = self.pairs.read(number)
        try:
            return self.cutter(pair, index)
        except ValueError as error:
            raise ValueError(f"{error} It is that of {self.pairs.name(number)}.") from error
