"""Bytes and operations of the transformer, the device's two ceilings, and how far from them each way to run it is.

    python benchmarks/roofline.py --device cuda [--network full] [--size 720x1280] [--dtype bfloat16]

Tried on a CPU only; on a GPU it is untried.

The floor of bytes is that of perfectly fused layers: a channel attention reads its input and writes the values, then reads
both and writes its output; a feed-forward, an integration, a convolution between levels read and write once. Beside it
stands what operators one by one move, every input and output of each counted.
"""

import argparse
import sys
import time
from typing import Any

import torch
from cases import DTYPES, NETWORKS, VARIANTS, Case, pipeline_of
from measure import gemm_rate, gmacs, in_child, measure, synchronize
from speed import parse_size
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_hidiff import HIDiffTransformer
from diffusers_hidiff.models.attention import ChannelAttention, HierarchicalIntegration
from diffusers_hidiff.models.layers import Downsample, GatedFeedForward, PixelLinear, Upsample


class Traffic(TorchDispatchMode):
    """Adds up the sizes of all inputs and outputs of operators that are not views, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.numbers += sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
        return result


@torch.no_grad()
def numbers_moved(transformer: HIDiffTransformer, height: int, width: int) -> tuple[int, int]:
    """Numbers that perfectly fused layers and that single operators move for one image; nothing is computed."""
    fused = sum(parameter.numel() for parameter in transformer.parameters())

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal fused
        fused += (4 if isinstance(module, ChannelAttention) else 1) * inputs[0].numel() + output.numel()

    layers = (ChannelAttention, GatedFeedForward, HierarchicalIntegration, Downsample, Upsample, PixelLinear)
    hooks = [
        module.register_forward_hook(count)
        for name, module in transformer.named_modules()
        if isinstance(module, layers) or name in ("conv_in", "conv_out")
    ]
    on_meta = transformer.to("meta")
    on_meta.disable_slicing()
    config = transformer.config
    blurry = torch.empty(1, 3, height, width, device="meta")
    prior = torch.empty(1, config.num_prior_tokens, config.prior_dim, device="meta")
    with Traffic() as traffic:
        on_meta(blurry, prior)
    for hook in hooks:
        hook.remove()
    return fused, traffic.numbers


def bandwidth(device: str) -> float:
    """Bytes per second that a copy of 512 MiB reads and writes, the best of eight."""
    source = torch.ones(2**27, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--network", choices=NETWORKS, default="full")
    parser.add_argument("--size", type=parse_size, default=(720, 1280), metavar="HxW")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--variants", nargs="*", choices=("literal", "ours", "whole", "compiled"), default=["ours", "compiled"]
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--time_limit", type=float, default=900, help="seconds for a variant; default: 900")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device} cannot be used: PyTorch finds no CUDA device")
    threads = torch.get_num_threads()

    (height, width), itemsize = options.size, DTYPES[options.dtype].itemsize
    fused, eager = numbers_moved(pipeline_of(options.network).transformer, height, width)
    operations = gmacs(options.network, height, width)
    rate, speed = gemm_rate(options.dtype, options.device), bandwidth(options.device)
    floors = {"operations": operations / rate, "bytes": fused * itemsize / speed}
    floor = max(floors.values())
    print(f"{options.network}, {height}x{width}, {options.dtype}, {options.device}, torch {torch.__version__}")
    print(f"ceilings: {rate:.0f} GMAC/s, {speed / 1e9:.0f} GB/s")
    print(f"operations: {operations:.1f} GMAC, at the ceiling {floors['operations'] * 1e3:.2f} ms")
    print(f"bytes, fused: {fused * itemsize / 1e9:.2f} GB, at the ceiling {floors['bytes'] * 1e3:.2f} ms")
    print(f"bytes, operator by operator: {eager * itemsize / 1e9:.2f} GB, {eager * itemsize / speed * 1e3:.2f} ms")
    for variant in options.variants:
        dtype = "float32" if variant == "literal" else options.dtype
        case = Case(options.network, variant, height, width, dtype, options.device, threads)
        figures, failed = in_child(measure, case, options.repeats, threads=threads, limit=options.time_limit)
        result = failed or f"{figures['seconds'] * 1e3:.2f} ms, {figures['seconds'] / floor:.2f} of the larger floor"
        memory = "" if failed else f", {figures['added_mb']:.0f} MB"
        print(f"{variant} ({VARIANTS[variant]}), {dtype}: {result}{memory}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
