"""The pairs of a benchmark: a named data set, a folder, or a data set of the Hub. `data` knows how they lie there."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.paired_images import REALBLUR_LISTS, find_pairs, images_below, read_rgb
from ..data.paired_tables import decode, load_table, pair_columns
from ..image_files import IMAGE_SUFFIXES
from . import EvaluationError


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
        expected: What has to lie in the folder, in words.
        test_images: How many images the published figures are means of.
        figures: What the network was trained on -> PSNR in dB and SSIM that the paper reports (arXiv:2305.12966).
        lists: Names of its lists of pairs, {split} in them standing for the split.
    """

    title: str
    protocol: str
    expected: str
    test_images: int
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    lists: tuple[str, ...] = ()


def load_pairs(dataset: str, data_dir: str | Path | None = None, split: str = "test") -> list[Pair]:
    """The pairs of a data set, always in the same order.

    Args:
        dataset: A key of `NAMED_DATASETS`; a folder as `find_pairs` takes it; or a Hub id (or a folder of Parquet files)
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
    if folder.is_dir() and not any(file for kind in TABLES for file in folder.rglob(kind)):
        return pairs_of_folder(folder)
    return pairs_of_table(table_of(dataset, split))


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
    for file in images_below(folder):
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
        return pairs_of_folder(folder, split, known.lists)
    except EvaluationError as error:
        raise EvaluationError(f"{error} For {known.title} is expected: {known.expected}.") from error


def pairs_of_folder(folder: Path, split: str | None = None, lists: Sequence[str] = ()) -> list[Pair]:
    """The pairs that `find_pairs` finds.

    Raises:
        EvaluationError: There are none, or some image has no partner.
    """
    try:
        return [pair_of_files(*files) for files in find_pairs(folder, split, lists)]
    except ValueError as error:
        raise EvaluationError(str(error)) from error


TABLES = ("*.parquet", "*.arrow")
COMMON_LAYOUT = "test/input/ and test/target/"
NAMED_DATASETS = {
    "gopro": NamedDataset(
        "GoPro",
        "gopro",
        f"test/SEQUENCE/blur/ and sharp/, or {COMMON_LAYOUT}",
        1111,
        {"GoPro": (33.33, 0.964)},
    ),
    "hide": NamedDataset(
        "HIDE",
        "gopro",
        f"test/**/NAME.png and GT/NAME.png, or {COMMON_LAYOUT}",
        2025,
        {"GoPro": (31.46, 0.945)},
    ),
    "realblur_r": NamedDataset(
        "RealBlur-R",
        "realblur",
        f"RealBlur_R_test_list.txt and what it names, or scene*/blur/ and gt/, or {COMMON_LAYOUT}",
        980,
        {"GoPro": (36.28, 0.958), "RealBlur-R": (41.01, 0.978)},
        REALBLUR_LISTS[:1],
    ),
    "realblur_j": NamedDataset(
        "RealBlur-J",
        "realblur",
        f"RealBlur_J_test_list.txt and what it names, or scene*/blur/ and gt/, or {COMMON_LAYOUT}",
        980,
        {"GoPro": (29.15, 0.890), "RealBlur-J": (33.70, 0.941)},
        REALBLUR_LISTS[1:],
    ),
}


# The Hub


def table_of(name: str, split: str) -> Any:
    """A data set of the library `datasets`, from the Hub or a folder.

    Raises:
        EvaluationError: It cannot be loaded.
    """
    try:
        return load_table(name, split)
    except ImportError as error:
        raise EvaluationError(
            f"--dataset {name} is no folder of images, and data sets of the Hub need the library datasets; "
            "install it with `pip install 'diffusers-hidiff[evaluate]'`."
        ) from error
    except ValueError as error:
        raise EvaluationError(
            f"--dataset {name} is none of {', '.join(NAMED_DATASETS)} and no folder of images, so it was given to the "
            f"library datasets. {error}"
        ) from error


def pairs_of_table(table: Any) -> list[Pair]:
    """The rows of a `datasets.Dataset`, named by their numbers.

    Raises:
        EvaluationError: It has no row, or not the columns.
    """
    try:
        columns = pair_columns(table)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    if not len(table):
        raise EvaluationError("The data set has no rows.")
    blurry, sharp = (table.select_columns([column]) for column in columns)
    identity = str(table._fingerprint)
    return [
        Pair(
            f"{row:06d}",
            partial(read_row, sharp, columns[1], row),
            partial(read_row, blurry, columns[0], row),
            identity,
        )
        for row in range(len(table))
    ]


def read_row(table: Any, column: str, row: int) -> np.ndarray:
    """One image of a table as uint8 RGB, [H, W, 3]."""
    return decode(table[row][column])
