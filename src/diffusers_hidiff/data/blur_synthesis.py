"""Sharp images -> blurry ones, as a camera would have taken them.

Light adds up linearly, so everything happens in linear light: images here are float32 [H, W, 3], 1.0 the brightest
value that the sensor can hold. Every random draw comes from the generator handed in.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor

from .paired_images import image_files, read_rgb
from .transforms import random_crop, random_flip_rotation

cv2.setNumThreads(0)  # the data loader's workers are the parallelism


def srgb_to_linear(image: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4).astype(np.float32)


def linear_to_srgb(image: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB (IEC 61966-2-1)."""
    image = np.clip(image, 0, 1)
    return np.where(image <= 0.0031308, image * 12.92, 1.055 * image ** (1 / 2.4) - 0.055).astype(np.float32)


LINEAR_OF_BYTE = srgb_to_linear(np.arange(256) / 255)


def shake_trajectory(extent: float, num_poses: int, rng: np.random.Generator) -> np.ndarray:
    """Where a hand-held camera points during the exposure: a random walk with inertia, centred on its mean.

    Args:
        extent: Largest distance between two of its points, in pixels.
        num_poses: K, points in time, evenly spaced.
        rng: Source of randomness.
    Returns:
        [K, 2], pixels.
    Source:
        After Boracchi and Foi, "Modeling the performance of image restoration from motion blur", IEEE TIP 2012: a
        velocity with inertia, small random changes, and now and then a jerk.
    """
    inertia = rng.uniform(0.7, 0.98)
    velocity = rng.normal(size=2)
    velocity /= np.linalg.norm(velocity) + 1e-9
    positions = np.zeros((num_poses, 2))
    for i in range(1, num_poses):
        velocity = inertia * velocity + (1 - inertia) * rng.normal(size=2) * 2
        if rng.random() < 0.02:
            velocity += 2 * rng.normal(size=2)
        positions[i] = positions[i - 1] + velocity
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    positions *= extent / (distances.max() + 1e-9)
    return (positions - positions.mean(axis=0)).astype(np.float32)


def average_over_poses(image: np.ndarray, positions: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Mean of `image` over camera poses: shifted by `positions` and turned by `angles` about its centre.

    A turning camera blurs the corners otherwise than the centre, so the blur varies over the image.

    Args:
        image: [H, W] or [H, W, C], linear light.
        positions: [K, 2], pixels.
        angles: [K], radians.
    """
    height, width = image.shape[:2]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    total = np.zeros_like(image)
    for position, angle in zip(positions, angles, strict=True):
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        matrix = np.hstack([turn, (centre + position - turn @ centre)[:, None]])
        total += cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return total / len(positions)


def object_mask(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth-edged random polygon, [H, W] in [0, 1]: the outline of something that moves."""
    centre = rng.uniform(0.25, 0.75, size=2) * (width, height)
    angles = np.sort(rng.uniform(0, 2 * np.pi, size=rng.integers(5, 10)))
    radii = rng.uniform(0.15, 0.4, size=len(angles)) * min(height, width)
    corners = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = np.zeros((height, width), np.float32)
    cv2.fillPoly(mask, [corners.round().astype(np.int32)], 1.0)
    return cv2.GaussianBlur(mask, (0, 0), 1.5)


def boost_highlights(image: np.ndarray, gain: float) -> np.ndarray:
    """Gives clipped highlights back a brightness of up to 1 + `gain`, so that blur smears them into bright streaks.

    Only what is all but clipped (sRGB 247 and above) can have been brighter: boosting less bright skies as well would teach a
    network to darken them.
    """
    brightness = image.max(axis=-1, keepdims=True)
    return image * (1 + gain * np.clip((brightness - 0.93) / 0.07, 0, 1) ** 2)


def expose(image: np.ndarray, shot: float, read: float, rng: np.random.Generator) -> np.ndarray:
    """What the sensor writes down: saturation, shot and read noise, sRGB curve, 8 bits.

    Args:
        image: [H, W, 3], linear light.
        shot: Variance of the noise per unit of light.
        read: Standard deviation of the noise in the dark.
        rng: Source of randomness.
    Returns:
        uint8, [H, W, 3].
    """
    image = np.clip(image, 0, 1)
    image = image + rng.standard_normal(image.shape, np.float32) * np.sqrt(shot * image + read**2)
    return np.round(linear_to_srgb(image) * 255).astype(np.uint8)


@dataclass(frozen=True)
class BlurOptions:
    """What kinds of blur are made, and how strong.

    Args:
        min_extent: Shortest shake, pixels.
        max_extent: Longest shake, pixels.
        max_angle: Largest turn of the camera during the exposure, radians.
        object_probability: How often something moves over a still or shaking background.
        highlight_probability: How often clipped highlights are taken to have been brighter than the sensor can hold.
        max_highlight_gain: By how much at most, as a share of what the sensor can hold.
        noise_probability: How often there is noise at all: an average of video frames has next to none.
        max_shot_noise: Largest variance of the noise per unit of light.
        max_read_noise: Largest standard deviation of the noise in the dark.
        soft_probability: How often a photo is enlarged first: not every sharp picture is sharp to the pixel.
        max_softness: By how much at most.
    """

    min_extent: float = 4.0
    max_extent: float = 26.0
    max_angle: float = 0.06
    object_probability: float = 0.15
    highlight_probability: float = 0.4
    max_highlight_gain: float = 2.0
    noise_probability: float = 0.65
    max_shot_noise: float = 4e-4
    max_read_noise: float = 4e-3
    soft_probability: float = 0.3
    max_softness: float = 1.8


def synthesise_blur(sharp: np.ndarray, options: BlurOptions, rng: np.random.Generator) -> np.ndarray:
    """One blurry photograph of a sharp one; both are aligned, the blur's centre of mass being zero.

    Args:
        sharp: uint8 sRGB, [H, W, 3].
        options: Kinds and strengths.
        rng: Source of randomness.
    Returns:
        uint8 sRGB, [H, W, 3].
    """
    boosted, gain = rng.random() < options.highlight_probability, rng.uniform(0, options.max_highlight_gain)
    light = boost_highlights(LINEAR_OF_BYTE[sharp], gain * boosted)

    def motion() -> tuple[np.ndarray, np.ndarray]:
        extent = rng.uniform(options.min_extent, options.max_extent)
        num_poses = int(1.2 * extent) + 4
        positions = shake_trajectory(extent, num_poses, rng)
        turn = shake_trajectory(rng.uniform(0, options.max_angle), num_poses, rng)[:, 0]
        return positions, turn

    blurry = average_over_poses(light, *motion())
    if rng.random() < options.object_probability:
        mask = object_mask(light.shape[0], light.shape[1], rng)
        moving = motion()
        coverage = average_over_poses(mask, *moving)[..., None]
        background = light if rng.random() < 0.5 else blurry
        blurry = average_over_poses(light * mask[..., None], *moving) + (1 - coverage) * background
    noisy = rng.random() < options.noise_probability
    shot, read = rng.uniform(0, options.max_shot_noise), rng.uniform(0, options.max_read_noise)
    return expose(blurry, shot * noisy, read * noisy, rng)


def average_of_frames(frames: np.ndarray) -> np.ndarray:
    """A long exposure from consecutive frames of a fast camera, as the GoPro data set was made.

    Args:
        frames: uint8 sRGB, [K, H, W, 3].
    Returns:
        uint8 sRGB, [H, W, 3]; sharp is the middle frame.
    """
    return np.round(linear_to_srgb(LINEAR_OF_BYTE[frames].mean(axis=0)) * 255).astype(np.uint8)


def detail(image: np.ndarray) -> float:
    """Mean difference of neighbouring pixels: how much there is to blur."""
    return float(np.abs(np.diff(image.astype(np.int16), axis=0)).mean())


class SyntheticBlurDataset(torch.utils.data.Dataset):
    """Blurry/sharp patches made on the fly; item `i` is the same on any number of workers and after any restart.

    Args:
        photos_dir: A folder of sharp images.
        patch_size: Height and width of the patches.
        length: How many items there are.
        seed: Item i depends on (seed, i) alone.
        options: Kinds and strengths of blur.
        frames_dir: A folder of consecutive video frames of one size, sorted by name. Kept in memory.
        frames_probability: How often an item is an average of frames instead of a photo with synthetic blur.
        min_frames: Fewest frames in an average.
        max_frames: Most frames in an average.
    """

    margin = 24  # blur reaches in from outside the patch

    def __init__(
        self,
        photos_dir: str | Path,
        patch_size: int,
        length: int,
        seed: int,
        options: BlurOptions | None = None,
        frames_dir: str | Path | None = None,
        frames_probability: float = 0.25,
        min_frames: int = 7,
        max_frames: int = 13,
    ) -> None:
        self.files = [str(file) for file in image_files(photos_dir)]
        self.frames_dir = frames_dir
        self.photos = Dataset.from_dict({"image": self.files}).cast_column("image", Image(mode="RGB"))
        self.frames = np.empty((0, 0, 0, 3), np.uint8)  # [number, H, W, 3]
        if frames_dir is not None:
            self.frames = np.stack([read_rgb(file) for file in image_files(frames_dir)])
        self.patch_size = patch_size
        self.length = length
        self.seed = seed
        self.options = options or BlurOptions()
        self.frames_probability = frames_probability if frames_dir is not None else 0.0
        self.min_frames, self.max_frames = min_frames, max_frames

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`blurry` and `sharp`, [3, patch_size, patch_size], float32 in [0, 1], and `index`."""
        rng = np.random.default_rng((self.seed, index))
        if rng.random() < self.frames_probability:
            blurry, sharp = self.pair_from_frames(rng)
        else:
            blurry, sharp = self.pair_from_photo(rng)
        images = random_flip_rotation((blurry, sharp), rng)
        tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255 for image in images]
        return {"blurry": tensors[0], "sharp": tensors[1], "index": torch.tensor(index)}

    def source(self, index: int) -> str:
        """Where item `index` comes from: the file of its photo, or the folder of frames."""
        rng = np.random.default_rng((self.seed, index))
        if rng.random() < self.frames_probability:
            return str(self.frames_dir)
        return self.files[int(rng.integers(len(self.files)))]

    def pair_from_photo(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        photo = np.asarray(self.photos[int(rng.integers(len(self.photos)))]["image"])
        height, width = photo.shape[:2]
        if min(height, width) < self.patch_size:  # even if a smaller part of it would be enlarged
            raise ValueError(
                f"`size` must fit into the image, got size={self.patch_size} and an image of {width}x{height}."
            )
        margin = max(0, min(self.margin, (min(photo.shape[:2]) - self.patch_size) // 2))
        size = self.patch_size + 2 * margin
        soft = rng.random() < self.options.soft_probability
        source = int(size / rng.uniform(1, self.options.max_softness)) if soft else size
        crops = [random_crop((photo,), source, rng)[0] for _ in range(2)]
        sharp = max(crops, key=detail)  # sky teaches little
        if soft:
            sharp = cv2.resize(sharp, (size, size), interpolation=cv2.INTER_CUBIC)
        blurry = synthesise_blur(sharp, self.options, rng)
        inside = slice(margin, margin + self.patch_size)
        return blurry[inside, inside], sharp[inside, inside]

    def pair_from_frames(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        reach = int(rng.integers(self.min_frames // 2, self.max_frames // 2 + 1))
        middle = int(rng.integers(reach, len(self.frames) - reach))
        window = list(self.frames[middle - reach : middle + reach + 1])
        window = random_crop(window, self.patch_size, rng)
        return average_of_frames(np.stack(window)), window[reach]
