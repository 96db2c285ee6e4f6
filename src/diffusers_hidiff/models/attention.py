"""The two attentions of the transformer.

B batch · H, W pixels · C channels · N prior tokens · D prior width · h heads · c = C / h

Both are written by the equalities that make them cheap: the products that do not depend on the pixel are taken first, so
that what is left for every pixel is one thin matrix product. The projections whose weights take part in such a product
are modules of their own, so that hooks (offloading, weight casting) find each weight used in its owner's `forward`.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from .layers import PartsDepthwise, PartsLinear, linear_of_samples
from .slicing import Index, add_by_tiles, only, tiles


class ChannelProducts:
    """Inner products between the channels of queries and of keys along the pixels, summed over tiles.

    Args:
        num_heads: Heads h; only channels of one head are multiplied.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self.products: Tensor | float = 0.0  # q·kᵀ, [B, h, c, c], at least float32 as the two below
        self.query_squares: Tensor | float = 0.0  # |q|², [B, h, c, 1]
        self.key_squares: Tensor | float = 0.0

    def add(self, query: Tensor, key: Tensor) -> None:
        """Adds a tile of each, [B, H, W, C]."""
        wide = torch.promote_types(query.dtype, torch.float32)
        # Squaring and summing takes a third of the time of torch's norm along this dimension
        query_squares, key_squares = (
            part.to(wide).square().sum(dim=(1, 2)).unflatten(-1, (self.num_heads, -1, 1)) for part in (query, key)
        )
        query, key = (
            part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1) for part in (query, key)
        )  # [B, h, c, H*W]
        if query.dtype == torch.float16:  # a sum over a million pixels does not fit: divide first
            scales = [squares.clamp(min=1e-24).sqrt() for squares in (query_squares, key_squares)]
            query, key = ((part / scale).half() for part, scale in zip((query, key), scales, strict=True))
            products = (query @ key.transpose(-1, -2)).float() * scales[0] * scales[1].transpose(-1, -2)
        else:
            products = (query @ key.transpose(-1, -2)).to(wide)
        self.products = self.products + products
        self.query_squares = self.query_squares + query_squares
        self.key_squares = self.key_squares + key_squares

    def attention(self, temperature: Tensor) -> Tensor:
        """Attention matrix between channels, softmax(q·kᵀ·τ) with q and k of unit length along the pixels.

        The lengths divide the product rather than every pixel: q·kᵀ / (|q| |k|ᵀ).

        Args:
            temperature: τ, [h, 1, 1].
        Returns:
            [B, h, c, c], at least float32.
        Source:
            Restormer, arXiv:2111.09881, eq. 1.
        """
        query_norm, key_norm = (
            torch.as_tensor(squares).clamp(min=1e-24).sqrt() for squares in (self.query_squares, self.key_squares)
        )
        similarity = self.products / (query_norm * key_norm.transpose(-1, -2))
        return torch.softmax(similarity * temperature, dim=-1)


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
        self.to_qkv = PartsLinear(dim, dim, parts=3)
        self.depthwise = PartsDepthwise(dim, parts=3)
        self.to_out = AttendedProjection(dim, dim, bias=False)

    def forward(self, hidden_states: Tensor, normalise: Callable[[Tensor], Tensor], tile_bytes: int | None) -> Tensor:
        """hidden_states + attention(normalise(hidden_states)), [B, H, W, C]; in place if it takes several tiles."""
        channels = hidden_states.shape[-1]
        rows = tiles(hidden_states.shape, tile_bytes, channels * hidden_states.element_size(), margin=1)
        sums, values = ChannelProducts(len(self.temperature)), []
        for tile in chain.from_iterable(rows):
            features = self.to_qkv(normalise(hidden_states[tile.outer]))
            query, key, value = (part[..., :channels] for part in self.depthwise(features, tile.crop))
            sums.add(query, key)
            values.append(value)
        attention = sums.attention(self.temperature).to(hidden_states.dtype)
        if only(rows) is not None:
            return hidden_states + self.to_out(values[0], attention)
        values.reverse()
        for tile in chain.from_iterable(rows):
            hidden_states[tile.inner].add_(self.to_out(values.pop(), attention))
        return hidden_states


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

    def forward(self, hidden_states: Tensor, prior: Tensor, tile_bytes: int | None) -> Tensor:
        """hidden_states + attention to the prior, [B, H, W, C] and [B, N, D]; in place if it takes several tiles."""
        key, value = self.to_kv(self.norm_prior(prior)).chunk(2, dim=-1)  # [B, N, C] each

        def branch(outer: Tensor, crop: Index) -> Tensor:
            logits = self.to_q(self.norm(outer), key, self.num_heads)  # [B, H, W, h, N]
            return self.to_out(torch.softmax(logits, dim=-1), value)

        bytes_per_pixel = hidden_states.shape[-1] * hidden_states.element_size()
        return add_by_tiles(hidden_states, tiles(hidden_states.shape, tile_bytes, bytes_per_pixel), branch)
