"""Training patches for those who own sharp images only: photographs blurred on the fly, and averages of video frames."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from .blur_synthesis import BlurOptions, average_of_frames, synthesise_blur
from .paired_images import image_files, read_rgb
from .transforms import as_tensor, random_crop, random_flip_rotation


class Photos:
    """Sharp images of a folder.

    Args:
        folder: Where they are.
        cache_megabytes: So much of them stays in memory once decoded, in each process that reads them.
    Raises:
        ValueError: `folder` is no folder or holds no image.
    """

    def __init__(self, folder: str | Path, cache_megabytes: int = 0) -> None:
        self.files = image_files(folder)
        self.free_bytes = cache_megabytes * 2**20
        self.kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> np.ndarray:
        """uint8 RGB, [H, W, 3].

        Raises:
            ValueError: The file cannot be read.
        """
        if index in self.kept:
            return self.kept[index]
        file = self.files[index]
        try:
            photo = read_rgb(file)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for a damaged file
            raise ValueError(f"{str(file)!r} cannot be read as an image: {error}.") from error
        if photo.nbytes <= self.free_bytes:
            self.kept[index] = photo
            self.free_bytes -= photo.nbytes
        return photo


class Frames:
    """Consecutive frames of one video, in memory.

    Args:
        folder: Where they are, sorted by name.
    Raises:
        ValueError: There are none, or their sizes differ.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder
        frames = [read_rgb(file) for file in image_files(folder)]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError(f"`frames_dir` must hold frames of one size, got several in {str(folder)!r}.")
        self.images = np.stack(frames)  # [number, H, W, 3]

    def __len__(self) -> int:
        return len(self.images)


def detail(image: np.ndarray) -> float:
    """Mean difference of neighbouring pixels: how much there is to blur."""
    return float(np.abs(np.diff(image.astype(np.int16), axis=0)).mean())


class SyntheticPatchesDataset(torch.utils.data.Dataset):
    """Blurry/sharp patches made on the fly; item `i` is the same on any number of workers and after any restart.

    Args:
        photos: Sharp images.
        patch_size: Height and width of the patches.
        length: How many items there are.
        seed: Item i depends on (seed, i) alone.
        options: Kinds and strengths of blur.
        frames: Of a video.
        frames_probability: How often an item is an average of frames instead of a photo with synthetic blur.
    Raises:
        ValueError: There are fewer frames than an average takes.
    """

    margin = 24  # blur reaches in from outside the patch

    def __init__(
        self,
        photos: Photos,
        patch_size: int,
        length: int,
        seed: int,
        options: BlurOptions | None = None,
        frames: Frames | None = None,
        frames_probability: float = 0.25,
    ) -> None:
        self.photos = photos
        self.patch_size = patch_size
        self.length = length
        self.seed = seed
        self.options = options or BlurOptions()
        self.frames = frames
        self.frames_probability = frames_probability if frames is not None else 0.0
        needed = 2 * (self.options.max_frames // 2) + 1
        if frames is not None and len(frames) < needed:
            raise ValueError(f"`frames_dir` must hold at least {needed} frames, got {len(frames)} in {frames.folder}.")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`blurry` and `sharp`, [3, patch_size, patch_size], float32 in [0, 1], and `index`.

        Raises:
            ValueError: An image cannot be read, or is smaller than a patch.
        """
        rng = np.random.default_rng((self.seed, index))
        if self.frames is not None and rng.random() < self.frames_probability:
            pair = self.pair_from_frames(self.frames, rng)
        else:
            pair = self.pair_from_photo(rng)
        blurry, sharp = random_flip_rotation(pair, rng)
        return {"blurry": as_tensor(blurry), "sharp": as_tensor(sharp), "index": torch.tensor(index)}

    def source(self, index: int) -> str:
        """Where item `index` comes from: the file of its photo, or the folder of frames."""
        rng = np.random.default_rng((self.seed, index))
        if self.frames is not None and rng.random() < self.frames_probability:
            return str(self.frames.folder)
        return str(self.photos.files[int(rng.integers(len(self.photos)))])

    def pair_from_photo(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        number = int(rng.integers(len(self.photos)))
        photo = self.photos.read(number)
        height, width = photo.shape[:2]
        if min(height, width) < self.patch_size:  # even if a smaller part of it would be enlarged
            raise ValueError(
                f"`size` must fit into the image, got size={self.patch_size} and an image of {width}x{height},"
                f" {self.photos.files[number]}."
            )
        margin = max(0, min(self.margin, (min(photo.shape[:2]) - self.patch_size) // 2))
        size = self.patch_size + 2 * margin
        soft = rng.random() < self.options.soft_probability
        source = int(size / rng.uniform(1, self.options.max_softness)) if soft else size
        crops = [random_crop((photo,), source, rng)[0] for _ in range(2)]
        sharp = max(crops, key=detail)  # sky teaches little
        if soft:
            sharp = cv2.resize(sharp, (size, size), interpolation=cv2.INTER_CUBIC)
        blurry = synthesise_blur(sharp, self.options, rng, margin)
        inside = slice(margin, margin + self.patch_size)
        return blurry, sharp[inside, inside]

    def pair_from_frames(self, frames: Frames, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        reach = int(rng.integers(self.options.min_frames // 2, self.options.max_frames // 2 + 1))
        middle = int(rng.integers(reach, len(frames) - reach))
        window = list(frames.images[middle - reach : middle + reach + 1])
        window = random_crop(window, self.patch_size, rng)
        return average_of_frames(np.stack(window), self.options.tone_curve), window[reach]
