"""Where the pairs of a benchmark lie: named data sets, a folder, or a data set of the Hub.

The layouts of the named data sets are those their authors describe. They are untried on the data itself, which this project
could not download.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from ..data.paired_images import pair_key, paired_files, read_rgb
from ..image_files import IMAGE_SUFFIXES
from . import EvaluationError

COLUMN_NAMES = (("blurry", "sharp"), ("blur", "sharp"), ("input", "target"))
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Pair:
    """A blurry image and its ground truth, read when they are needed.

    Args:
        name: What tells it from the others of its data set.
        read_sharp: Gives uint8 RGB, [H, W, 3].
        read_blurry: Likewise, where there is a blurry image.
        identity: Changes when the images do.
    """

    name: str
    read_sharp: Callable[[], np.ndarray]
    read_blurry: Callable[[], np.ndarray] | None
    identity: str


@dataclass(frozen=True)
class NamedDataset:
    """A published benchmark.

    Args:
        title: Its name in a table.
        protocol: How it is scored.
        find: The folder with its images, split -> name, blurry and sharp file of each pair.
        expected: What has to lie in the folder, in words.
        test_images: How many images the published figures are means of.
        figures: What the network was trained on -> PSNR in dB and SSIM that the paper reports (arXiv:2305.12966).
    """

    title: str
    protocol: str
    find: Callable[[Path, str], list[tuple[str, Path, Path]]]
    expected: str
    test_images: int
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)


def load_pairs(dataset: str, data_dir: str | Path | None = None, split: str = "test") -> list[Pair]:
    """The pairs of a data set, always in the same order.

    Args:
        dataset: A key of `NAMED_DATASETS`; a folder as `paired_files` takes it; or a Hub id (or a folder of Parquet files)
            for the library `datasets`, with columns blurry and sharp, blur and sharp, or input and target.
        data_dir: Where the user's copy of a named data set lies.
        split: For named data sets and tables.
    Raises:
        EvaluationError: There are none, or some image has no partner.
    """
    if dataset in NAMED_DATASETS:
        return pairs_of_named_dataset(dataset, data_dir, split)
    if data_dir is not None:
        raise EvaluationError(f"--data_dir goes with {', '.join(NAMED_DATASETS)}, not with --dataset {dataset}.")
    folder = Path(dataset)
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        return [pair_of_files(*files) for files in find_pairs(folder)]
    return pairs_of_table(load_table(dataset, split))


def pair_of_files(name: str, blurry: Path | None, sharp: Path) -> Pair:
    files = [file for file in (blurry, sharp) if file is not None]
    read_blurry = None if blurry is None else partial(read_rgb, blurry)
    return Pair(name, partial(read_rgb, sharp), read_blurry, identity_of_files(files))


def identity_of_files(files: Sequence[Path]) -> str:
    """Name, size and time of each file."""
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def pairs_of_folders(restored: Path, sharp: Path, blurry: Path | None = None) -> tuple[list[Pair], dict[str, Path]]:
    """A pair for each sharp image, and name -> restored file for those that have one; the same names, searched in subfolders.

    Raises:
        EvaluationError: A folder holds no image, two of one name, or a restored image has no sharp one.
    """
    restored_files, sharp_files = files_by_name(restored), files_by_name(sharp)
    blurry_files = {} if blurry is None else files_by_name(blurry)
    if alone := sorted(restored_files.keys() - sharp_files.keys()):
        raise EvaluationError(
            f"Every image of {str(restored)!r} must have one of the same name in {str(sharp)!r}; {len(alone)} have none, "
            f"the first is {alone[0]!r}."
        )
    if blurry is not None and (without := sorted(sharp_files.keys() - blurry_files.keys())):
        raise EvaluationError(f"{str(blurry)!r} lacks {len(without)} images, the first is {without[0]!r}.")
    pairs = []
    for name, file in sharp_files.items():
        pair = pair_of_files(name, blurry_files.get(name), file)
        compared = [restored_files[name]] if name in restored_files else []
        pairs.append(replace(pair, identity=identity_of_files([*compared, file])))
    return pairs, restored_files


def files_by_name(folder: Path) -> dict[str, Path]:
    """Path below `folder` without its suffix -> file, for its images and those of its subfolders, sorted."""
    if not folder.is_dir():
        raise EvaluationError(f"{str(folder)!r} is no folder.")
    files: dict[str, Path] = {}
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise EvaluationError(f"{files[name]} and {file} bear the same name.")
        files[name] = file
    if not files:
        raise EvaluationError(f"{str(folder)!r} holds no images ({' '.join(IMAGE_SUFFIXES)}).")
    return files


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Another one whenever an image is added, removed, renamed or written anew."""
    text = "\n".join(f"{pair.name}\t{pair.identity}" for pair in pairs)
    return hashlib.sha256(text.encode()).hexdigest()


# Named data sets


def pairs_of_named_dataset(name: str, data_dir: str | Path | None, split: str) -> list[Pair]:
    known = NAMED_DATASETS[name]
    if data_dir is None:
        raise EvaluationError(f"--dataset {name} needs --data_dir, the folder where your copy of it lies.")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise EvaluationError(f"--data_dir must be a folder, got {str(folder)!r}.")
    try:
        found = known.find(folder, split)
    except EvaluationError as error:
        raise EvaluationError(f"{error} For {known.title} is expected: {known.expected}.") from error
    return [pair_of_files(*files) for files in found]


def find_pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """Name, blurry and sharp file of what `paired_files` finds: scene/image, or the image alone where there are no scenes."""
    try:
        pairs = paired_files(folder)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    base = folder.parent if folder.is_file() else folder
    names = [(blurry.parent.parent / pair_key(blurry)).relative_to(base).as_posix() for blurry, _ in pairs]
    return [(name, *files) for name, files in zip(names, pairs, strict=True)]


def find_split(folder: Path, split: str) -> list[tuple[str, Path, Path]]:
    """GoPro as published, and the layout many projects share: below `folder`/`split`, or below `folder` where it has no
    splits (untried on the real data).
    """
    if (folder / split).is_dir():
        return find_pairs(folder / split)
    if others := [other for other in SPLITS if (folder / other).is_dir()]:
        raise EvaluationError(f"{str(folder)!r} has {others[0]}/ but no {split}/.")
    return find_pairs(folder)


def find_hide(folder: Path, split: str) -> list[tuple[str, Path, Path]]:
    """HIDE as published: `split`/**/NAME.png blurry, GT/NAME.png sharp; else as `find_split` (untried on the real data)."""
    sharp_folder = folder / "GT"
    if not sharp_folder.is_dir():
        return find_split(folder, split)
    root = folder / split
    pairs = []
    for blurry in sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
        sharp = sharp_folder / blurry.name
        if not sharp.is_file():
            raise EvaluationError(f"{str(blurry)!r} has no partner in GT/.")
        pairs.append((blurry.relative_to(root).with_suffix("").as_posix(), blurry, sharp))
    if not pairs:
        raise EvaluationError(f"{str(root)!r} holds no images.")
    return pairs


def find_realblur(kind: str, folder: Path, split: str) -> list[tuple[str, Path, Path]]:
    """RealBlur as published: what RealBlur_`kind`_`split`_list.txt names; else as `find_split`, which takes every scene that
    lies there (untried on the real data).
    """
    listing = folder / f"RealBlur_{kind}_{split}_list.txt"
    return find_pairs(listing) if listing.is_file() else find_split(folder, split)


COMMON_LAYOUT = "test/input/ and test/target/"
NAMED_DATASETS = {
    "gopro": NamedDataset(
        "GoPro",
        "gopro",
        find_split,
        f"test/SEQUENCE/blur/ and sharp/, or {COMMON_LAYOUT}",
        1111,
        {"GoPro": (33.33, 0.964)},
    ),
    "hide": NamedDataset(
        "HIDE",
        "gopro",
        find_hide,
        f"test/**/NAME.png and GT/NAME.png, or {COMMON_LAYOUT}",
        2025,
        {"GoPro": (31.46, 0.945)},
    ),
    "realblur_r": NamedDataset(
        "RealBlur-R",
        "realblur",
        partial(find_realblur, "R"),
        f"RealBlur_R_test_list.txt and what it names, or scene*/blur/ and gt/, or {COMMON_LAYOUT}",
        980,
        {"GoPro": (36.28, 0.958), "RealBlur-R": (41.01, 0.978)},
    ),
    "realblur_j": NamedDataset(
        "RealBlur-J",
        "realblur",
        partial(find_realblur, "J"),
        f"RealBlur_J_test_list.txt and what it names, or scene*/blur/ and gt/, or {COMMON_LAYOUT}",
        980,
        {"GoPro": (29.15, 0.890), "RealBlur-J": (33.70, 0.941)},
    ),
}


# The Hub


def load_table(name: str, split: str) -> Any:
    """A data set of the library `datasets`, from the Hub or a folder.

    Raises:
        EvaluationError: It cannot be loaded.
    """
    try:
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise EvaluationError(
            f"--dataset {name} is no folder of images, and data sets of the Hub need the library datasets; "
            "install it with `pip install 'diffusers-hidiff[evaluate]'`."
        ) from error
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # of the network, of the Hub, of the files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(
            f"The data set {name!r} cannot be loaded (it is none of {', '.join(NAMED_DATASETS)} and no folder of images, "
            f"so it was given to the library datasets): {reason}"
        ) from error


def pairs_of_table(table: Any) -> list[Pair]:
    """The rows of a `datasets.Dataset`, named by their numbers.

    Raises:
        EvaluationError: It has no row, or not the columns.
    """
    names = next((names for names in COLUMN_NAMES if set(names) <= set(table.column_names)), None)
    if names is None:
        wanted = ", or ".join(" and ".join(names) for names in COLUMN_NAMES)
        raise EvaluationError(f"The data set must have columns {wanted}, got {', '.join(table.column_names)}.")
    if not len(table):
        raise EvaluationError("The data set has no rows.")
    blurry, sharp = (table.select_columns([name]) for name in names)
    identity = str(table._fingerprint)
    return [
        Pair(f"{row:06d}", partial(read_row, sharp, names[1], row), partial(read_row, blurry, names[0], row), identity)
        for row in range(len(table))
    ]


def read_row(table: Any, column: str, row: int) -> np.ndarray:
    """One image of a table as uint8 RGB, [H, W, 3]."""
    return np.asarray(ImageOps.exif_transpose(table[row][column]).convert("RGB"))
