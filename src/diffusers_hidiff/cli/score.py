"""`hidiff score`: restored images, whoever restored them, by the published protocol."""

import argparse
from pathlib import Path

import numpy as np

from ..data.paired_images import read_rgb
from ..evaluation.datasets import Pair, pairs_of_folders
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.runner import Job
from . import DEVICES
from .evaluate import (
    add_report_options,
    common_settings,
    finish,
    need_libraries,
    perceptual_metrics,
    told_in_a_sentence,
    workers,
)
from .pipeline import pick_device, start_processes

EPILOG = """
Images belong together that bear the same name in both folders, below the same subfolders; the
suffix may differ. A sharp image without a restored one has failed.

Written to OUT: metrics.csv, summary.json, table.md and sheet.jpg. An image that fails is named
and is part of no mean. The same command goes on where it was stopped.

Exit status: 0 all done, 1 some images failed, 2 nothing could begin, 130 interrupted.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "score",
        description="Scores a folder of restored images against a folder of sharp ones.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("restored", type=Path, metavar="RESTORED", help="folder of restored images")
    add("sharp", type=Path, metavar="SHARP", help="folder of sharp images")
    add("--blurry", type=Path, metavar="DIR", help="folder of blurry images, to be shown in sheet.jpg")
    add("--protocol", choices=tuple(PROTOCOLS), default="gopro", help="default: gopro")
    add("--device", choices=("auto", *DEVICES), default="auto", help="of --extra_metrics (default: auto)")
    add_report_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Scores what `options` name; returns the exit status."""
    # 1. Refuse before any work is done
    protocol = PROTOCOLS[options.protocol]
    need_libraries(("matplotlib", *protocol.libraries))
    with told_in_a_sentence():
        pairs, restored_files = pairs_of_folders(options.restored, options.sharp, options.blurry)
    state = start_processes(pick_device(options.device) if options.extra_metrics else "cpu")
    perceptual = perceptual_metrics(options.extra_metrics, state.device)

    # 2. Score, report
    def restore(pair: Pair) -> np.ndarray:
        if pair.name not in restored_files:
            raise ValueError("There is no restored image.")
        return read_rgb(restored_files[pair.name])

    folders = {"restored": str(options.restored), "sharp": str(options.sharp)}
    settings = {**folders, **common_settings(pairs, protocol, options.extra_metrics)}
    return finish(Job(pairs, restore, protocol, options.output, settings, workers(options), perceptual), state)
