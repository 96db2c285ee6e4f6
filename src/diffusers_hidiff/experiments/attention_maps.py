"""Where in the image each prior token is looked at: the hierarchical integration's attention (HI-Diff, Fig. 1d)."""

from collections.abc import Callable
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..image_processor import pad_to_multiple, preprocess
from ..pipelines.pipeline_hidiff import HIDiffPipeline
from ..utils.panels import TEXT_SIZE, WIDTH, Panel, draw, empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def attention_sheet(maps: np.ndarray, blurry: np.ndarray) -> "Figure":
    """The image, and in the tokens' own grid how much more or less each is looked at than if all were looked at alike.

    Args:
        maps: Of one level, [N, h, w].
        blurry: uint8 [H, W, 3].
    """
    relative = maps * len(maps)  # 1: as much as any other token
    reach = max(0.01, float(np.percentile(np.abs(relative - 1), 99)))
    side = isqrt(len(maps))
    height, width = blurry.shape[:2]
    heading = "Where in the image each prior token is looked at: red more, blue less than the average token"
    figure = empty_figure(heading, WIDTH / 3 * 2 * height / width + 0.25 * side)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 2])[0]
    draw(left.subplots(), Panel("blurry", blurry))
    grid = right.subplots(side, side, squeeze=False)
    for number, (axis, token) in enumerate(zip(grid.flat, relative, strict=True), start=1):
        draw(axis, Panel(f"token {number}", token, (1 - reach, 1 + reach), colours="RdBu_r"))
    bar = right.colorbar(grid[0, 0].images[0], ax=grid, shrink=0.8, aspect=30)
    bar.set_label("attention (1: as much as the average token)", fontsize=TEXT_SIZE)
    bar.ax.tick_params(labelsize=TEXT_SIZE)
    return figure
