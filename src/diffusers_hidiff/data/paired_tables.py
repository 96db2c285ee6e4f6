"""Data sets of the library `datasets` -> blurry/sharp pairs: a repository of the Hub, or a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .paired_images import check_sizes

COLUMN_NAMES = (("blurry", "sharp"), ("blur", "sharp"), ("input", "target"))
SPLITS = ("train", "validation", "test")


def load_table(name: str, split: str, config_name: str | None = None, streaming: bool = False) -> Any:
    """A split of a data set.

    Args:
        name: A repository of the Hub; a folder of Parquet or Arrow shards, or of images with a table of metadata; or what
            `save_to_disk` wrote.
        split: For instance "train".
        config_name: Where a repository has several configurations.
        streaming: Whether to read it while it is used instead of downloading and converting it first.
    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset` if streamed. Its images are not decoded.
    Raises:
        ImportError: The library is not installed.
        ValueError: It cannot be loaded, has no such split, or not the columns.
    """
    import datasets  # noqa: PLC0415  (an extra)

    try:
        table = _load(datasets, name, split, config_name, streaming)
    except Exception as error:  # of the network, of the Hub, of the files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"The data set {name!r} cannot be loaded: {reason}") from error
    columns = pair_columns(table)
    table = table.select_columns(list(columns))
    for column in columns if table.features is not None else ():
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _load(datasets: Any, name: str, split: str, config_name: str | None, streaming: bool) -> Any:
    folder = Path(name)
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(name)
        if isinstance(saved, dict) and split not in saved:
            raise ValueError(f"it has no split {split!r}, but {', '.join(saved)}.")
        table = saved[split] if isinstance(saved, dict) else saved
        return table.to_iterable_dataset(num_shards=len(table.cache_files) or 1) if streaming else table
    if folder.is_dir() and (shards := sorted(folder.rglob("*.arrow"))):
        files = [str(shard) for shard in shards if split_of(shard) in (split, None)]
        return datasets.load_dataset("arrow", data_files={split: files}, split=split, streaming=streaming)
    return datasets.load_dataset(name, config_name, split=split, streaming=streaming)


def split_of(shard: Path) -> str | None:
    """The split that the name of a shard or of its folder begins with, if any."""
    names = [name.lower() for name in (shard.name, shard.parent.name)]
    return next((split for split in SPLITS for name in names if name.startswith(split)), None)


def pair_columns(table: Any) -> tuple[str, str]:
    """The columns of the blurry and of the sharp image.

    Raises:
        ValueError: There are none.
    """
    names = table.column_names or list(next(iter(table), {}))  # a stream may not know before its first row
    found = next((columns for columns in COLUMN_NAMES if set(columns) <= set(names)), None)
    if found is None:
        wanted = ", or ".join(" and ".join(columns) for columns in COLUMN_NAMES)
        raise ValueError(f"The data set must have columns {wanted}, got {', '.join(names) or 'no rows'}.")
    return found


def decode(cell: Any) -> np.ndarray:
    """An image as a table holds it, encoded or as a PIL image, as uint8 RGB, [H, W, 3], turned upright."""
    import datasets  # noqa: PLC0415

    if isinstance(cell, Mapping):
        return np.asarray(datasets.Image(mode="RGB").decode_example(dict(cell)))
    return np.asarray(cell.convert("RGB"))


def decode_pair(row: Mapping[str, Any], columns: tuple[str, str], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Blurry and sharp image of a row, uint8 RGB, [H, W, 3] each.

    Raises:
        ValueError: One cannot be read, or they differ in size; `name` says whose they are.
    """
    try:
        blurry, sharp = (decode(row[column]) for column in columns)
    except Exception as error:  # of the decoder, or of a network
        raise ValueError(f"{name} cannot be read as a pair of images: {error}.") from error
    check_sizes(blurry, sharp, name)
    return blurry, sharp


class TablePairs:
    """Pairs that are rows of a table.

    Args:
        name: As `load_table` takes it.
        split: Likewise.
        config_name: Likewise.
    Raises:
        ValueError: It cannot be loaded, or has no rows or not the columns.
    """

    def __init__(self, name: str, split: str, config_name: str | None = None) -> None:
        self.table = load_table(name, split, config_name)
        self.columns = pair_columns(self.table)
        self.title = name
        if not len(self.table):
            raise ValueError(f"The data set {name!r} has no rows.")

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"row {index} of {self.title}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Blurry and sharp image, uint8 RGB, [H, W, 3] each.

        Raises:
            ValueError: One cannot be read, or they differ in size.
        """
        return decode_pair(self.table[int(index)], self.columns, self.name(index))
