"""Where in the image each prior token is looked at: the hierarchical integration's attention (HI-Diff, Fig. 1d)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..image_processor import pad_to_multiple, preprocess
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from .panels import Panel, sheet

LEVELS = ("encoder1", "encoder2", "encoder3", "decoder3", "decoder2", "decoder1", "refinement")


@torch.no_grad()
def attention_maps(pipeline: HIDiffPipeline, blurry: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """For each level, how much every pixel attends to every prior token, mean over heads.

    Args:
        pipeline: The model.
        blurry: uint8 [H, W, 3].
        seed: Of the initial noise.
    Returns:
        Level -> [N, h, w] in [0, 1], float32; over the tokens of a pixel they sum to 1.
    """
    found: dict[str, np.ndarray] = {}

    def keep(level: str) -> Callable[[nn.Module, tuple[Tensor, Tensor]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
            found[level] = (
                arguments[0][0].mean(dim=2).permute(2, 0, 1).float().cpu().numpy()
            )  # [H, W, h, N] -> [N, H, W]

        return hook

    transformer = pipeline.transformer
    pixels = pad_to_multiple(preprocess(blurry)[0].pixels)[None].to(pipeline.device)
    generator = torch.Generator().manual_seed(seed)
    prior = pipeline(blurry, generator=generator, output_type="latent", return_dict=False)[0]
    hooks = [getattr(transformer, level).integration.to_out.register_forward_pre_hook(keep(level)) for level in LEVELS]
    tile_megabytes = transformer.tile_megabytes
    transformer.disable_slicing()  # a hook sees the whole map only if it is made in one piece
    try:
        transformer(pixels, prior.to(transformer.dtype), return_dict=False)
    finally:
        transformer.tile_megabytes = tile_megabytes
        for hook in hooks:
            hook.remove()
    return found


def attention_sheet(maps: np.ndarray, blurry: np.ndarray) -> bytes:
    """The image and the map of each token of one level on a common scale; PNG."""
    limits = float(maps.min()), float(maps.max())
    panels = [Panel(f"token {number + 1}", token, limits=limits) for number, token in enumerate(maps)]
    return sheet([Panel("blurry", blurry), *panels])
