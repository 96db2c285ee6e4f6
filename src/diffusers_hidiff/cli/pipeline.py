"""The pipeline, its device and its processes, as the options of a command say."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from .. import HIDIFF_SMALL
from ..models.latent_encoder import HIDiffLatentEncoder
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..schedulers.compatibility import check_scheduler
from ..schedulers.names import named_classes, scheduler_class
from ..utils.allocator import keep_freed_memory
from . import DEVICES, CommandError, first_line


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


def start_processes(device: str) -> PartialState:
    """This process among those that Accelerate started; they wait for each other a day, not minutes."""
    return PartialState(cpu=device == "cpu", timeout=timedelta(days=1))


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
        reason = first_line(error).removesuffix(" Please check out the root cause in the stacktrace above.")
        raise CommandError(f"The model {model!r} cannot be loaded{where}: {reason}") from error
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


def ready_pipeline(device: str, options: argparse.Namespace) -> HIDiffPipeline:
    """The pipeline on its device, tried on a tiny image with the options of this run.

    Raises:
        CommandError: Options that cannot work.
    """
    if device == "cpu" and options.max_memory is None:  # what is kept in pieces would go beyond the limit
        keep_freed_memory()
    pipeline = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    with quiet_diffusers():  # warns of half precision on the CPU
        pipeline.to(device)
    if options.scheduler is not None:
        pipeline.scheduler = make_scheduler(pipeline.scheduler, options.scheduler)
    for network in (pipeline.transformer, pipeline.condition_encoder):
        if options.local_statistics == 0:
            network.disable_local_statistics()
        elif options.local_statistics is not None:
            try:
                network.enable_local_statistics(options.local_statistics)
            except ValueError as error:
                raise CommandError(f"--local_statistics cannot be so: {first_line(error)}") from error
    try:
        pipeline.limit_memory(options.max_memory)
    except ValueError as error:
        raise CommandError(f"--max_memory cannot be so: {first_line(error)}") from error
    gradient = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    try:
        (restored,) = run_pipeline(pipeline, [gradient], options)
    except Exception as error:  # whatever a scheduler, a dtype or a device does not support
        raise CommandError(f"The model does not run with these options: {first_line(error)}") from error
    if not np.isfinite(restored).all():
        raise CommandError(f"With --dtype {options.dtype} the model returns no numbers (NaN).")
    return pipeline


def make_scheduler(current: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler that `name` means, made from the config of the current one.

    Raises:
        CommandError: None is called so, or it does not fit the model.
    """
    known, kind = known_schedulers(current), scheduler_class(name)
    for scheduler in known.values():
        if type(scheduler) is kind:
            return scheduler
    raise CommandError(f"--scheduler must be one of {', '.join(sorted(known))}, got {name!r}.")


def known_schedulers(current: SchedulerMixin) -> dict[str, SchedulerMixin]:
    """Short name -> scheduler made from the config of `current`, for all that fit it."""
    known = {}
    for name, kind in named_classes():
        try:
            with quiet_diffusers():
                scheduler = kind.from_config(current.config)
            check_scheduler(scheduler, 1)
        except (ValueError, ImportError):  # refused, or in need of another library
            continue
        known[name] = scheduler
    return known


def run_pipeline(
    pipeline: HIDiffPipeline, images: Sequence[PIL.Image.Image | np.ndarray], options: argparse.Namespace
) -> list[np.ndarray]:
    """The restored images, each [H, W, C] float32 in [0, 1] and as if it were alone."""
    (restored,) = pipeline(
        list(images),
        options.steps,
        generator=[torch.Generator().manual_seed(options.seed) for _ in images],
        output_type="np",
        num_priors=options.num_priors,
        average=options.average,
        self_ensemble=options.self_ensemble,
        tile=options.tile,
        tile_overlap=options.tile_overlap,
        return_dict=False,
    )
    return list(restored)
