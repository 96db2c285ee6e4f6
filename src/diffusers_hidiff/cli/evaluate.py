"""`hidiff evaluate`: a model on a benchmark, by the published protocol."""

import argparse
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from .. import HIDiffPipeline, __version__
from ..evaluation import EvaluationError
from ..evaluation.datasets import NAMED_DATASETS, Pair, fingerprint, load_pairs
from ..evaluation.protocols import PROTOCOLS, Protocol
from ..evaluation.report import write_report
from ..evaluation.runner import Job, default_workers
from ..evaluation.runner import run as run_job
from ..experiments.prior_sensitivity import oracle_prior
from ..image_processor import to_integers
from ..metrics.perceptual import PerceptualMetrics
from ..utils.versions import versions
from . import CommandError, at_least, first_line
from .deblur import add_pipeline_options
from .pipeline import pick_device, ready_pipeline, run_pipeline, stage1_encoder, start_processes

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "opencv-python-headless", "scikit-image")
BESIDE = ("blurry", "oracle")
NAMES_ON_PYPI = {"skimage": "scikit-image"}

LAYOUTS = "\n".join(f"  {name:<12} {known.expected}" for name, known in NAMED_DATASETS.items())
EPILOG = f"""
The data sets lie in --data_dir as their authors publish them, or as many projects share them:
{LAYOUTS}
(These layouts are untried on the real data. Compare the number of images with the paper's.)
A DIR has blurry/ and sharp/, with images of the same names, or input/ and target/. Any other
name is given to the library datasets: columns blurry and sharp (or blur, or input and target).

Written to OUT: metrics.csv, summary.json, table.md and sheet.jpg; with --beside blurry, gains.png.
Restored images are rounded to 8 bits. An image that fails is named and is part of no mean.

The same command goes on where it was stopped, and tries again what failed. `accelerate launch
--num_processes N -m diffusers_hidiff evaluate …` (on CPUs: torchrun --nproc_per_node N) shares the
images among N processes; the figures do not depend on N. All of them must see OUT.

Exit status: 0 all done, 1 some images failed, 2 nothing could begin, 130 interrupted.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "evaluate",
        description="Restores the images of a data set and scores them by the published protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help=f"{', '.join(NAMED_DATASETS)}, a DIR or a HUB_ID")
    add("--data_dir", type=Path, metavar="DIR", help="where your copy of a named data set lies")
    add("--split", default="test", help="default: test")
    add("--protocol", choices=tuple(PROTOCOLS), help="default: that of the data set; gopro for a DIR or HUB_ID")
    add(
        "--beside",
        nargs="+",
        choices=BESIDE,
        default=[],
        help="score beside it: the blurry image; what the prior of stage 1 gives, which sees the sharp image",
    )
    add_pipeline_options(parser)
    add_report_options(parser)
    parser.set_defaults(run=run)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """What `hidiff score` has, too."""
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="OUT", help="folder to write to")
    add("--extra_metrics", nargs="+", default=[], metavar="NAME", help="lpips, dists, niqe, … of pyiqa (extra iqa)")
    add("--workers", type=at_least(0), metavar="N", help="processes that score (default: one for each core; 0: none)")


def run(options: argparse.Namespace) -> int:
    """Evaluates what `options` name; returns the exit status."""
    # 1. Refuse before any work is done
    protocol = protocol_of(options.dataset, options.protocol)
    need_libraries(("matplotlib", *protocol.libraries))
    device = pick_device(options.device)
    with told_in_a_sentence():
        pairs = load_pairs(options.dataset, options.data_dir, options.split)
    state = start_processes(device)
    perceptual = perceptual_metrics(options.extra_metrics, state.device)
    pipeline = ready_pipeline(str(state.device), options)
    encoder = stage1_encoder(options.model, state.device) if "oracle" in options.beside else None
    if "oracle" in options.beside and encoder is None:
        raise CommandError(
            "--beside oracle needs a model in a folder that holds latent_encoder/, the encoder of stage 1."
        )

    # 2. Restore, score, report
    def restore(pair: Pair) -> np.ndarray:
        (restored,) = run_pipeline(pipeline, [read_blurry(pair)], options)
        return as_file(restored)

    def restore_with_oracle(pair: Pair) -> np.ndarray:
        assert encoder is not None
        blurry = read_blurry(pair)
        prior = oracle_prior(encoder, blurry, pair.read_sharp())
        return as_file(pipeline(blurry, prior=prior, output_type="np", return_dict=False)[0][0])

    def as_file(restored: np.ndarray) -> np.ndarray:
        if not np.isfinite(restored).all():
            raise ValueError(f"The model returned no numbers (NaN) with --dtype {options.dtype}.")
        return to_integers(restored, 8)

    settings = {
        "dataset": options.dataset,
        "split": options.split,
        **common_settings(pairs, protocol, options.extra_metrics),
        "model": describe_model(pipeline, options.model),
        "steps": pipeline.num_timesteps,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": options.seed,
        "num_priors": options.num_priors,
        "average": options.average,
        "self_ensemble": options.self_ensemble,
        "local_window": pipeline.transformer.config.local_window,
        "beside": [name for name in BESIDE if name in options.beside],
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type,
    }
    ways: dict[str, Callable[[Pair], np.ndarray]] = {"blurry": read_blurry, "oracle": restore_with_oracle}
    beside = {name: ways[name] for name in settings["beside"]}
    return finish(Job(pairs, restore, protocol, options.output, settings, workers(options), perceptual, beside), state)


def read_blurry(pair: Pair) -> np.ndarray:
    assert pair.read_blurry is not None
    return pair.read_blurry()


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """What goes wrong with an evaluation as a whole, as the user is told it."""
    try:
        yield
    except EvaluationError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        where = f"{error.filename} cannot be used" if error.filename else "A file cannot be used"
        raise CommandError(f"{where}: {error.strerror or error}.") from error


def protocol_of(dataset: str, name: str | None) -> Protocol:
    """
    Raises:
        CommandError: Another one than the data set's was asked for.
    """
    known = NAMED_DATASETS.get(dataset)
    if known is None:
        return PROTOCOLS[name or "gopro"]
    if name not in (None, known.protocol):
        raise CommandError(f"{known.title} is scored by --protocol {known.protocol}, got {name!r}.")
    return PROTOCOLS[known.protocol]


def need_libraries(names: Iterable[str]) -> None:
    """
    Raises:
        CommandError: One is not installed.
    """
    missing = [NAMES_ON_PYPI.get(name, name) for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"This command needs {' and '.join(missing)}; install it with `pip install 'diffusers-hidiff[evaluate]'`."
        )


def perceptual_metrics(names: Sequence[str], device: torch.device) -> PerceptualMetrics | None:
    """
    Raises:
        CommandError: pyiqa is not installed, or has no such metric.
    """
    try:
        return PerceptualMetrics(names, device) if names else None
    except (ImportError, ValueError) as error:
        raise CommandError(first_line(error)) from error


def workers(options: argparse.Namespace) -> int:
    return default_workers() if options.workers is None else options.workers


def common_settings(pairs: Sequence[Pair], protocol: Protocol, extra_metrics: Sequence[str]) -> dict[str, Any]:
    """What figures of both commands depend on."""
    return {
        "protocol": protocol.name,
        "extra_metrics": list(extra_metrics),
        "images": len(pairs),
        "images_sha256": fingerprint(pairs),
        "versions": {**versions(LIBRARIES), "diffusers_hidiff": __version__},
    }


def describe_model(pipeline: HIDiffPipeline, model: str | None) -> dict[str, Any]:
    """Its name, its commit where it is of the Hub, and a hash of what computes: weights and settings."""
    digest = hashlib.sha256()
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for name, network in sorted(networks.items()):
        digest.update(f"{name} {public_config(network)}".encode())
        for key, tensor in sorted(network.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(public_config(pipeline.scheduler).encode())
    commit = re.search(r"snapshots/([0-9a-f]{40})", str(pipeline.transformer.config.get("_name_or_path", "")))
    return {
        "name": "hidiff-small (bundled)" if model is None else model,
        "revision": None if commit is None else commit[1],
        "sha256": digest.hexdigest(),
    }


def public_config(part: Any) -> str:
    """The settings of a part of a pipeline, without what diffusers notes about them."""
    return json.dumps({key: part.config[key] for key in sorted(part.config) if not key.startswith("_")}, default=str)


def finish(job: Job, state: PartialState) -> int:
    """Does the job, writes the report and says what came of it; returns the exit status."""
    with told_in_a_sentence():
        rows = run_job(job, state)
        if rows is None:
            return 0
        timings = network_timings(job, [row.seconds for row in rows if row.error is None], state.num_processes)
        summary = write_report(job, rows, timings)
    print((job.output / "table.md").read_text(), end="")
    print(f"{summary['scored']} scored, {len(summary['failed'])} failed; in {job.output}")
    return 1 if summary["failed"] else 0


def network_timings(job: Job, seconds: Sequence[float], processes: int) -> dict[str, Any]:
    if "model" not in job.settings:
        return {"processes": processes}
    mean = sum(seconds) / len(seconds) if seconds else None
    return {"processes": processes, "network_seconds": sum(seconds), "network_seconds_per_image": mean}
