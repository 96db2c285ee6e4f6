"""How much memory there is, how much is used, and where a feature map lies that is too large for the device."""

import os
import re
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Place: TypeAlias = Literal["device", "host", "file"]

UNITS = {"": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def parse_memory(amount: int | float | str) -> int:
    """An amount of memory in bytes.

    Args:
        amount: A number of bytes, or text such as "4GB", "800MB" or "1.5 GiB"; a KB is 1024 bytes.
    Raises:
        ValueError: It is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)I?(B?)\s*", str(amount).upper())
    unit = None if match is None else f"{match[2]}B" if match[2] else ""
    number = 0 if match is None or unit is None else int(float(match[1]) * UNITS[unit])
    if number <= 0:
        raise ValueError(f"`max_memory` must be an amount of memory such as '4GB' or '800MB', got {amount!r}.")
    return number


def format_memory(amount: int) -> str:
    """Bytes as a person would write them, rounded up."""
    return f"{-(-amount // 2**20)}MB" if amount < 10 * 2**30 else f"{-(-amount // 2**30)}GB"


def used_memory(device: torch.device) -> int:
    """Bytes that this process occupies: what torch holds on a GPU, else what the system cannot take back from the process.

    Not counted are pages of files, which it can. Where it does not tell (other systems than Linux), 0.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return sum(amount for name, amount in _kilobytes("/proc/self/status").items() if name in ("RssAnon", "RssShmem"))


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take; None where the system does not tell (other systems than Linux)."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = _kilobytes("/proc/meminfo").get("MemAvailable")
    groups = [left for left in (_left_in_group(Path("/sys/fs/cgroup")),) if left is not None]
    return min(groups, default=available) if available is None else min([available, *groups])


def _kilobytes(file: str) -> dict[str, int]:
    """The lines `name: number kB` of a file of the proc file system, in bytes."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return {}
    return {match[1]: int(match[2]) * 1024 for line in lines if (match := re.match(r"(\w+):\s*(\d+) kB", line))}


def _left_in_group(folder: Path) -> int | None:
    """What the container's limit leaves (cgroup v2), cached files not counted as used; None where there is no limit."""
    try:
        limit = int((folder / "memory.max").read_text())  # "max" is no number
        used = int((folder / "memory.current").read_text())
        cached = re.search(r"^file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return limit - used + (int(cached[1]) if cached else 0)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, place: Place) -> Tensor:
    """A tensor of any values.

    In a file it may be larger than the memory: the system keeps the pages that are in use. The file is in the folder for
    temporary files (`TMPDIR`) and has no name, so that nothing is left of it however the process ends.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        device: Where "device" is; the others are on the CPU.
        place: "device", "host" (memory of the CPU) or "file".
    Raises:
        OSError: There is no room for the file.
    """
    if place == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if place == "host":
        return torch.empty(shape, dtype=dtype)
    size = prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(prefix="hidiff-") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # otherwise a full disk would kill the process later
            mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OSError(
                error.errno,
                f"{format_memory(size)} for a feature map do not fit into {folder!r}; set TMPDIR to a folder with more room",
            ) from error
    return torch.from_numpy(mapped).view(dtype).view(tuple(shape))
