"""`hidiff analyse chain|attention|sensitivity`: looks into a model at work on one image."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.paired_images import read_rgb
from ..experiments.attention_maps import LEVELS, attention_maps, attention_sheet
from ..experiments.latent_chain import chain_figure, follow_chain
from ..experiments.prior_sensitivity import priors_to_try, sensitivity_sheet
from ..image_files import write_whole
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..utils.allocator import keep_freed_memory
from ..utils.panels import encoded
from . import DEVICES, CommandError, at_least, first_line
from .evaluate import need_libraries
from .pipeline import load_pipeline, pick_device, stage1_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".jpg")
QUESTIONS = {
    "chain": "the pictures that the clean estimates of the reverse chain give, step by step",
    "attention": "where each prior token is looked at, at one level",
    "sensitivity": "what becomes of the picture with another prior",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "analyse",
        description="Draws " + "; ".join(f"{name}: {what}" for name, what in QUESTIONS.items()) + ".",
    )
    add = parser.add_argument
    add("question", choices=QUESTIONS)
    add("image", type=Path, metavar="IMAGE", help="the blurry image")
    add("--sharp", type=Path, metavar="FILE", help="its ground truth: adds PSNR and the oracle's prior")
    add("--other", type=Path, metavar="FILE", help="sensitivity: another image, whose prior is tried")
    add("--level", choices=LEVELS, default="decoder1", help="attention: default decoder1")
    add("--steps", type=at_least(1), metavar="N", help="chain: steps (default: as many as in training)")
    add("--seed", type=at_least(0), default=0, help="default: 0")
    add("--model", help="folder or Hub id of a pipeline (default: the bundled checkpoint)")
    add("--device", choices=("auto", *DEVICES), default="auto", help="default: auto, the first of cuda, mps, cpu")
    add("--output", required=True, type=Path, metavar="FILE", help="picture to write, .png or .jpg")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answers the question; returns the exit status."""
    if options.output.suffix.lower() not in SUFFIXES:
        raise CommandError(f"--output must be a {' or '.join(SUFFIXES)} file, got {str(options.output)!r}.")
    need_libraries(["matplotlib"])
    blurry = read(options.image)
    sharp, other = (None if file is None else read(file) for file in (options.sharp, options.other))
    if sharp is not None and sharp.shape != blurry.shape:
        raise CommandError(f"--sharp must have the size of the image, got {sharp.shape[:2]} for {blurry.shape[:2]}.")
    device = pick_device(options.device)
    if device == "cpu":
        keep_freed_memory()
    pipeline = load_pipeline(options.model).to(device)
    try:
        picture = draw(options, pipeline, blurry, sharp, other)
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, encoded(picture, options.output.suffix))
    print(f"Written: {options.output}")
    return 0


def draw(
    options: argparse.Namespace,
    pipeline: HIDiffPipeline,
    blurry: np.ndarray,
    sharp: np.ndarray | None,
    other: np.ndarray | None,
) -> "Figure":
    """The picture that answers `options.question`."""
    if options.question == "chain":
        return chain_figure(follow_chain(pipeline, blurry, options.steps, options.seed), blurry, sharp)
    if options.question == "attention":
        return attention_sheet(attention_maps(pipeline, blurry, options.seed)[options.level], blurry)
    encoder = stage1_encoder(options.model, pipeline.device)
    priors = priors_to_try(pipeline, blurry, other, sharp, encoder, options.seed)
    picture, means = sensitivity_sheet(pipeline, blurry, priors, sharp)
    for name, mean in means.items():
        print(f"{name}: {mean:.3f} of 255 levels from the picture of its own prior")
    return picture


def read(file: Path) -> np.ndarray:
    try:
        return read_rgb(file)
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {first_line(error)}") from error
