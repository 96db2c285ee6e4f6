"""Training patches from real pairs: what the paper trains on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .paired_images import paired_files, read_rgb
from .transforms import random_crop, random_flip_rotation, random_tile


class PairedPatchesDataset(torch.utils.data.Dataset):
    """Blurry/sharp patches of pairs of files; item `i` is the same on any number of workers and after any restart.

    Every pair is visited once before one is visited again. A patch is a random crop, in one of eight flips and rotations.

    Args:
        folder: As `paired_files` takes it.
        patch_size: Height and width of the patches.
        length: How many items there are.
        seed: Item i depends on (seed, i) alone.
        tile_size: If set, a patch lies within one of the tiles of this size that the image can be cut into. GoPro is
            trained on 512-pixel tiles; drawing them here has the same distribution and needs no second copy of the data.
        tile_overlap: How far neighbouring tiles overlap.
    Raises:
        ValueError: There are no pairs, or the tiles are smaller than a patch.
    """

    def __init__(
        self,
        folder: str | Path,
        patch_size: int,
        length: int,
        seed: int,
        tile_size: int | None = None,
        tile_overlap: int = 0,
    ) -> None:
        if tile_size is not None and not (0 <= tile_overlap < tile_size and patch_size <= tile_size):
            raise ValueError(
                f"`tile_size` must be at least the patch size and more than `tile_overlap`, got {tile_size},"
                f" patches of {patch_size} and an overlap of {tile_overlap}."
            )
        self.pairs = paired_files(folder)
        self.patch_size = patch_size
        self.length = length
        self.seed = seed
        self.tile_size, self.tile_overlap = tile_size, tile_overlap
        self.epoch = -1
        self.order = np.arange(0)  # of the pairs in this epoch

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int) -> tuple[Path, Path]:
        """The files of item `index`."""
        epoch, place = divmod(index, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.pairs))
        return self.pairs[self.order[place]]

    def source(self, index: int) -> str:
        """Where item `index` comes from: its blurry file."""
        return str(self.pair(index)[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`blurry` and `sharp`, [3, patch_size, patch_size], float32 in [0, 1], and `index`.

        Raises:
            ValueError: The images of a pair differ in size, or are smaller than a patch.
        """
        rng = np.random.default_rng((self.seed, 0, index))
        blurry_file, sharp_file = self.pair(index)
        images = [read_rgb(blurry_file), read_rgb(sharp_file)]
        if images[0].shape != images[1].shape:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in images]
            raise ValueError(f"The images of a pair must have one size, got {sizes} of {blurry_file} and {sharp_file}.")
        if self.tile_size is not None:
            images = random_tile(images, self.tile_size, self.tile_overlap, rng)
        images = random_flip_rotation(random_crop(images, self.patch_size, rng), rng)
        tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255 for image in images]
        return {"blurry": tensors[0], "sharp": tensors[1], "index": torch.tensor(index)}
