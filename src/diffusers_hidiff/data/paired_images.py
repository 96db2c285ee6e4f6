"""Folders -> blurry/sharp pairs: every layout of a data set that this project knows is known here.

The layouts of GoPro, HIDE and RealBlur are those their authors describe. They are untried on the data itself, which this
project could not download.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..image_files import IMAGE_SUFFIXES

BLURRY_NAMES = ("blurry", "blur", "input", "blur_gamma")
SHARP_NAMES = ("sharp", "gt", "target")
SPLITS = ("train", "test")
REALBLUR_LISTS = ("RealBlur_R_{split}_list.txt", "RealBlur_J_{split}_list.txt")
LAYOUTS = "blurry/ and sharp/, input/ and target/, or scenes with blur/ and sharp/ or gt/"


class PairFiles(NamedTuple):
    """The two files of a pair.

    Args:
        name: What tells it from the others of its data set: scene/image, or the image alone where there are no scenes.
        blurry: An image file.
        sharp: An image file.
    """

    name: str
    blurry: Path
    sharp: Path


class FoundFiles(NamedTuple):
    """What lies in a folder.

    Args:
        pairs: Sorted as they lie there, or in the order of the list that names them.
        alone: Images, or lines of a list, without a partner, each with the reason.
    """

    pairs: list[PairFiles]
    alone: list[tuple[str, str]]


def paired_files(folder: str | Path, split: str | None = None) -> list[tuple[Path, Path]]:
    """Pairs (blurry, sharp) of a folder or a list, as `find_pairs` finds them.

    Raises:
        ValueError: There are none, or an image has no partner.
    """
    return [(pair.blurry, pair.sharp) for pair in find_pairs(folder, split)]


def find_pairs(folder: str | Path, split: str | None = None, lists: Sequence[str] = REALBLUR_LISTS) -> list[PairFiles]:
    """The pairs of `find_files`, all of them.

    Raises:
        ValueError: There are none, or an image has no partner.
    """
    pairs, alone = find_files(folder, split, lists)
    if alone:
        file, reason = alone[0]
        raise ValueError(
            f"Every image of {str(folder)!r} must have a partner, {len(alone)} have none; the first: {file} {reason}."
        )
    if not pairs:
        raise ValueError(f"`folder` must hold pairs of images, got {str(folder)!r} without.")
    return pairs


def find_files(folder: str | Path, split: str | None = None, lists: Sequence[str] = REALBLUR_LISTS) -> FoundFiles:
    """Finds pairs in any of the known layouts, the first that fits:

    * a text file: two files in each line, as `listed_files` reads them;
    * blurry/ and sharp/ with images of the same names; or input/ and target/, blur/ and gt/, …;
    * RealBlur as published: what RealBlur_J_`split`_list.txt names;
    * a folder named `split` with any of these;
    * HIDE as published: `split`/**/NAME.png blurry, GT/NAME.png, beside the split, sharp;
    * GoPro and RealBlur as published: one folder per scene with blur/ and sharp/, or blur/ and gt/.

    Args:
        folder: A folder or a text file.
        split: "train" or "test"; needed only where `folder` has both.
        lists: Names of the lists to look for, {split} in them standing for the split.
    Raises:
        ValueError: There is no known layout, another split than asked for, or more than one list.
    """
    folder = Path(folder)
    if folder.suffix == ".txt":
        return listed_files(folder)
    if not folder.is_dir():
        raise ValueError(
            f"`folder` must be a folder of pairs or a list of them, got {str(folder)!r}, which is neither."
        )
    blurry, sharp = folder_of(folder, BLURRY_NAMES), folder_of(folder, SHARP_NAMES)
    if blurry is not None and sharp is not None:
        return match(blurry, sharp)
    if found := existing_lists(folder, split, lists):
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{str(folder)!r} holds more than one list, give the one that is meant: {names}.")
        return listed_files(found[0])
    if splits := [name for name in SPLITS if (folder / name).is_dir()]:
        return find_files(split_folder(folder, split, splits))
    if folder.name in SPLITS and (folder.parent / "GT").is_dir():
        return hide_files(folder, folder.parent / "GT")
    return scene_files(folder)


def folder_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The subfolder that bears one of `names`, if there is one."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def split_folder(folder: Path, split: str | None, splits: list[str]) -> Path:
    """The subfolder of a split; another split is never taken for one that is missing.

    Raises:
        ValueError: It is missing, or none is named and there are several.
    """
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None:
        raise ValueError(f"{str(folder)!r} has {'/ and '.join(splits)}/, give the one that is meant.")
    if split not in splits:
        raise ValueError(f"{str(folder)!r} has {splits[0]}/ but no {split}/.")
    return folder / split


def existing_lists(folder: Path, split: str | None, lists: Sequence[str]) -> list[Path]:
    names = [name.format(split=which) for name in lists for which in ((split,) if split else SPLITS)]
    return [folder / name for name in names if (folder / name).is_file()]


def match(blurry: Path, sharp: Path, prefix: str = "") -> FoundFiles:
    """Pairs the images of two folders whose names are the same, as `pair_key` says; names them so, with `prefix` before."""
    found = FoundFiles([], [])
    of_blurry, of_sharp = (by_key(folder, found) for folder in (blurry, sharp))
    for key in sorted(of_blurry.keys() | of_sharp.keys()):
        if key in of_blurry and key in of_sharp:
            found.pairs.append(PairFiles(prefix + key, of_blurry[key], of_sharp[key]))
        elif key in of_blurry:
            found.alone.append((str(of_blurry[key]), f"has no partner in {sharp.name}/"))
        else:
            found.alone.append((str(of_sharp[key]), f"has no partner in {blurry.name}/"))
    return found


def by_key(folder: Path, found: FoundFiles) -> dict[str, Path]:
    """The images of a folder by what pairs them; one whose key is taken already goes to those left alone in `found`."""
    files: dict[str, Path] = {}
    for file in only_images(folder.iterdir()):
        if (first := files.setdefault(pair_key(file), file)) is not file:
            found.alone.append((str(file), f"bears the name of {first.name}"))
    return files


def pair_key(file: Path) -> str:
    """What the two files of a pair share: the name without suffix and without RealBlur's `blur_` or `gt_`."""
    return re.sub(r"^(blur|gt)_", "", file.stem)


def scene_files(folder: Path) -> FoundFiles:
    """One folder per scene.

    Raises:
        ValueError: There is no scene.
    """
    scenes = sorted(scene for scene in folder.glob("*/") if folder_of(scene, BLURRY_NAMES) is not None)
    found = FoundFiles([], [])
    for scene in scenes:
        blurry, sharp = folder_of(scene, BLURRY_NAMES), folder_of(scene, SHARP_NAMES)
        if blurry is None or sharp is None:
            found.alone.append((str(scene), f"has no {' or '.join(SHARP_NAMES)}/"))
            continue
        pairs, alone = match(blurry, sharp, f"{scene.name}/")
        found.pairs.extend(pairs)
        found.alone.extend(alone)
    if not scenes:
        raise ValueError(f"`folder` must hold {LAYOUTS}, got {str(folder)!r}.")
    return found


def hide_files(root: Path, sharp_folder: Path) -> FoundFiles:
    """HIDE's layout: blurry images anywhere below `root`, sharp ones of the same names in one folder for all splits."""
    sharp = {file.name: file for file in image_files(sharp_folder)}
    found = FoundFiles([], [])
    for blurry in images_below(root):
        if blurry.name in sharp:
            name = blurry.relative_to(root).with_suffix("").as_posix()
            found.pairs.append(PairFiles(name, blurry, sharp[blurry.name]))
        else:
            found.alone.append((str(blurry), f"has no partner in {sharp_folder.name}/"))
    return found


def listed_files(file: Path) -> FoundFiles:
    """Pairs from a text file: two files in each line, relative to it; whatever follows them is ignored.

    The folder that holds an image says which it is. Where it does not, the sharp one stands first, as in RealBlur's lists.
    """
    found = FoundFiles([], [])
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        files = [file.parent / name for name in line.split()[:2]]
        if len(files) < 2 or not all(path.is_file() for path in files):
            reason = "must name a sharp and a blurry file, and both must exist"
            found.alone.append((f"line {number} of {file.name}, {line!r},", reason))
            continue
        sharp, blurry = files
        if sharp.parent.name in BLURRY_NAMES and blurry.parent.name in SHARP_NAMES:
            sharp, blurry = blurry, sharp
        name = (blurry.parent.parent / pair_key(blurry)).relative_to(file.parent).as_posix()
        found.pairs.append(PairFiles(name, blurry, sharp))
    return found


def image_files(folder: str | Path) -> list[Path]:
    """The images directly in `folder`, sorted by name.

    Raises:
        ValueError: `folder` is no folder or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder of images, got {str(folder)!r}, which is none.")
    files = only_images(folder.iterdir())
    if not files:
        raise ValueError(f"`folder` must hold images ({' '.join(IMAGE_SUFFIXES)}), got {str(folder)!r} without.")
    return files


def images_below(folder: Path) -> list[Path]:
    """The images in `folder` and its subfolders, sorted by path."""
    return only_images(folder.rglob("*"))


def only_images(files: Iterable[Path]) -> list[Path]:
    """Sorted; what begins with a dot is a file of the system, such as macOS's ._NAME.png, and no image."""
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))


def read_rgb(file: str | Path) -> np.ndarray:
    """An image file as uint8 RGB, [H, W, 3], turned as its EXIF orientation says."""
    with Image.open(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_pair(blurry: Path, sharp: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both images of a pair as uint8 RGB, [H, W, 3].

    Raises:
        ValueError: One cannot be read, being truncated for instance, or they differ in size.
    """
    images = []
    for file in (blurry, sharp):
        try:
            images.append(read_rgb(file))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for a damaged file
            raise ValueError(f"{str(file)!r} cannot be read as an image: {error}.") from error
    check_sizes(images[0], images[1], f"{blurry} and {sharp}")
    return images[0], images[1]


def check_sizes(blurry: np.ndarray, sharp: np.ndarray, of: str) -> None:
    """Refuses two images of different size; `of` says whose they are.

    Raises:
        ValueError: They differ.
    """
    if blurry.shape != sharp.shape:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (blurry, sharp)]
        raise ValueError(f"The images of a pair must have one size, got {sizes} of {of}.")


class FilePairs:
    """Pairs that lie in files.

    Args:
        folder: As `find_pairs` takes it.
        split: Likewise.
    Raises:
        ValueError: There are none, or an image has no partner.
    """

    def __init__(self, folder: str | Path, split: str | None = None) -> None:
        self.files = find_pairs(folder, split)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Where pair `index` lies: its blurry file."""
        return str(self.files[index].blurry)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Blurry and sharp image, uint8 RGB, [H, W, 3] each.

        Raises:
            ValueError: One cannot be read, or they differ in size.
        """
        return read_pair(self.files[index].blurry, self.files[index].sharp)
