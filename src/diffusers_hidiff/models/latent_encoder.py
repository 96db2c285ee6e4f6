"""Blurry image, or blurry and sharp -> prior tokens.

B batch · H, W pixels · N = grid_size² prior tokens · D = 4·embed_dim prior width
"""

from collections.abc import Callable
from itertools import chain
from math import ceil

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .layers import TokenMixer
from .outputs import HIDiffModelOutput
from .slicing import WHOLE, Slicing, SlicingMixin, check_window, only, scaled, tile_side, tiles

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "leaky_relu": lambda: nn.LeakyReLU(0.1)}


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def pooling_weights(length: int, grid_size: int, window: int | None) -> Tensor:
    """What each row (or column) of an image counts in the mean of each row (or column) of a grid, [grid_size, length].

    A mean over the cells of a grid is one over rows and one over columns.

    Args:
        length: Rows of the image.
        grid_size: Rows of the grid. Cells may overlap by a row, as in `adaptive_avg_pool2d`.
        window: The grid is laid over windows of so many rows, each half over the next, and its means are averaged; None lays
            it over the whole.
    """
    window = length if window is None else min(window, length)
    room = length - window
    number = ceil(2 * room / window) + 1
    weights = torch.zeros(grid_size, length, dtype=torch.float64)
    for start in (round(room * i / max(1, number - 1)) for i in range(number)):
        for cell in range(grid_size):
            first, last = window * cell // grid_size, ceil(window * (cell + 1) / grid_size)
            weights[cell, start + first : start + last] += 1 / ((last - first) * number)
    return weights


class ResidualBlock(nn.Module):
    """x + conv3(act(conv3(x)))."""

    def __init__(self, dim: int, activation: str) -> None:
        super().__init__()
        self.conv1 = conv3(dim, dim)
        self.activation = ACTIVATIONS[activation]()
        self.conv2 = conv3(dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, dim, H/4, W/4]
        return hidden_states + self.conv2(self.activation(self.conv1(hidden_states)))


class HIDiffLatentEncoder(ModelMixin, ConfigMixin, SlicingMixin):
    """Squeezes an image, or a pair of images, into a few prior tokens (HI-Diff, arXiv:2305.12966, Fig. 1).

    With `in_channels=3` it is the condition encoder, which sees the blurry image alone; with `in_channels=6` it is the
    latent encoder of stage 1, which sees blurry and sharp. The defaults are the condition encoder of the GoPro release;
    the RealBlur releases have `num_blocks=5, activation="leaky_relu", wide_head=True`.

    Args:
        in_channels: 3 for a blurry image, 6 for a blurry and a sharp one.
        embed_dim: Width of the convolutions. A prior token has D = 4·embed_dim.
        num_blocks: Residual blocks.
        grid_size: The features are pooled to grid_size x grid_size tokens.
        activation: "gelu" or "leaky_relu" (slope 0.1).
        wide_head: Whether three convolutions widen the features to D before pooling, instead of one that keeps them.
        local_window: See `enable_local_statistics`; None is the published method.
    Raises:
        ValueError: `in_channels` or `activation` is none of those, or `local_window` no positive multiple of 8.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "TokenMixer"]
    _repeated_blocks = ["ResidualBlock"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 64,
        num_blocks: int = 6,
        grid_size: int = 4,
        activation: str = "gelu",
        wide_head: bool = False,
        local_window: int | None = None,
    ) -> None:
        super().__init__()
        if local_window is not None:
            check_window(local_window)
        if in_channels not in (3, 6):
            raise ValueError(f"`in_channels` must be 3 (blurry) or 6 (blurry and sharp), got {in_channels}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {sorted(ACTIVATIONS)}, got {activation!r}.")
        act = ACTIVATIONS[activation]
        prior_dim = 4 * embed_dim
        head_dim = prior_dim if wide_head else embed_dim

        self.conv_in = conv3(16 * in_channels, embed_dim)
        self.act_in = act()
        self.blocks = nn.ModuleList(ResidualBlock(embed_dim, activation) for _ in range(num_blocks))
        if wide_head:
            self.head = nn.Sequential(
                *(conv3(embed_dim, 2 * embed_dim), act()),
                *(conv3(2 * embed_dim, 2 * embed_dim), act()),
                *(conv3(2 * embed_dim, prior_dim), act()),
            )
        else:
            self.head = nn.Sequential(conv3(embed_dim, embed_dim))
        self.mixer = TokenMixer(grid_size**2, head_dim, channel_expansion=4)
        self.proj_out = nn.Linear(head_dim, prior_dim)
        self.act_out = act()
        self.gradient_checkpointing = False
        # How far a feature depends on its neighbours: one pixel for every convolution
        self.margin = sum(isinstance(module, nn.Conv2d) for module in self.modules())

    def enable_local_statistics(self, window: int) -> None:
        """Pools windows instead of the whole image, as in training on patches, and averages what they give.

        Changes the result for images larger than the window. It is a setting of the model, saved with it, and for inference
        alone.

        Args:
            window: Height and width in pixels of the image, about those of the training patches; a multiple of 8.
        Raises:
            ValueError: `window` is no positive multiple of 8.
        Source:
            TLC, arXiv:2112.04491.
        """
        check_window(window)
        self.register_to_config(local_window=window)

    def disable_local_statistics(self) -> None:
        """Pools the whole image, as published."""
        self.register_to_config(local_window=None)

    def forward(
        self, blurry: Tensor, sharp: Tensor | None = None, return_dict: bool = True
    ) -> HIDiffModelOutput | tuple[Tensor]:
        """Encodes an image or a pair.

        Args:
            blurry: [B, 3, H, W], RGB in [0, 1]; H and W multiples of 4.
            sharp: The same, with `in_channels=6` only.
            return_dict: Whether to return a `HIDiffModelOutput` or a tuple.
        Returns:
            Prior tokens or condition, [B, N, D], row by row.
        Raises:
            ValueError: `sharp` is missing or too much, or a size is no multiple of 4.
        """
        if (sharp is not None) != (self.config.in_channels == 6):
            needs = "needs" if self.config.in_channels == 6 else "does not take"
            raise ValueError(f"An encoder with in_channels={self.config.in_channels} {needs} `sharp`.")
        if blurry.shape[-2] % 4 or blurry.shape[-1] % 4:
            raise ValueError(f"`blurry` must have height and width that are multiples of 4, got {tuple(blurry.shape)}.")
        slicing, window = self.slicing_for(blurry), None if torch.is_grad_enabled() else self.config.local_window
        images = [blurry] if sharp is None else [sharp, blurry]
        shape = (len(blurry), blurry.shape[2] // 4, blurry.shape[3] // 4, self.proj_out.in_features)
        side = tile_side(shape, slicing.tile_bytes, shape[-1] * blurry.element_size())
        rows = tiles(shape, side, margin=self.margin)
        if only(rows) is not None and window is None:
            hidden_states = F.adaptive_avg_pool2d(self.features(images), self.config.grid_size)
        else:
            window = None if window is None else window // 4
            wide = torch.promote_types(blurry.dtype, torch.float32)
            down, right = (
                pooling_weights(length, self.config.grid_size, window).to(blurry.device, wide) for length in shape[1:3]
            )
            parts = []
            for tile in chain.from_iterable(rows):
                features = self.features([image[:, :, *scaled(tile.outer, 4)[1:]] for image in images])
                features = features[:, :, *tile.crop[1:]].to(wide)
                parts.append(down[:, tile.inner[1]] @ features @ right[:, tile.inner[2]].T)
            hidden_states = torch.stack(parts).sum(dim=0).to(blurry.dtype)  # [B, head_dim, grid_size, grid_size]
        tokens = hidden_states.flatten(2).transpose(1, 2)  # [B, N, head_dim]
        tokens = self.act_out(self.proj_out(self.mixer(tokens)))  # [B, N, D]

        if not return_dict:
            return (tokens,)
        return HIDiffModelOutput(sample=tokens)

    def features(self, images: list[Tensor]) -> Tensor:
        """What is pooled: of [B, 3, H, W] each, [B, head_dim, H/4, W/4]."""
        hidden_states = F.pixel_unshuffle(torch.cat(images, dim=1) if len(images) > 1 else images[0], 4)
        hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        hidden_states = self.act_in(self.conv_in(hidden_states))  # [B, embed_dim, H/4, W/4]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return self.head(hidden_states)

    def slicing_for(self, blurry: Tensor) -> Slicing:
        """How to go through these images, [B, 3, H, W].

        Raises:
            ValueError: The limit of memory does not suffice.
        """
        if self.works_whole():
            return WHOLE
        pixels = blurry.numel() // blurry.shape[1]
        return self.plan_slicing(
            blurry, whole=pixels // 16 * 6 * self.proj_out.in_features * blurry.element_size(), maps=0
        )
