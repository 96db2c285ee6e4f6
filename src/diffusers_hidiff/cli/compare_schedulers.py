"""`hidiff compare-schedulers`: schedulers x steps x seeds on a data set, as a table, a figure and raw figures."""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tqdm import tqdm

from .. import __version__
from ..evaluation.datasets import load_pairs
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.runner import ROWS_FOLDER, begin_folder, refuse_other_settings
from ..experiments.scheduler_study import (
    Trial,
    as_csv,
    as_markdown,
    conclusion,
    figure_of,
    run_trials,
    split_grid,
    summarise,
)
from ..image_files import write_whole
from ..schedulers.names import SHORT_NAMES, scheduler_class
from ..utils.allocator import keep_freed_memory
from ..utils.panels import encoded
from . import DEVICES, CommandError, at_least, first_line
from .evaluate import common_settings, describe_model, need_libraries, read_blurry, told_in_a_sentence
from .pipeline import load_pipeline, pick_device, quiet_diffusers, stage1_encoder

SCHEDULERS = ("hidiff", "ddpm", "ddim", "euler", "dpmsolver", "unipc", "heun", "lcm", "deis", "pndm")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "compare-schedulers",
        description="Restores images with every combination and writes trials.csv, table.md and figure.png. "
        "The same command goes on where it was stopped.",
    )
    add = parser.add_argument
    add("--model", help="folder or Hub id of a pipeline (default: the bundled checkpoint)")
    add("--dataset", required=True, help="a folder with blurry/ and sharp/, a named data set, or a Hub id")
    add("--data_dir", type=Path, metavar="DIR", help="where your copy of a named data set lies")
    add("--split", default="test", help="default: test")
    add("--max_images", type=at_least(1), metavar="N", help="so many images, evenly spaced (default: all)")
    add(
        "--schedulers",
        nargs="+",
        default=list(SCHEDULERS),
        metavar="NAME",
        help=f"{', '.join(SHORT_NAMES)}, or any class of diffusers.schedulers (default: {' '.join(SCHEDULERS)})",
    )
    add("--steps", nargs="+", type=at_least(1), metavar="N", help="default: 1, 2, 4 … up to the model's T")
    add("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--device", choices=("auto", *DEVICES), default="auto", help="default: auto, the first of cuda, mps, cpu")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the study; returns the exit status."""
    # 1. Refuse before any work is done
    need_libraries(["matplotlib"])
    with told_in_a_sentence():
        pairs = load_pairs(options.dataset, options.data_dir, options.split)
    if options.max_images is not None and options.max_images < len(pairs):
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, options.max_images).round().astype(int)]
    device = pick_device(options.device)
    if device == "cpu":
        keep_freed_memory()
    pipeline = load_pipeline(options.model).to(device)
    schedulers = {name: make_scheduler(name, pipeline.scheduler) for name in dict.fromkeys(options.schedulers)}
    steps = options.steps or steps_up_to(pipeline.scheduler.config.num_train_timesteps)
    grid, refused = split_grid(schedulers, steps, pipeline.device)
    if not grid:
        raise CommandError(f"None of these combinations can run: {refused[0][0]} cannot, {refused[0][2]}")
    encoder = stage1_encoder(options.model, pipeline.device)
    settings = {
        **common_settings(pairs, PROTOCOLS["gopro"], []),
        "model": describe_model(pipeline, options.model),
        "grid": [f"{name} {number}" for name, number in grid],
        "seeds": options.seeds,
        "device": device,
    }

    # 2. Restore what is not there yet
    trials = []
    with told_in_a_sentence(), tqdm(total=len(pairs) * len(grid) * len(options.seeds), unit=" images") as bar:
        refuse_other_settings(options.output, settings)
        begin_folder(options.output, settings)
        for number, pair in enumerate(pairs):
            file = options.output / ROWS_FOLDER / f"{number:06d}.json"
            if file.exists():
                found = [Trial(**trial) for trial in json.loads(file.read_bytes())]
                bar.update(len(found))
            else:
                found = []
                images = (pair.name, read_blurry(pair), pair.read_sharp())
                arguments = (pipeline, schedulers, grid, options.seeds, images, PROTOCOLS["gopro"].score, encoder)
                for trial in run_trials(*arguments):
                    found.append(trial)
                    bar.update()
                write_whole(file, json.dumps([asdict(trial) for trial in found]).encode())
            trials += found

    # 3. Write
    cells = summarise(trials)
    own = next((name for name, kind in schedulers.items() if type(kind) is type(pipeline.scheduler)), "")
    heading = (
        f"{len(pairs)} images of {Path(options.dataset).name}, seeds {' '.join(map(str, options.seeds))}; hidiff"
        f" {__version__}, torch {torch.__version__}, {device} ({platform.machine()}, {torch.get_num_threads()} threads)."
    )
    table = as_markdown(cells, refused, heading, conclusion(cells, own))
    write_whole(options.output / "trials.csv", as_csv(trials).encode())
    write_whole(options.output / "table.md", table.encode())
    write_whole(options.output / "figure.png", encoded(figure_of(cells), ".png"))
    print(table)
    print(f"Written to {options.output}: trials.csv, table.md, figure.png")
    return 0


def steps_up_to(num_train_timesteps: int) -> list[int]:
    """1, 2, 4 … and T itself."""
    powers = [2**k for k in range(num_train_timesteps.bit_length()) if 2**k < num_train_timesteps]
    return [*powers, num_train_timesteps]


def make_scheduler(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """The scheduler called `name` with the config of the current one.

    Raises:
        CommandError: None is called so.
    """
    kind = scheduler_class(name)
    if kind is None:
        raise CommandError(
            f"--schedulers takes {', '.join(SHORT_NAMES)} or a class of diffusers.schedulers, got {name!r}."
        )
    try:
        with quiet_diffusers():
            scheduler: SchedulerMixin = cast(Any, kind).from_config(current.config)
    except (ValueError, ImportError) as error:
        raise CommandError(f"{name} cannot be made from the model's scheduler: {first_line(error)}") from error
    return scheduler
