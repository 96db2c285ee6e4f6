"""Blurry image, prior -> restored image.

B batch · H, W pixels · C channels of the outermost level · N prior tokens · D prior width
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

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
from .slicing import WHOLE, Slicing, SlicingMixin, Tile, check_window, fill_by_tiles, scaled, tile_side, tiles


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


class HIDiffTransformer(ModelMixin, ConfigMixin, SlicingMixin):
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
        self.on_progress: Callable[[float], None] | None = None  # told after each tile what share of the work is done

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
        """How layers go through the feature maps of these images, [B, 3, H, W].

        Raises:
            ValueError: The limit of memory does not suffice.
        """
        if torch.is_grad_enabled():
            return WHOLE
        batch_size, _, height, width = blurry.shape
        pixels, window, report = batch_size * height * width, self.config.local_window, None
        if self.on_progress is not None:
            report = self.report_for(pixels, self.on_progress)
        if self.works_whole():
            return Slicing(window=window, report=report)
        dim, hidden = self.config.dim, int(2 * self.config.dim * self.config.ffn_expansion_factor)
        itemsize = self.conv_in.weight.element_size()
        slicing = self.plan_slicing(
            blurry,
            whole=pixels * (4 * hidden + 6 * dim) * itemsize,
            # The widest level's when it is made, of its skip and of the level within; then the restored image
            maps=pixels * (7 * dim // 2 * itemsize + 3 * blurry.element_size()),
            result=8 * pixels,  # as bytes, as Pillow has it and as a file
        )
        return replace(slicing, window=window, report=report)

    def report_for(self, pixels: int, on_progress: Callable[[float], None]) -> Callable[[int], None]:
        """Turns the numbers gone through, as `Slicing.report` is told them, into the share of all for `on_progress`."""
        config = self.config
        # How often each number is gone through: once where it is made, once by an integration, three times by a block
        encoders = sum((2 + 3 * number) / 2**level for level, number in enumerate(config.num_blocks[:3]))
        latent = (1 + 3 * config.num_blocks[3]) / 2**3
        decoders = sum((2 + 3 * config.num_blocks[level]) / 2**level for level in (1, 2))
        outermost = 2 * (3 + 3 * config.num_blocks[0] + 3 * config.num_refinement_blocks)
        total = pixels * (config.dim * (encoders + latent + decoders + outermost) + config.in_channels)
        done = 0

        def report(number: int) -> None:
            nonlocal done
            done += number
            on_progress(done / total)

        return report

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

        outermost = self.slicing_for(blurry)
        slicing = [outermost.inner(level) for level in range(4)]
        hidden_states = self.embed(blurry, prior.dtype, slicing[0])  # [B, H, W, C]
        skip1 = self.encoder1(hidden_states, prior1, slicing[0])
        skip2 = self.encoder2(self.halve(self.down1, skip1, slicing[1]), prior2, slicing[1])  # [B, H/2, W/2, 2C]
        skip3 = self.encoder3(self.halve(self.down2, skip2, slicing[2]), prior2, slicing[2])  # [B, H/4, W/4, 4C]
        hidden_states = self.halve(self.down3, skip3, slicing[3])
        hidden_states = self.latent(hidden_states, prior3, slicing[3])  # [B, H/8, W/8, 8C]
        hidden_states = self.join(self.up3, hidden_states, skip3, self.reduce3, slicing[3])
        hidden_states = self.decoder3(hidden_states, prior2, slicing[2])  # [B, H/4, W/4, 4C]
        hidden_states = self.join(self.up2, hidden_states, skip2, self.reduce2, slicing[2])
        hidden_states = self.decoder2(hidden_states, prior2, slicing[1])  # [B, H/2, W/2, 2C]
        hidden_states = self.join(self.up1, hidden_states, skip1, None, slicing[1])
        del skip1, skip2, skip3  # not needed while the widest level works
        hidden_states = self.decoder1(hidden_states, prior1, slicing[0])  # [B, H, W, 2C]
        hidden_states = self.refinement(hidden_states, prior1, slicing[0])
        restored = self.correct(blurry, hidden_states, slicing[0])

        if not return_dict:
            return (restored,)
        return HIDiffModelOutput(sample=restored)

    def embed(self, blurry: Tensor, dtype: torch.dtype, slicing: Slicing) -> Tensor:
        """The image as features, [B, 3, H, W] -> [B, H, W, C]."""

        def make(tile: Tile) -> Tensor:
            pixels = slicing.fetch(blurry[..., *tile.outer[1:]]).to(dtype).contiguous(memory_format=torch.channels_last)
            return conv2d_on_channels_last(self.conv_in, pixels.permute(0, 2, 3, 1))[tile.crop]

        shape = (len(blurry), *blurry.shape[-2:], self.config.dim)
        side = tile_side(shape, slicing.tile_bytes, self.config.dim * dtype.itemsize)
        return fill_by_tiles(shape, tiles(shape, side, margin=1), slicing, make)

    def halve(self, down: Downsample, hidden_states: Tensor, slicing: Slicing) -> Tensor:
        """To the next level inwards, [B, H, W, C] -> [B, H/2, W/2, 2C]."""
        batch_size, height, width, dim = hidden_states.shape
        shape = (batch_size, height // 2, width // 2, 2 * dim)
        side = tile_side(shape, slicing.tile_bytes, 4 * dim * hidden_states.element_size())
        return fill_by_tiles(
            shape,
            tiles(shape, side, margin=1),
            slicing,
            lambda tile: down(slicing.fetch(hidden_states[scaled(tile.outer, 2)]))[tile.crop],
        )

    def join(
        self, up: Upsample, hidden_states: Tensor, skip: Tensor, reduce: PixelLinear | None, slicing: Slicing
    ) -> Tensor:
        """To the next level outwards, [B, H, W, C] and [B, 2H, 2W, C/2] -> [B, 2H, 2W, C], or C/2 where it is reduced.

        `slicing` is that of the inner level.
        """

        def make(tile: Tile) -> Tensor:
            upper = up(slicing.fetch(hidden_states[tile.outer]))[scaled(tile.crop, 2)]
            both = torch.cat((upper, slicing.fetch(skip[scaled(tile.inner, 2)])), dim=-1)
            return both if reduce is None else reduce(both)

        dim = hidden_states.shape[-1]
        side = tile_side(hidden_states.shape, slicing.tile_bytes, 4 * dim * hidden_states.element_size())
        rows = tiles(hidden_states.shape, side, margin=1)
        into = None if reduce is None else skip  # a tile of it is read before it is overwritten
        return fill_by_tiles((*skip.shape[:3], dim), rows, slicing, make, factor=2, into=into)

    def correct(self, blurry: Tensor, hidden_states: Tensor, slicing: Slicing) -> Tensor:
        """What the features add to the image, and the image, [B, 3, H, W] and [B, H, W, 2C] -> [B, 3, H, W]."""

        def make(tile: Tile) -> Tensor:
            correction = conv2d_on_channels_last(self.conv_out, slicing.fetch(hidden_states[tile.outer]))[tile.crop]
            return (correction.permute(0, 3, 1, 2) + blurry[..., *tile.inner[1:]]).permute(0, 2, 3, 1)

        side = tile_side(
            hidden_states.shape, slicing.tile_bytes, hidden_states.shape[-1] * hidden_states.element_size()
        )
        rows = tiles(hidden_states.shape, side, margin=1)
        if slicing.place == "host":  # what comes in from the device goes back there
            slicing = replace(slicing, place="device")
        shape = (*hidden_states.shape[:3], blurry.shape[1])
        return fill_by_tiles(shape, rows, slicing, make).permute(0, 3, 1, 2)
