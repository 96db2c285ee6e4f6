"""Files of pairs -> Parquet shards of patches, as GoPro is cut for training. A run that is stopped goes on.

While it works everything lies in a folder beside the output, .NAME.incomplete; for a shard that is whole there is a note of
what was left out of it. The folder gets its name when all shards are there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from ..image_files import write_whole
from .paired_images import FoundFiles, PairFiles, find_files, read_pair
from .transforms import tile_starts

SPLITS = {"train": "train", "validation": "test"}  # ours -> that of the source
NOTES = "notes"
CARD = """---
configs:
- config_name: default
  data_files:
{splits}
---
Pairs of blurry and sharp patches, made by scripts/prepare_data.py of diffusers-hidiff. `name`, `top` and `left` say where
a patch was cut; report.json says what was left out. The licence is that of the images it was made of.
"""


@dataclass(frozen=True)
class Patches:
    """How images are cut.

    Args:
        size: Height and width of a training patch. An image with a shorter side keeps that side whole.
        overlap: How far neighbouring patches overlap.
        validation_size: Height and width of the one central patch of each validation image.
        pairs_per_shard: Images that are cut into one shard.
    Raises:
        ValueError: A value is impossible.
    """

    size: int = 512
    overlap: int = 256
    validation_size: int = 256
    pairs_per_shard: int = 32

    def __post_init__(self) -> None:
        for name in ("size", "validation_size", "pairs_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"`overlap` must be at least 0 and less than `size`={self.size}, got {self.overlap}.")

    def places(self, split: str, height: int, width: int) -> list[tuple[slice, slice]]:
        """Where an image is cut, row by row."""
        if split == "validation":
            size = self.validation_size
            top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
            return [(slice(top, top + size), slice(left, left + size))]
        rows, columns = (tile_starts(length, self.size, self.overlap) for length in (height, width))
        return [(slice(top, top + self.size), slice(left, left + self.size)) for top in rows for left in columns]


@dataclass(frozen=True)
class Shard:
    """A file to be made.

    Args:
        split: Ours.
        name: Of the file, without suffix.
        pairs: What is cut into it.
    """

    split: str
    name: str
    pairs: list[PairFiles]


def prepare_shards(source: str | Path, output: str | Path, patches: Patches, num_workers: int = 0) -> dict[str, Any]:
    """Makes `output`, a folder that `datasets.load_dataset` reads: splits train and validation, columns blurry and sharp.

    Args:
        source: Pairs in any layout that `find_files` knows. Its split test becomes validation.
        output: Must not exist.
        patches: How images are cut.
        num_workers: Threads that read, cut and encode.
    Returns:
        What is in report.json: per split the pairs found and kept, patches, shards, and what was left out and why.
    Raises:
        ValueError: `output` exists, `source` holds no pairs, or an earlier run with other data or options was stopped.
        OSError: Something cannot be written. The same call goes on.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise ValueError(f"`output` must not exist yet, got {str(output)!r}.")
    found = find_splits(source)
    if not any(files.pairs for files in found.values()):
        raise ValueError(f"`source` must hold pairs of images, got {str(source)!r} without.")
    shards = plan(found, patches.pairs_per_shard)
    folder = output.with_name(f".{output.name}.incomplete")
    begin(folder, found, patches)
    todo = [shard for shard in shards if not is_whole(folder, shard)]
    total, left = (sum(len(shard.pairs) for shard in some) for some in (shards, todo))
    with tqdm(total=total, initial=total - left, unit="pair", desc=output.name) as bar, pool(num_workers) as run:
        for shard in todo:
            write_shard(folder, shard, patches, run, bar)
    report = report_of(source, folder, found, shards, patches)
    finish(folder, output, report)
    return report


def find_splits(source: Path) -> dict[str, FoundFiles]:
    """The files of our splits; validation only where the source has splits.

    Raises:
        ValueError: There is no known layout.
    """
    found = {"train": find_files(source, SPLITS["train"])}
    try:
        validation = find_files(source, SPLITS["validation"])
    except ValueError:  # it has no such split
        return found
    return found if validation == found["train"] else {**found, "validation": validation}


def plan(found: dict[str, FoundFiles], pairs_per_shard: int) -> list[Shard]:
    """Deals the pairs of each split out to shards, in a fixed random order: who reads shard by shard meets all scenes."""
    shards = []
    for split, (pairs, _) in found.items():
        order = np.random.default_rng(0).permutation(len(pairs))
        groups = [order[start : start + pairs_per_shard] for start in range(0, len(pairs), pairs_per_shard)]
        for number, group in enumerate(groups):
            name = f"{split}-{number:05}-of-{len(groups):05}"
            shards.append(Shard(split, name, [pairs[place] for place in group]))
    return shards


def begin(folder: Path, found: dict[str, FoundFiles], patches: Patches) -> None:
    """Makes the folder, or makes sure that what a stopped run left there is of the same files and options.

    Raises:
        ValueError: It is not.
    """
    files = [file for _, (pairs, _) in found.items() for pair in pairs for file in (pair.blurry, pair.sharp)]
    stamps = "\n".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    state = {"files": hashlib.sha256(stamps.encode()).hexdigest(), **asdict(patches)}
    note = folder / NOTES / "plan.json"
    if note.exists() and json.loads(note.read_text()) != state:
        raise ValueError(
            f"{str(folder)!r} was begun with other images or options; give those, or remove it to begin anew."
        )
    for name in ("data", NOTES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(state).encode())
    for rest in folder.glob("*/*.part"):
        rest.unlink()


def note_of(folder: Path, shard: Shard) -> Path:
    return folder / NOTES / f"{shard.name}.json"


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a shard was finished and is still what it was."""
    import pyarrow.parquet  # noqa: PLC0415  (an extra)

    try:
        note = json.loads(note_of(folder, shard).read_text())
        rows = pyarrow.parquet.read_metadata(folder / "data" / f"{shard.name}.parquet").num_rows
    except (OSError, ValueError):  # not there, or cut short
        return False
    return rows == note["patches"]


def pool(num_workers: int) -> ThreadPoolExecutor:
    """Threads suffice: decoding and encoding run outside the interpreter's lock, and a killed run leaves none behind."""
    return ThreadPoolExecutor(max(1, num_workers))


def write_shard(folder: Path, shard: Shard, patches: Patches, run: ThreadPoolExecutor, bar: tqdm) -> None:
    """Cuts the pairs of a shard; writes it whole or not at all, and then the note that it is."""
    import datasets  # noqa: PLC0415  (an extra)
    import pyarrow.parquet  # noqa: PLC0415

    kept: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for pair, rows in zip(shard.pairs, run.map(partial(cut, shard.split, patches), shard.pairs), strict=True):
        bar.update()
        if isinstance(rows, str):
            left_out.append({"file": str(pair.blurry), "reason": rows})
        else:
            kept += rows
    image, number = datasets.Image(), datasets.Value("int32")
    features = {"blurry": image, "sharp": image, "name": datasets.Value("string"), "top": number, "left": number}
    columns = {name: [row[name] for row in kept] for name in features}
    file = folder / "data" / f"{shard.name}.parquet"
    temporary = file.with_suffix(".part")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(temporary)
    rows_written = pyarrow.parquet.read_metadata(temporary).num_rows
    if rows_written != len(kept):
        raise OSError(f"{str(temporary)!r} holds {rows_written} of {len(kept)} patches.")
    os.replace(temporary, file)
    note = {"patches": len(kept), "left_out": left_out}
    write_whole(note_of(folder, shard), json.dumps(note).encode())


def cut(split: str, patches: Patches, pair: PairFiles) -> list[dict[str, Any]] | str:
    """The rows of a pair, or why there are none."""
    try:
        images = read_pair(pair.blurry, pair.sharp)
    except ValueError as error:
        return str(error)
    rows = []
    for place in patches.places(split, *images[0].shape[:2]):
        blurry, sharp = ({"bytes": as_png(image[place]), "path": None} for image in images)
        position = {"top": place[0].start, "left": place[1].start}
        rows.append({"blurry": blurry, "sharp": sharp, "name": pair.name, **position})
    return rows


def as_png(image: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] as a PNG, packed lightly: stronger packing takes many times as long for a tenth of the size."""
    return cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def report_of(
    source: Path, folder: Path, found: dict[str, FoundFiles], shards: Sequence[Shard], patches: Patches
) -> dict[str, Any]:
    """What was made, and what was left out and why, with paths below `source`."""
    splits = {}
    for split, (pairs, alone) in found.items():
        notes = [json.loads(note_of(folder, shard).read_text()) for shard in shards if shard.split == split]
        unreadable = [entry for note in notes for entry in note["left_out"]]
        left_out = [{"file": file, "reason": reason} for file, reason in alone] + unreadable
        splits[split] = {
            "pairs": len(pairs),
            "kept": len(pairs) - len(unreadable),
            "patches": sum(note["patches"] for note in notes),
            "shards": len(notes),
            "left_out": [{key: text.replace(f"{source}/", "") for key, text in entry.items()} for entry in left_out],
        }
    return {"source": source.name, "options": asdict(patches), "splits": splits}


def finish(folder: Path, output: Path, report: dict[str, Any]) -> None:
    """Adds report and card, gives the folder its name, and removes the notes."""
    splits = "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in report["splits"])
    write_whole(folder / "README.md", CARD.format(splits=splits).encode())
    write_whole(folder / "report.json", json.dumps(report, indent=2).encode())
    folder.rename(output)
    shutil.rmtree(output / NOTES)


def summary(report: dict[str, Any]) -> Iterator[str]:
    """The report in a few lines."""
    for split, figures in report["splits"].items():
        yield (
            f"{split}: {figures['kept']} of {figures['pairs']} pairs, {figures['patches']} patches in"
            f" {figures['shards']} shards, {len(figures['left_out'])} left out"
        )
        for entry in figures["left_out"][:5]:
            yield f"  {entry['file']}: {entry['reason']}"
        if len(figures["left_out"]) > 5:
            yield f"  … and {len(figures['left_out']) - 5} more, see report.json"
