"""The command line, `hidiff`: one command, one file. Here is what the commands share."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from .. import HIDIFF_SMALL, HIDiffLatentEncoder, HIDiffPipeline

DEVICES = ("cuda", "mps", "cpu")  # in the order in which "auto" takes them


class CommandError(Exception):
    """What was asked for cannot work; the message is one sentence for the user."""


def first_line(error: BaseException) -> str:
    """What an error says first; libraries go on for pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def at_least(minimum: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least `minimum`."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return whole_number


def pick_device(name: str) -> str:
    """The device that a `--device` stands for.

    Raises:
        CommandError: It is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in DEVICES if available[device])
    if not available[name]:
        raise CommandError(f"--device {name} cannot be used: PyTorch finds no such device on this machine.")
    return name


def load_pipeline(model: str | None, **options: Any) -> HIDiffPipeline:
    """The pipeline of a folder or a Hub id; the bundled one where there is none.

    Args:
        model: What the user named.
        options: For `from_pretrained`.
    Raises:
        CommandError: It cannot be loaded.
    """
    if model is None and not HIDIFF_SMALL.is_dir():
        raise CommandError("The bundled checkpoint is missing from this installation; name a model.")
    model = str(HIDIFF_SMALL) if model is None else model
    try:
        with quiet_diffusers():
            pipeline = HIDiffPipeline.from_pretrained(model, **options)
    except Exception as error:  # a folder can be wrong in any way
        where = "" if Path(model).is_dir() else " (it is no folder here, so it was looked for on the Hub)"
        raise CommandError(f"The model {model!r} cannot be loaded{where}: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stage1_encoder(model: str | None, device: torch.device) -> HIDiffLatentEncoder | None:
    """Stage 1's latent encoder, on `device`, if it lies beside the components of a pipeline in a folder.

    Args:
        model: What the user named; None is the bundled checkpoint.
        device: Where it goes.
    """
    folder = HIDIFF_SMALL if model is None else Path(model)
    if not (folder / "latent_encoder").is_dir():
        return None
    encoder: HIDiffLatentEncoder = HIDiffLatentEncoder.from_pretrained(folder, subfolder="latent_encoder")
    return encoder.to(device)


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without the library's own progress bars and advice."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
