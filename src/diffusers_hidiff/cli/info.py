"""`hidiff info`: what a model is made of, what it costs, and where it would run."""

import argparse
import json
import os
import platform
import re
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import HIDIFF_SMALL, HIDiffPipeline, __version__
from ..utils.versions import versions
from . import load_pipeline

LIBRARIES = ("torch", "diffusers", "transformers")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "info",
        help="tell what a model is made of",
        description="Tells a model's components, size and cost, the versions of the libraries, and the devices.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: the bundled checkpoint)")
    parser.add_argument("--size", type=image_size, default=(1280, 720), metavar="WxH", help="default: 1280x720")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints what `options` ask for; returns the exit status."""
    pipeline = load_pipeline(options.model)
    facts = {
        "model": str(HIDIFF_SMALL) if options.model is None else options.model,
        "components": components(pipeline),
        "scheduler": scheduler_values(pipeline),
        "cost": cost(pipeline, *options.size),
        "versions": {**versions(LIBRARIES), "diffusers_hidiff": __version__},
        "devices": devices(),
    }
    print(json.dumps(facts, indent=2) if options.format == "json" else as_text(facts))
    return 0


def image_size(text: str) -> tuple[int, int]:
    """ "1280x720" as (1280, 720): width, height."""
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise argparse.ArgumentTypeError(f"must be width x height such as 1280x720, got {text!r}")
    return int(match[1]), int(match[2])


def networks(pipeline: HIDiffPipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipeline, name) for name in ("condition_encoder", "denoiser", "transformer")}


def components(pipeline: HIDiffPipeline) -> dict[str, dict[str, Any]]:
    """Class and number of parameters of each network."""
    return {
        name: {"class": type(network).__name__, "parameters": sum(p.numel() for p in network.parameters())}
        for name, network in networks(pipeline).items()
    }


def scheduler_values(pipeline: HIDiffPipeline) -> dict[str, Any]:
    """What tells one published family from another."""
    config = pipeline.scheduler.config
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "clip_sample")
    betas = [round(float(beta), 6) for beta in pipeline.scheduler.betas]
    return {"class": type(pipeline.scheduler).__name__, **{name: config.get(name) for name in names}, "betas": betas}


def cost(pipeline: HIDiffPipeline, width: int, height: int) -> dict[str, Any]:
    """Multiply-adds of one image, in 10⁹: matrix products and convolutions, as PyTorch counts them without computing them.

    The diffusion is counted with all of its steps, the image with the pixels it is padded by.
    """
    padded_width, padded_height = width + -width % 8, height + -height % 8
    config = pipeline.transformer.config
    steps = pipeline.scheduler.config.num_train_timesteps
    on_meta = {name: network.float().to("meta") for name, network in networks(pipeline).items()}
    image = torch.empty(1, 3, padded_height, padded_width, device="meta")
    prior = torch.empty(1, config.num_prior_tokens, config.prior_dim, device="meta")
    inputs = {"condition_encoder": (image,), "denoiser": (prior, 0, prior), "transformer": (image, prior)}
    gmacs = {}
    for name, network in on_meta.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*inputs[name])
        gmacs[name] = counter.get_total_flops() / 2e9 * (steps if name == "denoiser" else 1)
    return {
        "size": [width, height],
        "padded_size": [padded_width, padded_height],
        "steps": steps,
        "gmacs": {**gmacs, "total": sum(gmacs.values())},
    }


def devices() -> list[dict[str, Any]]:
    """Where a pipeline can run, with the memory there is in all, in GiB."""
    found: list[dict[str, Any]] = [
        {"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i), "memory_gib": gib(total)}
        for i in range(torch.cuda.device_count())
        for total in [torch.cuda.get_device_properties(i).total_memory]
    ]
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory_gib": gib(torch.mps.recommended_max_memory())})
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names  # not on Windows
    memory = gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if known else None
    cpu = {"device": "cpu", "name": f"{platform.machine()}, {torch.get_num_threads()} threads", "memory_gib": memory}
    return [*found, cpu]


def gib(size: int) -> float:
    return round(size / 2**30, 1)


def as_text(facts: dict[str, Any]) -> str:
    """The same for reading."""
    cost, scheduler = facts["cost"], facts["scheduler"]
    size, padded = ("x".join(map(str, cost[name])) for name in ("size", "padded_size"))
    rows = [
        (name, part["class"], f"{part['parameters']:,}", f"{cost['gmacs'][name]:,.3f}")
        for name, part in facts["components"].items()
    ]
    total = sum(part["parameters"] for part in facts["components"].values())
    rows = [("component", "class", "parameters", "GMACs"), *rows]
    rows.append(("total", "", f"{total:,}", f"{cost['gmacs']['total']:,.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {parameters:>{widths[2]}}  {gmacs:>{widths[3]}}"
        for name, kind, parameters, gmacs in rows
    ]
    betas = " ".join(f"{beta:g}" for beta in scheduler["betas"])
    values = [f"  {name}: {value}" for name, value in scheduler.items() if name != "betas"]
    memory = [
        f"  {device['device']}: {device['name']}"
        + (f", {device['memory_gib']} GiB" if device["memory_gib"] is not None else "")
        for device in facts["devices"]
    ]
    return "\n".join(
        [
            f"Model {facts['model']}",
            f"GMACs for one image of {size}, padded to {padded}, in {cost['steps']} steps",
            *table,
            "Scheduler",
            *values,
            f"  betas: {betas}",
            "Versions",
            *(f"  {library}: {number}" for library, number in facts["versions"].items()),
            "Devices",
            *memory,
        ]
    )
