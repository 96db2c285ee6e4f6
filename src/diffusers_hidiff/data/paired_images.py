"""Two folders -> blurry/sharp pairs."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..image_files import IMAGE_SUFFIXES


def image_files(folder: str | Path) -> list[Path]:
    """The images directly in `folder`, sorted by name.

    Raises:
        ValueError: `folder` is no folder or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder of images, got {str(folder)!r}, which is none.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"`folder` must hold images ({' '.join(IMAGE_SUFFIXES)}), got {str(folder)!r} without.")
    return files


def paired_files(folder: str | Path) -> list[tuple[Path, Path]]:
    """Pairs of the same file name from `folder/blurry` and `folder/sharp`.

    Raises:
        ValueError: An image of one folder has no partner in the other.
    """
    blurry, sharp = ({file.stem: file for file in image_files(Path(folder) / name)} for name in ("blurry", "sharp"))
    if alone := sorted(blurry.keys() ^ sharp.keys()):
        raise ValueError(
            f"Every image must stand in both blurry/ and sharp/ of {str(folder)!r}, these do not: {alone}."
        )
    return [(blurry[name], sharp[name]) for name in sorted(blurry)]


def read_rgb(file: str | Path) -> np.ndarray:
    """An image file as uint8 RGB, [H, W, 3], turned as its EXIF orientation says."""
    with Image.open(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
