"""What the benchmarks measure: the whole pipeline from pixels to pixels, built in several ways from the same weights.

B images · H, W pixels · N prior tokens · D prior width
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import official
from literal import LiteralTransformer

from diffusers_hidiff import HIDIFF_SMALL, HIDiffPipeline, HIDiffTransformer
from diffusers_hidiff.conversion import networks_from_original, scheduler_of, to_original
from diffusers_hidiff.export import PipelineGraph, load_graph

Run = Callable[[Tensor, Tensor], Tensor]  # blurry [1, 3, H, W], noise [1, N, D] -> restored [1, 3, H, W]

NETWORKS = {"full": "the GoPro release's size, stand-in weights", "small": "hidiff-small"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIANTS = {
    "literal": "the transformer transcribed from the papers, eager",
    "ours": "the default, eager",
    "whole": "`transformer.disable_slicing()`",
    "sliced": "`transformer.enable_slicing(megabytes=4)`",
    "compiled": "`disable_slicing()` and `compile_repeated_blocks(dynamic=True)`",
    "onnx": "ONNX Runtime, the graph of `scripts/export.py`",
    "official": "the authors' network, see --official",
}


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    network: str
    variant: str
    height: int
    width: int
    dtype: str
    device: str
    threads: int

    @property
    def size(self) -> str:
        return f"{self.height}x{self.width}"

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Blurry image and noise, float32, always the same."""
        generator = torch.Generator().manual_seed(0)
        dim = {"full": 256, "small": 128}[self.network]
        blurry = torch.rand(1, 3, self.height, self.width, generator=generator)
        return blurry.to(self.device), torch.randn(1, 16, dim, generator=generator).to(self.device)


def pipeline_of(network: str) -> HIDiffPipeline:
    """The pipeline of that name, on the CPU in float32."""
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    if network == "small":
        pipeline = HIDiffPipeline.from_pretrained(HIDIFF_SMALL)
    else:
        parts = {name: official.state_dict("gopro", name) for name in ("net_g", "net_le_dm", "net_d")}
        pipeline = HIDiffPipeline(**networks_from_original(parts), scheduler=scheduler_of("gopro"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Plain(nn.Module):
    """A network (blurry, prior) -> restored, called as our transformer is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def forward(self, blurry: Tensor, prior: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.network(blurry.to(self.dtype), prior).float(),)


def literal_of(transformer: HIDiffTransformer) -> Plain:
    """The literal transcription with the weights of `transformer`."""
    config = transformer.config
    with torch.device("meta"):
        literal = LiteralTransformer(
            dim=config.dim,
            num_blocks=config.num_blocks,
            num_refinement_blocks=config.num_refinement_blocks,
            num_heads=config.num_heads,
            expansion=config.ffn_expansion_factor,
            prior_dim=config.prior_dim,
            num_tokens=config.num_prior_tokens,
        )
    literal.load_state_dict(to_original(transformer), assign=True)
    return Plain(literal.eval())


def official_of(transformer: HIDiffTransformer, spec: str) -> Plain:
    """The authors' network with the weights of `transformer`.

    Args:
        transformer: Ours.
        spec: DIR:MODULE:FUNCTION; with DIR on the path, FUNCTION() of MODULE returns the network in its released size, to be
            called with (blurry, prior).
    """
    folder, module, function = spec.split(":")
    sys.path.insert(0, folder)
    network = getattr(importlib.import_module(module), function)()
    network.load_state_dict(to_original(transformer))
    return Plain(network.eval())


def build(case: Case, graph_file: Path | None = None, official_spec: str | None = None) -> Run:
    """The pipeline in the way that `case` says.

    Args:
        case: What is measured.
        graph_file: The exported graph, for "onnx".
        official_spec: See `official_of`.
    """
    if case.variant == "onnx":
        assert graph_file is not None
        return load_graph(graph_file, "onnx", case.threads)
    graph = PipelineGraph(pipeline_of(case.network))
    transformer = graph.transformer
    if case.variant == "literal":
        graph.transformer = literal_of(transformer)
    elif case.variant == "official":
        assert official_spec is not None
        graph.transformer = official_of(transformer, official_spec)
    elif case.variant == "sliced":
        transformer.enable_slicing(megabytes=4)
    elif case.variant in ("whole", "compiled"):
        transformer.disable_slicing()
    if case.variant == "compiled":
        torch._dynamo.config.recompile_limit = 64  # one graph for each class of block and width
        transformer.compile_repeated_blocks(dynamic=True)
    # Encoder and chain are a hundredth of the work, and the chain multiplies rounding by up to 174: they stay in float32
    graph.transformer.to(DTYPES[case.dtype])
    return graph.to(case.device)
