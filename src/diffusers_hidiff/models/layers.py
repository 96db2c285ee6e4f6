"""What several networks share.

B batch · H, W pixels · C channels · N prior tokens · D prior width

Feature maps are [B, H, W, C]: LayerNorm and 1x1 convolutions (here plain linear layers) then read memory in order, and
a convolution sees the same memory as a channels-last [B, C, H, W] tensor without a copy.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .slicing import Index, Slicing, Tile, add_by_tiles, tile_side, tiles


def conv2d_on_channels_last(conv: nn.Conv2d, hidden_states: Tensor) -> Tensor:
    """Applies `conv` to [B, H, W, C] and returns [B, H, W, C']."""
    return conv(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def linear_over_pixels(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer `weight` [C', C], `bias` [C'] at every pixel of [B, H, W, C].

    On a CPU as a 1x1 convolution: torch hands those to oneDNN and other float32 products to MKL, which does not use all of
    an AMD processor (2 cores with AVX-512: 410 instead of 170 GFLOP/s). The numbers are the same to rounding.
    """
    if hidden_states.device.type != "cpu":
        return F.linear(hidden_states, weight, bias)
    return F.conv2d(hidden_states.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def linear_of_samples(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Like `linear_over_pixels` with a weight of its own for every sample, [B, C', C]."""
    if len(weight) == 1:
        return linear_over_pixels(hidden_states, weight[0], bias)
    product = (hidden_states.flatten(1, 2) @ weight.transpose(1, 2)).unflatten(1, hidden_states.shape[1:3])
    return product if bias is None else product + bias


class PixelLinear(nn.Linear):
    """A linear layer for [B, H, W, C]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear_over_pixels(hidden_states, self.weight, self.bias)


class TokenMixer(nn.Module):
    """One block of MLP-Mixer (arXiv:2105.01601): first across tokens, then across channels.

    Args:
        num_tokens: Number N of tokens. The hidden layer across tokens has N / 2.
        dim: Width of a token.
        channel_expansion: Width of the hidden layer across channels, as a multiple of `dim`.
    """

    def __init__(self, num_tokens: int, dim: int, channel_expansion: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mlp = nn.Sequential(
            nn.Linear(num_tokens, num_tokens // 2), nn.GELU(), nn.Linear(num_tokens // 2, num_tokens)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.channel_mlp = nn.Sequential(
            nn.Linear(dim, channel_expansion * dim), nn.GELU(), nn.Linear(channel_expansion * dim, dim)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, N, dim]
        mixed = self.token_mlp(self.norm1(hidden_states).transpose(1, 2)).transpose(1, 2)
        hidden_states = hidden_states + mixed
        return hidden_states + self.channel_mlp(self.norm2(hidden_states))


class PriorDownsample(nn.Module):
    """One step up the prior pyramid: fewer tokens, then a linear layer across channels (HI-Diff, Fig. 1)."""

    def __init__(self, num_tokens: int, out_tokens: int, prior_dim: int) -> None:
        super().__init__()
        self.token_proj = nn.Linear(num_tokens, out_tokens)
        self.channel_proj = nn.Linear(prior_dim, prior_dim)

    def forward(self, prior: Tensor) -> Tensor:  # [B, N, D] -> [B, N', D]
        return self.channel_proj(self.token_proj(prior.transpose(1, 2)).transpose(1, 2))


class Downsample(nn.Module):
    """Half the height and width, twice the channels: 3x3 convolution, then pixel-unshuffle (Restormer, arXiv:2111.09881)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim // 2, kernel_size=3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, H, W, C] -> [B, H/2, W/2, 2C]
        return F.pixel_unshuffle(self.conv(hidden_states.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)


class Upsample(nn.Module):
    """Twice the height and width, half the channels: 3x3 convolution, then pixel-shuffle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, H, W, C] -> [B, 2H, 2W, C/2]
        return F.pixel_shuffle(self.conv(hidden_states.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)


ALL_PARTS = slice(None)


def padded_parts(weight: Tensor, parts: int) -> list[Tensor]:
    """`weight` cut along its first dimension into equal parts, each with rows of zeros up to a multiple of 16.

    Products of 254 columns run at less than half the speed of 256 (CPU, float32). The zeros change nothing: GELU(0)·0 = 0.
    """
    return [
        part if len(part) % 16 == 0 else torch.cat((part, part.new_zeros(-len(part) % 16, *part.shape[1:])))
        for part in weight.chunk(parts)
    ]


class PartsLinear(nn.Linear):
    """A linear layer to `parts` features of [B, H, W, width] each, stored as one: apart, each is contiguous in memory.

    Called with `chosen`, it makes only those of them.
    """

    def __init__(self, dim: int, width: int, parts: int) -> None:
        super().__init__(dim, parts * width, bias=False)
        self.parts = parts

    def forward(self, hidden_states: Tensor, chosen: slice = ALL_PARTS) -> list[Tensor]:  # type: ignore[override]
        return [linear_over_pixels(hidden_states, part) for part in padded_parts(self.weight, self.parts)[chosen]]


class PartsDepthwise(nn.Conv2d):
    """The 3x3 depthwise convolution of what `PartsLinear` returns, given the same `chosen`."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(parts * width, parts * width, kernel_size=3, padding=1, groups=parts * width, bias=False)
        self.parts = parts

    def forward(  # type: ignore[override]
        self, features: list[Tensor], crop: Index, chosen: slice = ALL_PARTS
    ) -> list[Tensor]:
        # [B, H, W, width] each -> the rectangle `crop` of each
        return [
            F.conv2d(part.permute(0, 3, 1, 2), weight, padding=1, groups=len(weight)).permute(0, 2, 3, 1)[crop]
            for part, weight in zip(features, padded_parts(self.weight, self.parts)[chosen], strict=True)
        ]


class FromPadded(nn.Linear):
    """A linear layer from features padded by zeros."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        zeros = hidden_states.shape[-1] - self.in_features
        return linear_over_pixels(hidden_states, F.pad(self.weight, (0, zeros)) if zeros else self.weight)


class GatedFeedForward(nn.Module):
    """Gated feed-forward with a depthwise convolution (Restormer, arXiv:2111.09881, Fig. 2b).

    Args:
        dim: Channels C.
        expansion_factor: The hidden width is `int(dim * expansion_factor)`.
    """

    def __init__(self, dim: int, expansion_factor: float) -> None:
        super().__init__()
        self.hidden_dim = int(dim * expansion_factor)
        self.proj_in = PartsLinear(dim, self.hidden_dim, parts=2)
        self.depthwise = PartsDepthwise(self.hidden_dim, parts=2)
        self.proj_out = FromPadded(self.hidden_dim, dim, bias=False)

    def forward(self, hidden_states: Tensor, normalise: Callable[[Tensor], Tensor], slicing: Slicing) -> Tensor:
        """hidden_states + feed_forward(normalise(hidden_states)), [B, H, W, C]; in place if it takes several tiles."""

        def branch(outer: Tensor, tile: Tile) -> Tensor:
            features = self.proj_in(normalise(outer))
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler plans its memory itself
                return self.gate(features, tile.crop)
            # Four tensors of the hidden width are made anew in the backward pass: nearly half of what a block would keep.
            return checkpoint(self.gate, features, tile.crop, use_reentrant=False, preserve_rng_state=False)

        bytes_per_pixel = self.hidden_dim * hidden_states.element_size()
        side = tile_side(hidden_states.shape, slicing.tile_bytes, bytes_per_pixel)
        return add_by_tiles(hidden_states, tiles(hidden_states.shape, side, margin=1), slicing, branch)

    def gate(self, features: list[Tensor], crop: Index) -> Tensor:
        """What comes after the first projection."""
        gate, value = self.depthwise(features, crop)
        gate = F.gelu(gate)
        return self.proj_out(gate * value if torch.is_grad_enabled() else gate.mul_(value))


class Modulation(nn.Module):
    """Scales and shifts features by linear functions of the one-token prior: x·(A₁z + b₁) + (A₂z + b₂)."""

    def __init__(self, prior_dim: int, dim: int) -> None:
        super().__init__()
        self.scale = nn.Linear(prior_dim, dim)
        self.shift = nn.Linear(prior_dim, dim)

    def forward(self, hidden_states: Tensor, prior: Tensor) -> Tensor:  # [B, H, W, C], [B, D]
        scale, shift = self.scale(prior)[:, None, None], self.shift(prior)[:, None, None]
        return hidden_states * scale + shift
