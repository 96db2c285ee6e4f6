"""The two attentions of the transformer.

B batch · H, W pixels · C channels · N prior tokens · D prior width · h heads · c = C / h

Both are written by the equalities that make them cheap: the products that do not depend on the pixel are taken first, so
that what is left for every pixel is one thin matrix product. The projections whose weights take part in such a product
are modules of their own, so that hooks (offloading, weight casting) find each weight used in its owner's `forward`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import reduce
from itertools import chain
from math import ceil

import torch
from torch import Tensor, nn

from .layers import PartsDepthwise, PartsLinear, linear_of_samples
from .slicing import Index, Slicing, Tile, add_by_tiles, only, tile_side, tiles
from .windows import Cuts, as_cells, from_cells, sum_around, tile_of

WINDOW_CELLS = 3  # along the side of a window of local statistics; odd, so that one is in the middle


@dataclass(frozen=True)
class ChannelProducts:
    """Inner products between the channels of queries and of keys along the pixels; those of tiles add up to the image's.

    Args:
        products: q·kᵀ of channels of one head, [B, h, c, c], at least float32, as the two below.
        query_squares: |q|², [B, h, c, 1].
        key_squares: |k|², [B, h, c, 1].
    """

    products: Tensor
    query_squares: Tensor
    key_squares: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, num_heads: int) -> "ChannelProducts":
        """Those of [B, H, W, C] each."""
        wide = torch.promote_types(query.dtype, torch.float32)
        # Squaring and summing takes a third of the time of torch's norm along this dimension
        squares = [part.to(wide).square().sum(dim=(1, 2)).unflatten(-1, (num_heads, -1, 1)) for part in (query, key)]
        query, key = (
            part.flatten(1, 2).unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1) for part in (query, key)
        )  # [B, h, c, H*W]
        if query.dtype == torch.float16:  # a sum over a million pixels does not fit: divide first
            scales = [part.clamp(min=1e-24).sqrt() for part in squares]
            query, key = ((part / scale).half() for part, scale in zip((query, key), scales, strict=True))
            products = (query @ key.transpose(-1, -2)).float() * scales[0] * scales[1].transpose(-1, -2)
        else:
            products = (query @ key.transpose(-1, -2)).to(wide)
        return cls(products, *squares)

    def packed(self) -> Tensor:
        """All three in one tensor, [B, h, c, c + 2]."""
        return torch.cat((self.products, self.query_squares, self.key_squares), dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "ChannelProducts":
        """The inverse of `packed`, with any dimensions in front."""
        return cls(packed[..., :-2], packed[..., -2:-1], packed[..., -1:])

    @classmethod
    def sum(cls, parts: Iterable["ChannelProducts"]) -> "ChannelProducts":
        return reduce(lambda a, b: cls(*(getattr(a, f.name) + getattr(b, f.name) for f in fields(cls))), parts)

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
        query_norm, key_norm = (squares.clamp(min=1e-24).sqrt() for squares in (self.query_squares, self.key_squares))
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

    def forward(self, hidden_states: Tensor, normalise: Callable[[Tensor], Tensor], slicing: Slicing) -> Tensor:
        """hidden_states + attention(normalise(hidden_states)), [B, H, W, C]; in place if it takes several tiles."""
        shape, (num_heads, *_) = hidden_states.shape, self.temperature.shape
        side = tile_side(shape, slicing.tile_bytes, shape[-1] * hidden_states.element_size())
        if slicing.window is not None and slicing.window < max(shape[1:3]):
            return self.over_windows(hidden_states, normalise, slicing.window, side)
        rows = tiles(shape, side, margin=1)

        products: list[ChannelProducts] = []
        values: list[Tensor] = []
        for tile in chain.from_iterable(rows):
            query, key, value = self.queries_keys_values(hidden_states, normalise, tile)
            products.append(ChannelProducts.of(query, key, num_heads))
            values.append(value)

        attention = ChannelProducts.sum(products).attention(self.temperature).to(hidden_states.dtype)
        if only(rows) is not None:
            return hidden_states + self.to_out(values[0], attention)
        for tile in chain.from_iterable(rows):
            hidden_states[tile.inner].add_(self.to_out(values.pop(0), attention))
        return hidden_states

    def queries_keys_values(
        self, hidden_states: Tensor, normalise: Callable[[Tensor], Tensor], tile: Tile
    ) -> list[Tensor]:
        """Those of `tile.inner`, [B, h, w, C] each."""
        features = self.to_qkv(normalise(hidden_states[tile.outer]))
        return [part[..., : hidden_states.shape[-1]] for part in self.depthwise(features, tile.crop)]

    def over_windows(
        self, hidden_states: Tensor, normalise: Callable[[Tensor], Tensor], window: int, side: int
    ) -> Tensor:
        """The same, in place, with the attention of each cell that of the window around it (TLC, arXiv:2112.04491).

        Args:
            hidden_states: [B, H, W, C].
            normalise: Applied to what attention sees.
            window: Height and width of the windows in pixels of this level.
            side: No tile is higher or wider. It takes as many cells at once as fit.
        """
        shape, cell = hidden_states.shape, min(side, ceil(window / WINDOW_CELLS))
        rows, columns = (Cuts.of(length, cell).groups(side // cell) for length in shape[1:3])
        groups = [[(row, column, tile_of(row, column, shape)) for column in columns] for row in rows]

        products: list[list[Tensor]] = [[] for _ in rows]  # [B, n, m, h, c, c + 2] each
        values: list[Tensor] = []  # [B·n·m, height, width, C] each
        for i, (row, column, tile) in ((i, group) for i, line in enumerate(groups) for group in line):
            qkv = self.queries_keys_values(hidden_states, normalise, tile)
            query, key, value = (as_cells(part, row, column) for part in qkv)
            packed = ChannelProducts.of(query, key, len(self.temperature)).packed()
            products[i].append(packed.unflatten(0, (-1, row.number, column.number)))
            values.append(value)

        around = sum_around(torch.cat([torch.cat(line, dim=2) for line in products], dim=1), ceil(window / cell))
        attention = ChannelProducts.unpacked(around).attention(self.temperature).to(hidden_states.dtype)
        lines = attention.split([row.number for row in rows], dim=1)
        attentions = [part for line in lines for part in line.split([column.number for column in columns], dim=2)]
        for (row, column, tile), part in zip(chain.from_iterable(groups), attentions, strict=True):
            attended = self.to_out(values.pop(0), part.flatten(0, 2))
            hidden_states[tile.inner].add_(from_cells(attended, row, column))
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

    def forward(self, hidden_states: Tensor, prior: Tensor, slicing: Slicing) -> Tensor:
        """hidden_states + attention to the prior, [B, H, W, C] and [B, N, D]; in place if it takes several tiles."""
        key, value = self.to_kv(self.norm_prior(prior)).chunk(2, dim=-1)  # [B, N, C] each

        def branch(outer: Tensor, crop: Index) -> Tensor:
            logits = self.to_q(self.norm(outer), key, self.num_heads)  # [B, H, W, h, N]
            return self.to_out(torch.softmax(logits, dim=-1), value)

        bytes_per_pixel = hidden_states.shape[-1] * hidden_states.element_size()
        side = tile_side(hidden_states.shape, slicing.tile_bytes, bytes_per_pixel)
        return add_by_tiles(hidden_states, tiles(hidden_states.shape, side), branch)
