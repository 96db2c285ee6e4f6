"""Folders -> blurry/sharp pairs."""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..image_files import IMAGE_SUFFIXES

BLURRY_NAMES = ("blurry", "blur", "input")
SHARP_NAMES = ("sharp", "gt", "target")


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


def folder_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The subfolder that bears one of `names`, if there is one."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def pair_key(file: Path) -> str:
    """What the two files of a pair share: the name without suffix and without RealBlur's `blur_` or `gt_`."""
    return re.sub(r"^(blur|gt)_", "", file.stem)


def paired_files(folder: str | Path) -> list[tuple[Path, Path]]:
    """Pairs (blurry, sharp) of a folder, or those that a text file lists.

    A folder holds blurry/ and sharp/ with images of the same names; or input/ and target/; or, like GoPro and RealBlur
    as published, one folder per scene with blur/ and sharp/ or blur/ and gt/. A text file, like RealBlur's lists of
    training pairs, has a sharp and a blurry path in each line, relative to its own folder.

    Raises:
        ValueError: There are no such folders, or an image of one folder has no partner in the other.
    """
    folder = Path(folder)
    if folder.suffix == ".txt":
        return listed_pairs(folder)
    blurry_folder, sharp_folder = folder_of(folder, BLURRY_NAMES), folder_of(folder, SHARP_NAMES)
    if blurry_folder is not None and sharp_folder is not None:
        blurry, sharp = ({pair_key(file): file for file in image_files(f)} for f in (blurry_folder, sharp_folder))
        if alone := sorted(blurry.keys() ^ sharp.keys()):
            raise ValueError(
                f"Every image must stand in both {blurry_folder.name}/ and {sharp_folder.name}/ of {str(folder)!r},"
                f" these do not: {alone}."
            )
        return [(blurry[key], sharp[key]) for key in sorted(blurry)]
    scenes = sorted(scene for scene in folder.glob("*/") if folder_of(scene, BLURRY_NAMES) is not None)
    if not scenes:
        raise ValueError(
            f"`folder` must hold blurry/ and sharp/, input/ and target/, or scenes with blur/ and sharp/ or gt/,"
            f" got {str(folder)!r}."
        )
    return [pair for scene in scenes for pair in paired_files(scene)]


def listed_pairs(file: Path) -> list[tuple[Path, Path]]:
    """Pairs (blurry, sharp) from lines of `sharp blurry`, with whatever follows ignored.

    Raises:
        ValueError: A line is no pair, or a file of it does not exist.
    """
    pairs = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        files = [file.parent / name for name in line.split()[:2]]
        if len(files) < 2 or not all(path.is_file() for path in files):
            raise ValueError(
                f"Each line of {str(file)!r} must name a sharp and a blurry file, line {number} is {line!r}."
            )
        pairs.append((files[1], files[0]))
    return pairs


def read_rgb(file: str | Path) -> np.ndarray:
    """An image file as uint8 RGB, [H, W, 3], turned as its EXIF orientation says."""
    with Image.open(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
