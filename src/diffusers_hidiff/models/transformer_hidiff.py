"""Blurry image, prior -> restored image.

B batch · H, W pixels · C channels of the outermost level · N prior tokens · D prior width
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .attention import ChannelAttention, HierarchicalIntegration
from .layers import (
    Downsample,
    GatedFeedForward,
    Modulation,
    PixelLinear,
    PriorDownsample,
    Upsample,
    conv2d_on_channels_last,
)
from .outputs import HIDiffModelOutput
from .slicing import WHOLE, Slicing, check_window


class HIDiffTransformerBlock(nn.Module):
    """Channel attention and gated feed-forward, each on normalised features and added to them (Restormer)."""

    def __init__(self, dim: int, num_heads: int, ffn_expansion_factor: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = ChannelAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = GatedFeedForward(dim, ffn_expansion_factor)

    def forward(self, hidden_states: Tensor, slicing: Slicing) -> Tensor:  # [B, H, W, C]
        hidden_states = self.attention(hidden_states, self.normalise1, slicing)
        return self.feed_forward(hidden_states, self.normalise2, slicing)

    # Not the norms themselves: offloading moves modules among the arguments, and their weights may not be there.
    def normalise1(self, hidden_states: Tensor) -> Tensor:
        return self.norm1(hidden_states)

    def normalise2(self, hidden_states: Tensor) -> Tensor:
        return self.norm2(hidden_states)


class HIDiffModulatedTransformerBlock(nn.Module):
    """The block of the innermost level: the prior modulates what attention and feed-forward see (HI-Diff, Fig. 1)."""

    def __init__(self, dim: int, num_heads: int, ffn_expansion_factor: float, prior_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.modulation1 = Modulation(prior_dim, dim)
        self.attention = ChannelAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.modulation2 = Modulation(prior_dim, dim)
        self.feed_forward = GatedFeedForward(dim, ffn_expansion_factor)

    def forward(self, hidden_states: Tensor, prior: Tensor, slicing: Slicing) -> Tensor:  # [B, H, W, C], [B, D]
        hidden_states = self.attention(hidden_states, lambda x: self.modulation1(self.norm1(x), prior), slicing)
        return self.feed_forward(hidden_states, lambda x: self.modulation2(self.norm2(x), prior), slicing)


class HIDiffLevel(nn.Module):
    """One level of the U: the prior is integrated once, then come blocks that do not see it."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by `enable_gradient_checkpointing`

    def __init__(self, dim: int, num_blocks: int, num_heads: int, ffn_expansion_factor: float, prior_dim: int) -> None:
        super().__init__()
        self.integration = HierarchicalIntegration(dim, prior_dim, num_heads)
        self.blocks = nn.ModuleList(
            HIDiffTransformerBlock(dim, num_heads, ffn_expansion_factor) for _ in range(num_blocks)
        )
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, prior: Tensor, slicing: Slicing) -> Tensor:
        # [B, H, W, C], [B, N, D]
        hidden_states = self.integration(hidden_states, prior, slicing)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, slicing)
            else:
                hidden_states = block(hidden_states, slicing)
        return hidden_states


class HIDiffInnermostLevel(nn.Module):
    """The bottom of the U: every block is modulated by the one-token prior."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by `enable_gradient_checkpointing`

    def __init__(self, dim: int, num_blocks: int, num_heads: int, ffn_expansion_factor: float, prior_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            HIDiffModulatedTransformerBlock(dim, num_heads, ffn_expansion_factor, prior_dim) for _ in range(num_blocks)
        )
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, prior: Tensor, slicing: Slicing) -> Tensor:  # [B, H, W, C], [B, D]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, prior, slicing)
            else:
                hidden_states = block(hidden_states, prior, slicing)
        return hidden_states


class HIDiffTransformer(ModelMixin, ConfigMixin):
    """The regression network: a Restormer whose every level is guided by the prior (HI-Diff, arXiv:2305.12966, Fig. 1).

    The defaults are the release trained on GoPro; the RealBlur releases differ in `ffn_expansion_factor=2.0`.

    Args:
        in_channels: Channels of the blurry and of the restored image.
        dim: Channels C of the outermost level; the levels have C, 2C, 4C, 8C.
        num_blocks: Transformer blocks of the four levels, outermost first; the decoder mirrors the outer three.
        num_refinement_blocks: Blocks after the decoder.
        num_heads: Attention heads of the four levels, outermost first.
        ffn_expansion_factor: Hidden width of the feed-forward networks, as a multiple of the level's channels.
        prior_dim: Width D of a prior token.
        num_prior_tokens: Number N of prior tokens, a multiple of 4.
        local_window: See `enable_local_statistics`; None is the published method.
    Raises:
        ValueError: `num_blocks` or `num_heads` has not four entries, `num_prior_tokens` is no multiple of 4, or
            `local_window` no positive multiple of 8.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["HIDiffTransformerBlock", "HIDiffModulatedTransformerBlock", "HierarchicalIntegration"]
    _repeated_blocks = ["HIDiffTransformerBlock", "HIDiffModulatedTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out", "prior_down"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        dim: int = 48,
        num_blocks: Sequence[int] = (3, 5, 6, 6),
        num_refinement_blocks: int = 4,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        prior_dim: int = 256,
        num_prior_tokens: int = 16,
        local_window: int | None = None,
    ) -> None:
        super().__init__()
        if local_window is not None:
            check_window(local_window)
        for name, values in (("num_blocks", num_blocks), ("num_heads", num_heads)):
            if len(values) != 4:
                raise ValueError(f"`{name}` must have four entries, one a level, got {list(values)}.")
        if num_prior_tokens % 4:
            raise ValueError(f"`num_prior_tokens` must be a multiple of 4, got {num_prior_tokens}.")

        self.prior_down2 = PriorDownsample(num_prior_tokens, num_prior_tokens // 4, prior_dim)
        self.prior_down3 = PriorDownsample(num_prior_tokens // 4, 1, prior_dim)

        def level(dim: int, num_blocks: int, num_heads: int) -> HIDiffLevel:
            return HIDiffLevel(dim, num_blocks, num_heads, ffn_expansion_factor, prior_dim)

        self.conv_in = nn.Conv2d(in_channels, dim, kernel_size=3, padding=1, bias=False)
        self.encoder1 = level(dim, num_blocks[0], num_heads[0])
        self.down1 = Downsample(dim)
        self.encoder2 = level(2 * dim, num_blocks[1], num_heads[1])
        self.down2 = Downsample(2 * dim)
        self.encoder3 = level(4 * dim, num_blocks[2], num_heads[2])
        self.down3 = Downsample(4 * dim)
        self.latent = HIDiffInnermostLevel(8 * dim, num_blocks[3], num_heads[3], ffn_expansion_factor, prior_dim)
        self.up3 = Upsample(8 * dim)
        self.reduce3 = PixelLinear(8 * dim, 4 * dim, bias=False)
        self.decoder3 = level(4 * dim, num_blocks[2], num_heads[2])
        self.up2 = Upsample(4 * dim)
        self.reduce2 = PixelLinear(4 * dim, 2 * dim, bias=False)
        self.decoder2 = level(2 * dim, num_blocks[1], num_heads[1])
        self.up1 = Upsample(2 * dim)
        self.decoder1 = level(2 * dim, num_blocks[0], num_heads[0])
        self.refinement = level(2 * dim, num_refinement_blocks, num_heads[0])
        self.conv_out = nn.Conv2d(2 * dim, in_channels, kernel_size=3, padding=1, bias=False)
        self.tile_megabytes: float | Literal["auto"] | None = "auto"  # None for whole feature maps

    def enable_slicing(self, megabytes: float = 16.0) -> None:
        """Works tile by tile when no gradients are needed: less memory, the same picture to rounding.

        Args:
            megabytes: Size of the largest tensor of a tile; on a CPU as much as its last cache holds.
        Raises:
            ValueError: `megabytes` is not positive.
        """
        if not megabytes > 0:
            raise ValueError(f"`megabytes` must be positive, got {megabytes}.")
        self.tile_megabytes = float(megabytes)

    def disable_slicing(self) -> None:
        """Works on whole feature maps, however large."""
        self.tile_megabytes = None

    def enable_local_statistics(self, window: int) -> None:
        """Channel attention over a window around each pixel instead of the whole image, as in training on patches.

        Changes the picture of images larger than the window. It is a setting of the model, saved with it, and for inference
        alone: with gradients, attention is over the whole patch.

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
        """Channel attention over the whole image, as published."""
        self.register_to_config(local_window=None)

    def slicing_for(self, blurry: Tensor) -> Slicing:
        """How sub-layers go through the feature maps of these images.

        Unless told otherwise: tile by tile on the CPU, which is faster there, and elsewhere only if the image would not fit.
        """
        if torch.is_grad_enabled():
            return WHOLE
        return Slicing(self.tile_bytes_for(blurry), self.config.local_window)

    def tile_bytes_for(self, blurry: Tensor) -> int | None:
        if self.tile_megabytes is None:
            return None
        if self.tile_megabytes != "auto":
            return int(self.tile_megabytes * 2**20)
        if torch.compiler.is_compiling():  # a loop over tiles makes a graph of thousands of nodes
            return None
        if blurry.device.type == "cpu":
            return 16 * 2**20
        if blurry.device.type == "cuda":
            hidden = int(2 * self.config.dim * self.config.ffn_expansion_factor)
            pixels = blurry.numel() // blurry.shape[1]
            need = pixels * (4 * hidden + 6 * self.config.dim) * self.dtype.itemsize
            if need > 0.8 * torch.cuda.mem_get_info(blurry.device)[0]:
                return 64 * 2**20
        return None

    def forward(self, blurry: Tensor, prior: Tensor, return_dict: bool = True) -> HIDiffModelOutput | tuple[Tensor]:
        """Restores an image.

        Args:
            blurry: [B, 3, H, W], RGB in [0, 1]; H and W multiples of 8. It may be float32 whatever the dtype of the
                weights: the network computes in theirs, and its result, a small correction, is added in float32.
            prior: Prior tokens, [B, N, D], in the dtype of the weights.
            return_dict: Whether to return a `HIDiffModelOutput` or a tuple.
        Returns:
            The restored image [B, 3, H, W], not clamped.
        Raises:
            ValueError: H or W is no multiple of 8.
        """
        if blurry.shape[-2] % 8 or blurry.shape[-1] % 8:
            raise ValueError(f"`blurry` must have height and width that are multiples of 8, got {tuple(blurry.shape)}.")
        prior1 = prior  # [B, N, D]
        prior2 = self.prior_down2(prior1)  # [B, N/4, D]
        prior3 = self.prior_down3(prior2).squeeze(1)  # [B, D]

        slicing = [self.slicing_for(blurry).inner(level) for level in range(4)]
        pixels = blurry.to(prior.dtype).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        hidden_states = conv2d_on_channels_last(self.conv_in, pixels)  # [B, H, W, C]
        skip1 = self.encoder1(hidden_states, prior1, slicing[0])
        skip2 = self.encoder2(self.down1(skip1), prior2, slicing[1])  # [B, H/2, W/2, 2C]
        skip3 = self.encoder3(self.down2(skip2), prior2, slicing[2])  # [B, H/4, W/4, 4C]
        hidden_states = self.latent(self.down3(skip3), prior3, slicing[3])  # [B, H/8, W/8, 8C]
        hidden_states = self.reduce3(torch.cat((self.up3(hidden_states), skip3), dim=-1))
        hidden_states = self.decoder3(hidden_states, prior2, slicing[2])  # [B, H/4, W/4, 4C]
        hidden_states = self.reduce2(torch.cat((self.up2(hidden_states), skip2), dim=-1))
        hidden_states = self.decoder2(hidden_states, prior2, slicing[1])  # [B, H/2, W/2, 2C]
        hidden_states = torch.cat((self.up1(hidden_states), skip1), dim=-1)
        del skip1, skip2, skip3  # not needed while the widest level works
        hidden_states = self.decoder1(hidden_states, prior1, slicing[0])  # [B, H, W, 2C]
        hidden_states = self.refinement(hidden_states, prior1, slicing[0])
        restored = conv2d_on_channels_last(self.conv_out, hidden_states).permute(0, 3, 1, 2) + blurry

        if not return_dict:
            return (restored,)
        return HIDiffModelOutput(sample=restored)
