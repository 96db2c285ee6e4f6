"""The transformer of HI-Diff the plain way: every formula as the papers write it, no product rearranged.

The yardstick of tests and benchmarks. It shares no code with the package and loads the original's `net_g`.

B batch · H, W pixels · C channels of the level at hand · N prior tokens · D prior width · h heads · c = C / h
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)


def conv3(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, groups=groups, bias=False)


class SwapAxes(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:  # [B, N, D] <-> [B, D, N]
        return tokens.transpose(1, 2)


class Norm(nn.Module):
    """LayerNorm over channels, of tokens [B, HW, C] or of an image [B, C, H, W] taken as such."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.body(x)
        tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        return self.body(tokens).transpose(1, 2).reshape(x.shape)


class Modulated(nn.Module):
    """A sub-layer that, if a prior is given to it, first modulates its input: x·(A₁z + b₁) + (A₂z + b₂)."""

    def __init__(self, dim: int, prior_dim: int | None) -> None:
        super().__init__()
        if prior_dim is not None:
            self.ln1 = nn.Linear(prior_dim, dim)
            self.ln2 = nn.Linear(prior_dim, dim)

    def modulate(self, x: Tensor, prior: Tensor | None) -> Tensor:  # [B, C, H, W], [B, D]
        if prior is None:
            return x
        return x * self.ln1(prior)[:, :, None, None] + self.ln2(prior)[:, :, None, None]


class ChannelAttention(Modulated):
    """Restormer, arXiv:2111.09881, Fig. 2a."""

    def __init__(self, dim: int, num_heads: int, prior_dim: int | None) -> None:
        super().__init__(dim, prior_dim)
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = conv1(dim, 3 * dim)
        self.qkv_dwconv = conv3(3 * dim, 3 * dim, groups=3 * dim)
        self.project_out = conv1(dim, dim)

    def forward(self, x: Tensor, prior: Tensor | None) -> Tensor:
        q, k, v = self.qkv_dwconv(self.qkv(self.modulate(x, prior))).chunk(3, dim=1)
        q, k, v = (part.reshape(x.shape[0], self.num_heads, -1, x.shape[2] * x.shape[3]) for part in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)  # [B, h, c, HW], of length one along the pixels
        attention = torch.softmax(q @ k.transpose(-2, -1) * self.temperature, dim=-1)  # [B, h, c, c]
        return self.project_out((attention @ v).reshape(x.shape))


class FeedForward(Modulated):
    """Restormer, Fig. 2b."""

    def __init__(self, dim: int, expansion: float, prior_dim: int | None) -> None:
        super().__init__(dim, prior_dim)
        hidden = int(dim * expansion)
        self.project_in = conv1(dim, 2 * hidden)
        self.dwconv = conv3(2 * hidden, 2 * hidden, groups=2 * hidden)
        self.project_out = conv1(hidden, dim)

    def forward(self, x: Tensor, prior: Tensor | None) -> Tensor:
        x1, x2 = self.dwconv(self.project_in(self.modulate(x, prior))).chunk(2, dim=1)
        return self.project_out(F.gelu(x1) * x2)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, expansion: float, prior_dim: int | None) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = ChannelAttention(dim, num_heads, prior_dim)
        self.norm2 = Norm(dim)
        self.ffn = FeedForward(dim, expansion, prior_dim)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), prior)
        return x + self.ffn(self.norm2(x), prior)


class Integration(nn.Module):
    """Every pixel attends to the prior tokens (HI-Diff, arXiv:2305.12966, Fig. 1d)."""

    def __init__(self, dim: int, num_heads: int, prior_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = Norm(dim)
        self.norm2 = Norm(prior_dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(prior_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:  # [B, C, H, W], [B, N, D]
        tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        q = self.q(self.norm1(tokens)).unflatten(-1, (self.num_heads, -1))  # [B, HW, h, c]
        k, v = self.kv(self.norm2(prior)).chunk(2, dim=-1)
        k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (k, v))  # [B, N, h, c] each
        logits = torch.einsum("bphc,bnhc->bhpn", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bhpn,bnhc->bphc", torch.softmax(logits, dim=-1), v)
        tokens = tokens + self.proj(out.flatten(2))
        return tokens.transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """One integration, then blocks that see no prior."""

    def __init__(self, dim: int, num_blocks: int, num_heads: int, expansion: float, prior_dim: int) -> None:
        super().__init__()
        self.him = Integration(dim, num_heads, prior_dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, expansion, None) for _ in range(num_blocks))

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        x = self.him(x, prior)
        for block in self.blocks:
            x = block(x)
        return x


class Latent(nn.Module):
    """The innermost level: no integration, the prior modulates every sub-layer."""

    def __init__(self, dim: int, num_blocks: int, num_heads: int, expansion: float, prior_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, expansion, prior_dim) for _ in range(num_blocks))

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:  # [B, C, H, W], [B, D]
        for block in self.blocks:
            x = block(x, prior)
        return x


class Resample(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def down(dim: int) -> Resample:
    return Resample(conv3(dim, dim // 2), nn.PixelUnshuffle(2))


def up(dim: int) -> Resample:
    return Resample(conv3(dim, 2 * dim), nn.PixelShuffle(2))


class LiteralTransformer(nn.Module):
    """The defaults are the GoPro release; RealBlur has `expansion=2.0`."""

    def __init__(
        self,
        *,
        dim: int = 48,
        num_blocks: Sequence[int] = (3, 5, 6, 6),
        num_refinement_blocks: int = 4,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        prior_dim: int = 256,
        num_tokens: int = 16,
    ) -> None:
        super().__init__()

        def pyramid(num_in: int, num_out: int) -> nn.Sequential:
            return nn.Sequential(SwapAxes(), nn.Linear(num_in, num_out), SwapAxes(), nn.Linear(prior_dim, prior_dim))

        def level(width: int, index: int, depth: int | None = None, kind: type[nn.Module] = Level) -> nn.Module:
            blocks = num_blocks[index] if depth is None else depth
            return kind(width * dim, blocks, num_heads[index], expansion, prior_dim)

        self.down_1 = pyramid(num_tokens, num_tokens // 4)
        self.down_2 = pyramid(num_tokens // 4, 1)
        self.patch_embed = nn.ModuleDict({"proj": conv3(3, dim)})
        self.encoder_level1 = level(1, 0)
        self.down1_2 = down(dim)
        self.encoder_level2 = level(2, 1)
        self.down2_3 = down(2 * dim)
        self.encoder_level3 = level(4, 2)
        self.down3_4 = down(4 * dim)
        self.latent = level(8, 3, kind=Latent)
        self.up4_3 = up(8 * dim)
        self.reduce_chan_level3 = conv1(8 * dim, 4 * dim)
        self.decoder_level3 = level(4, 2)
        self.up3_2 = up(4 * dim)
        self.reduce_chan_level2 = conv1(4 * dim, 2 * dim)
        self.decoder_level2 = level(2, 1)
        self.up2_1 = up(2 * dim)
        self.decoder_level1 = level(2, 0)
        self.refinement = level(2, 0, depth=num_refinement_blocks)
        self.output = conv3(2 * dim, 3)

    def forward(self, blurry: Tensor, prior: Tensor) -> Tensor:  # [B, 3, H, W], [B, N, D] -> [B, 3, H, W]
        z1 = prior
        z2 = self.down_1(z1)  # [B, N/4, D]
        z3 = self.down_2(z2).squeeze(1)  # [B, D]

        skip1 = self.encoder_level1(self.patch_embed["proj"](blurry), z1)
        skip2 = self.encoder_level2(self.down1_2(skip1), z2)
        skip3 = self.encoder_level3(self.down2_3(skip2), z2)
        x = self.latent(self.down3_4(skip3), z3)
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat((self.up4_3(x), skip3), dim=1)), z2)
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat((self.up3_2(x), skip2), dim=1)), z2)
        x = self.decoder_level1(torch.cat((self.up2_1(x), skip1), dim=1), z1)
        return self.output(self.refinement(x, z1)) + blurry
