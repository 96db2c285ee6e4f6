"""Which files `hidiff deblur` reads, and where it writes to."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..image_files import FORMATS, IMAGE_SUFFIXES, stored_size
from . import CommandError


@dataclass(frozen=True)
class Job:
    """One image to restore.

    Args:
        source: The blurry image.
        output: Where the restored one goes.
        comparison: Where both go side by side, if anywhere.
    """

    source: Path
    output: Path
    comparison: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """What is written, the restored image last: where it stands, all is done."""
        return (self.output,) if self.comparison is None else (self.comparison, self.output)


def plan(inputs: Sequence[str], output: Path, file_format: str, compare: bool) -> tuple[list[Job], list[str]]:
    """What to restore, and a line for each input that is nothing to restore.

    Raises:
        CommandError: There is nothing to restore at all.
    """
    jobs: dict[tuple[Path, Path], Job] = {}  # an image that was named twice is restored once
    unmatched = []
    for argument in inputs:
        found = find_images(argument, output)
        for source, below in found:
            target = output / output_name(below, file_format)
            comparison = target.with_name(f"{target.stem}.compare.png") if compare else None
            jobs[source.resolve(), target] = Job(source, target, comparison)
        if not found:
            holds_none = f"no image in it ({' '.join(IMAGE_SUFFIXES)})"
            unmatched.append(f"{argument}: {holds_none if Path(argument).is_dir() else 'no such file'}")
    if not jobs:
        raise CommandError(f"There is nothing to restore: {'; '.join(unmatched)}.")
    return list(jobs.values()), unmatched


def find_images(argument: str, output: Path) -> list[tuple[Path, Path]]:
    """The files that one INPUT means, each with its path below the output folder; sorted.

    In a folder, or where a pattern finds them, files of other kinds, hidden files and what an earlier run wrote to
    `output` are left out.
    """
    path = Path(argument)
    if path.is_dir():
        root, found = path, sorted(path.rglob("*"))
    elif path.exists():
        return [(path, Path(path.name))]
    else:
        fixed = takewhile(lambda part: not set(part) & set("*?["), path.parts[:-1])
        root, found = Path(*fixed), sorted(Path(file) for file in glob.glob(argument, recursive=True))
    outside, inside = root.resolve(), output.resolve()
    earlier = inside.relative_to(outside) if inside != outside and inside.is_relative_to(outside) else None
    images = []
    for file in found:
        below = file.relative_to(root)
        is_hidden = any(part.startswith(".") for part in below.parts)
        is_earlier = earlier is not None and below.is_relative_to(earlier)
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not is_hidden and not is_earlier:
            images.append((file, below))
    return images


def output_name(name: Path, file_format: str) -> Path:
    """`name` with the suffix that goes with `file_format`; left alone where it is of that format already."""
    suffix = name.suffix.lower()
    if file_format == "same":
        return name if suffix in FORMATS else name.with_suffix(".png")
    wanted = f".{file_format}"
    return name if FORMATS.get(suffix) == FORMATS[wanted] else name.with_suffix(wanted)


def refuse_clashes(jobs: Sequence[Job]) -> None:
    """Refuses to write two images to one file, or to an original.

    Raises:
        CommandError: Naming the files.
    """
    originals = {identity(job.source) for job in jobs}
    written: dict[str, Path] = {}
    for job in jobs:
        for file in job.files:
            if file.exists() and identity(file) in originals:
                raise CommandError(
                    f"{file} is itself an input, and originals are never overwritten; choose another --output."
                )
            other = written.setdefault(os.path.normcase(file), job.source)
            if other != job.source:
                raise CommandError(
                    f"{other} and {job.source} would both be written to {file}; restore them separately."
                )


def identity(file: Path) -> tuple[int, int]:
    """The file itself, whatever links and spellings lead to it."""
    status = file.stat()
    return status.st_dev, status.st_ino


def batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    """`size` jobs at a time, those of one image size together."""
    if size > 1:
        jobs = sorted(jobs, key=lambda job: stored_size(job.source))
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def pixels_of(jobs: Sequence[Job]) -> int:
    """Pixels of all their images, as the files' headers say."""
    return sum(width * height for width, height in (stored_size(job.source) for job in jobs))
