"""What `hidiff info` tells of a model and of the machine."""

import os
import platform
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..pipelines.pipeline_hidiff import HIDiffPipeline


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
