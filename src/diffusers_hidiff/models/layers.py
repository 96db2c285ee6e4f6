"""What several networks share.

B batch · H, W pixels · C channels · N prior tokens · D prior width

Feature maps are [B, H, W, C]: LayerNorm and 1x1 convolutions (here plain linear layers) then read memory in order, and
a convolution sees the same memory as a channels-last [B, C, H, W] tensor without a copy.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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
        hidden_states = conv2d_on_channels_last(self.conv, hidden_states)
        return rearrange(hidden_states, "b (h i) (w j) c -> b h w (c i j)", i=2, j=2)


class Upsample(nn.Module):
    """Twice the height and width, half the channels: 3x3 convolution, then pixel-shuffle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, H, W, C] -> [B, 2H, 2W, C/2]
        hidden_states = conv2d_on_channels_last(self.conv, hidden_states)
        return rearrange(hidden_states, "b h w (c i j) -> b (h i) (w j) c", i=2, j=2)


def padded(weight: Tensor, dim: int, parts: int = 1, multiple: int = 16) -> Tensor:
    """`weight` with zeros behind each of the equal `parts` of dimension `dim`, up to a multiple.

    Matrix products of 254 columns run at less than half the speed of 256 (2 CPU cores, float32), and rows of 127 values
    leave 15 to be done one by one. The zeros change nothing: GELU(0)·0 = 0.
    """
    size = weight.shape[dim] // parts
    if size % multiple == 0:
        return weight
    shape = weight.unflatten(dim, (parts, size))
    zeros = [0, 0] * (shape.ndim - dim - 2) + [0, -size % multiple]
    return F.pad(shape, zeros).flatten(dim, dim + 1)


class GatedLinear(nn.Linear):
    """To gate and value, side by side, each padded to a convenient width."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear_over_pixels(hidden_states, padded(self.weight, 0, parts=2))


class GatedDepthwise(nn.Conv2d):
    """A depthwise convolution of gate and value as `GatedLinear` pads them."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = padded(self.weight, 0, parts=2)
        return F.conv2d(hidden_states, weight, padding=self.padding, groups=len(weight))


class FromPadded(nn.Linear):
    """From the padded width."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear_over_pixels(hidden_states, padded(self.weight, 1))


class GatedFeedForward(nn.Module):
    """Gated feed-forward with a depthwise convolution (Restormer, arXiv:2111.09881, Fig. 2b).

    Args:
        dim: Channels C.
        expansion_factor: The hidden width is `int(dim * expansion_factor)`.
    """

    def __init__(self, dim: int, expansion_factor: float) -> None:
        super().__init__()
        hidden_dim = int(dim * expansion_factor)
        self.proj_in = GatedLinear(dim, 2 * hidden_dim, bias=False)
        self.depthwise = GatedDepthwise(
            2 * hidden_dim, 2 * hidden_dim, kernel_size=3, padding=1, groups=2 * hidden_dim, bias=False
        )
        self.proj_out = FromPadded(hidden_dim, dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, H, W, C]
        gate, value = conv2d_on_channels_last(self.depthwise, self.proj_in(hidden_states)).chunk(2, dim=-1)
        if not torch.is_grad_enabled():  # faster in one piece; for a backward pass it would be one more tensor to keep
            gate = gate.contiguous()
        return self.proj_out(F.gelu(gate) * value)


class Modulation(nn.Module):
    """Scales and shifts features by linear functions of the one-token prior: x·(A₁z + b₁) + (A₂z + b₂)."""

    def __init__(self, prior_dim: int, dim: int) -> None:
        super().__init__()
        self.scale = nn.Linear(prior_dim, dim)
        self.shift = nn.Linear(prior_dim, dim)

    def forward(self, hidden_states: Tensor, prior: Tensor) -> Tensor:  # [B, H, W, C], [B, D]
        scale, shift = self.scale(prior)[:, None, None], self.shift(prior)[:, None, None]
        return hidden_states * scale + shift
