"""The two attentions of the transformer.

B batch · H, W pixels · C channels · N prior tokens · D prior width · h heads · c = C / h

Both are written by the equalities that make them cheap: the products that do not depend on the pixel are taken first, so
that what is left for every pixel is one thin matrix product. The projections whose weights take part in such a product
are modules of their own, so that hooks (offloading, weight casting) find each weight used in its owner's `forward`.
"""

import torch
from torch import Tensor, nn

from .layers import PixelLinear, conv2d_on_channels_last, linear_of_samples


def attention_across_channels(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """Attention matrix between channels, softmax(q·kᵀ·τ) with q and k of unit length along the pixels.

    The lengths divide the product rather than every pixel: q·kᵀ / (|q| |k|ᵀ).

    Args:
        query: [B, H*W, C].
        key: [B, H*W, C].
        temperature: τ, [h, 1, 1].
    Returns:
        [B, h, c, c].
    Source:
        Restormer, arXiv:2111.09881, eq. 1.
    """
    num_heads = temperature.shape[0]
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query_norm, key_norm = (  # [B, h, c, 1], at least 1e-12; three times as fast as torch's norm along this dimension
        part.to(wide).square().sum(dim=1).clamp(min=1e-24).sqrt().unflatten(-1, (num_heads, -1, 1))
        for part in (query, key)
    )
    query, key = (part.unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1) for part in (query, key))  # [B, h, c, H*W]
    if dtype == torch.float16:  # a sum over a million pixels does not fit: divide first
        similarity = (query / query_norm).to(dtype) @ (key / key_norm).to(dtype).transpose(-1, -2)
    else:
        similarity = (query @ key.transpose(-1, -2)).to(wide) / (query_norm * key_norm.transpose(-1, -2))
    return torch.softmax(similarity.to(wide) * temperature, dim=-1).to(dtype)


class AttendedProjection(nn.Linear):
    """The output projection of channel attention, W_o·(A·v), as one matrix (W_o·A) for all pixels."""

    def forward(self, value: Tensor, attention: Tensor) -> Tensor:  # type: ignore[override]
        # [B, H, W, C], [B, h, c, c]
        weight = self.weight.to(attention.dtype).unflatten(1, attention.shape[1:3])  # [C, h, c]
        weight = torch.einsum("ohd,bhde->bohe", weight, attention).flatten(2)  # [B, C, C]
        return linear_of_samples(value, weight)


class ChannelAttention(nn.Module):
    """Self-attention between channels instead of pixels: linear in the number of pixels.

    Args:
        dim: Channels C.
        num_heads: Heads h; divides `dim`.
    Source:
        Restormer, arXiv:2111.09881, Fig. 2a.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`dim` must be a multiple of `num_heads`, got dim={dim} and num_heads={num_heads}.")
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.to_qkv = PixelLinear(dim, 3 * dim, bias=False)
        self.depthwise = nn.Conv2d(3 * dim, 3 * dim, kernel_size=3, padding=1, groups=3 * dim, bias=False)
        self.to_out = AttendedProjection(dim, dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, H, W, C]
        qkv = conv2d_on_channels_last(self.depthwise, self.to_qkv(hidden_states))
        query, key, value = qkv.chunk(3, dim=-1)  # [B, H, W, C] each
        attention = attention_across_channels(query.flatten(1, 2), key.flatten(1, 2), self.temperature)
        return self.to_out(value, attention)


class QueryLogits(nn.Linear):
    """The query projection and its product with the keys, X·(W_qᵀk)·c^-½, as one matrix for all pixels."""

    def forward(self, hidden_states: Tensor, key: Tensor, num_heads: int) -> Tensor:  # type: ignore[override]
        # [B, H, W, C], [B, N, C]
        weight = self.weight.to(key.dtype).unflatten(0, (num_heads, -1))  # [h, c, C]
        key = key.unflatten(-1, (num_heads, -1)) * weight.shape[1] ** -0.5  # [B, N, h, c]
        weight = torch.einsum("bnhd,hdc->bhnc", key, weight).flatten(1, 2)  # [B, h*N, C]
        return linear_of_samples(hidden_states, weight).unflatten(-1, (num_heads, -1))  # [B, H, W, h, N]


class ValueProjection(nn.Linear):
    """The sum over prior tokens and the output projection, P·(v·W_oᵀ) + b, as one matrix for all pixels."""

    def forward(self, probabilities: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        # [B, H, W, h, N], [B, N, C]
        num_heads = probabilities.shape[3]
        weight = self.weight.to(value.dtype).unflatten(1, (num_heads, -1))  # [C, h, c]
        value = value.unflatten(-1, (num_heads, -1))  # [B, N, h, c]
        weight = torch.einsum("bnhd,ohd->bohn", value, weight).flatten(2)  # [B, C, h*N]
        return linear_of_samples(probabilities.flatten(3), weight, self.bias.to(weight.dtype))


class HierarchicalIntegration(nn.Module):
    """Lets every pixel attend to the prior tokens (HI-Diff, arXiv:2305.12966, Fig. 1d).

    Args:
        dim: Channels C of the image features.
        prior_dim: Width D of a prior token.
        num_heads: Heads h; divides `dim`.
    """

    def __init__(self, dim: int, prior_dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`dim` must be a multiple of `num_heads`, got dim={dim} and num_heads={num_heads}.")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.norm_prior = nn.LayerNorm(prior_dim)
        self.to_q = QueryLogits(dim, dim, bias=False)
        self.to_kv = nn.Linear(prior_dim, 2 * dim, bias=False)
        self.to_out = ValueProjection(dim, dim)

    def forward(self, hidden_states: Tensor, prior: Tensor) -> Tensor:  # [B, H, W, C], [B, N, D]
        key, value = self.to_kv(self.norm_prior(prior)).chunk(2, dim=-1)  # [B, N, C] each
        logits = self.to_q(self.norm(hidden_states), key, self.num_heads)  # [B, H, W, h, N]
        return hidden_states + self.to_out(torch.softmax(logits, dim=-1), value)
