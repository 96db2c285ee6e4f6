"""Folders checkpoint-{step}: everything a run needs to go on as if it had never stopped.

A checkpoint is written under another name and renamed once it is complete and on the disk. `files.json` in it holds the
SHA-256 of every file, so that a damaged one is recognised before anything of it is loaded.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

STATE, FILES = "state.json", "files.json"
logger = get_logger(__name__)


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Waits until a file or the names in a folder have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(new: Path, final: Path) -> None:
    """Renames `new` to `final`; what had that name goes once the new one stands there."""
    replaced = final.with_name(f".{final.name}.replaced")
    remove(replaced)
    if final.exists():
        final.rename(replaced)
    new.rename(final)
    flush_to_disk(final.parent)
    remove(replaced)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / FILES).read_text())
        return next((f"{name} has changed" for name in files if digest(folder / name) != files[name]), None)
    except (OSError, ValueError) as error:
        return str(error)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


class Checkpoints:
    """The checkpoints of one run. Every process calls each method at the same time.

    Args:
        accelerator: What it has prepared and registered is saved and loaded.
        output_dir: Where the folders are. Nodes must share it.
        total_limit: How many are kept.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, total_limit: int) -> None:
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.total_limit = total_limit

    def folders(self) -> list[Path]:
        """The checkpoints, whole or damaged, oldest first."""
        found = [f for f in self.output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name)]
        return sorted(found, key=step_of)

    def tidy(self) -> None:
        """Removes what a killed run left half written."""
        if self.accelerator.is_main_process:
            for replaced in self.output_dir.glob(".*.replaced"):
                final = self.output_dir / replaced.name[1 : -len(".replaced")]
                if not final.exists():  # killed between two renames
                    replaced.rename(final)
            for rest in (*self.output_dir.glob(".*.incomplete"), *self.output_dir.glob(".*.replaced")):
                remove(rest)
        self.accelerator.wait_for_everyone()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes checkpoint-{step}, whole or not at all, and removes the oldest of more than `total_limit`.

        Args:
            step: Steps done.
            state: What else is to be remembered, as JSON.
        Raises:
            OSError: It could not be written, for want of space for instance. The checkpoints before it are as they were.
        """
        temporary = self.output_dir / f".checkpoint-{step}.incomplete"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.write(temporary, lambda: self.accelerator.save_state(str(temporary)))
        self.write(temporary, lambda: self.seal(temporary, {"step": step, **state}))
        if self.accelerator.is_main_process:
            put_in_place(temporary, self.output_dir / f"checkpoint-{step}")
            older = [folder for folder in self.folders() if step_of(folder) < step]
            for folder in older[: max(0, len(older) + 1 - self.total_limit)]:
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()

    def write(self, temporary: Path, what: Callable[[], object]) -> None:
        """Calls `what`; where it fails in one process it fails in all, so that none waits for another for ever.

        Raises:
            OSError: It failed.
        """
        error: Exception | None = None
        try:
            what()
        except (OSError, RuntimeError, SafetensorError) as caught:  # torch and safetensors have their own
            error = caught
        failed = torch.tensor(float(error is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum").item() > 0:
            shutil.rmtree(temporary, ignore_errors=True)
            last = self.folders()[-1].name if self.folders() else "none"
            raise OSError(
                f"The checkpoint could not be written to {str(self.output_dir)!r}: {error or 'see the other processes'}."
                f" The last checkpoint is {last}."
            ) from error

    def seal(self, folder: Path, state: dict[str, Any]) -> None:
        """Adds the state and the digests of all files, and sees them to the disk."""
        if self.accelerator.is_main_process:
            (folder / STATE).write_text(json.dumps(state))
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            (folder / FILES).write_text(json.dumps({str(file.relative_to(folder)): digest(file) for file in files}))
            for path in (*files, folder / FILES, folder):
                flush_to_disk(path)

    def find(self, name: str) -> Path | None:
        """The checkpoint to go on from: the newest whole one for "latest", if there is one, or the folder named.

        Raises:
            ValueError: The folder named is no checkpoint, or damaged; or every checkpoint is.
        """
        found: list[Path | ValueError | None] = [None]
        if self.accelerator.is_main_process:
            found = [self.newest_whole() if name == "latest" else self.named(name)]
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0]

    def newest_whole(self) -> Path | ValueError | None:
        for folder in reversed(self.folders()):
            reason = damage(folder)
            if reason is None:
                return folder
            logger.warning(f"{folder} is damaged ({reason}); looking at the one before.")
        if self.folders():  # beginning anew would overwrite what may still be rescued
            return ValueError(f"`resume_from_checkpoint` finds no whole checkpoint in {str(self.output_dir)!r}.")
        return None

    def named(self, name: str) -> Path | ValueError:
        folder = Path(name)
        if not re.fullmatch(r"checkpoint-\d+", folder.name) or not folder.is_dir():
            return ValueError(f"`resume_from_checkpoint` must be 'latest' or a checkpoint-N folder, got {name!r}.")
        reason = damage(folder)
        return folder if reason is None else ValueError(f"`resume_from_checkpoint` {name!r} is damaged: {reason}.")

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what was prepared and registered; returns the state that was saved along with it."""
        self.accelerator.load_state(str(folder))
        return json.loads((folder / STATE).read_text())
