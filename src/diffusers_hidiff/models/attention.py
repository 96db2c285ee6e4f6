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

from .layers import ALL_PARTS, PartsDepthwise, PartsLinear, linear_of_samples
from .slicing import Slicing, Tile, add_by_tiles, only, tile_side, tiles
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
        """hidden_states + attention(normalise(hidden_states)), [B, H, W, C]; in place if it takes several tiles.

        With a `slicing.window` the attention of each cell is that of the window around it (TLC, arXiv:2112.04491).
        """
        shape, (num_heads, *_) = hidden_states.shape, self.temperature.shape
        side = tile_side(shape, slicing.tile_bytes, shape[-1] * hidden_states.element_size())
        if slicing.window is not None and slicing.window < max(shape[1:3]):
            return self.over_windows(hidden_states, normalise, slicing, slicing.window, side)
        rows = tiles(shape, side, margin=1)

        if (tile := only(rows)) is not None:
            hidden_states = slicing.fetch(hidden_states)
            query, key, value = self.qkv(hidden_states, normalise, tile, ALL_PARTS)
            slicing.done(value, times=2)
            attention = ChannelProducts.of(query, key, num_heads).attention(self.temperature)
            return hidden_states + self.to_out(value, attention.to(hidden_states.dtype))

        # The values are made when the attention is known: kept, they would take as much memory as the image's features
        products: list[ChannelProducts] = []
        for tile in chain.from_iterable(rows):
            query, key = self.qkv(slicing.fetch(hidden_states[tile.outer]), normalise, tile, slice(2))
            products.append(ChannelProducts.of(query, key, num_heads))
            slicing.done(query)
        attention = ChannelProducts.sum(products).attention(self.temperature).to(hidden_states.dtype)

        def branch(outer: Tensor, tile: Tile) -> Tensor:
            (value,) = self.qkv(outer, normalise, tile, slice(2, 3))
            return self.to_out(value, attention)

        return add_by_tiles(hidden_states, rows, slicing, branch)

    def qkv(self, outer: Tensor, normalise: Callable[[Tensor], Tensor], tile: Tile, chosen: slice) -> list[Tensor]:
        """Those chosen of queries, keys and values in `tile.inner`, from the features of `tile.outer`; [B, h, w, C] each."""
        features = self.depthwise(self.to_qkv(normalise(outer), chosen), tile.crop, chosen)
        return [part[..., : outer.shape[-1]] for part in features]

    def over_windows(
        self,
        hidden_states: Tensor,
        normalise: Callable[[Tensor], Tensor],
        slicing: Slicing,
        window: int,
        side: int | None,
    ) -> Tensor:
        """The same with the attention of each cell that of the window around it (TLC, arXiv:2112.04491).

        Args:
            hidden_states: [B, H, W, C].
            normalise: Applied to what attention sees.
            slicing: What computes.
            window: Height and width of the windows in pixels of this level.
            side: No tile is higher or wider, None for one tile. It takes as many cells at once as fit.
        """
        shape = hidden_states.shape
        side = max(shape[1:3]) if side is None else side
        cell = min(side, ceil(window / WINDOW_CELLS))
        rows, columns = (Cuts.of(length, cell).groups(side // cell) for length in shape[1:3])
        cells = [(row, column) for row in rows for column in columns]
        groups = [[tile_of(row, column, shape) for column in columns] for row in rows]

        products: list[Tensor] = []  # [B, n, m, h, c, c + 2] each
        for (row, column), tile in zip(cells, chain.from_iterable(groups), strict=True):
            qk = self.qkv(slicing.fetch(hidden_states[tile.outer]), normalise, tile, slice(2))
            query, key = (as_cells(part, row, column) for part in qk)
            packed = ChannelProducts.of(query, key, len(self.temperature)).packed()
            products.append(packed.unflatten(0, (-1, row.number, column.number)))
            slicing.done(qk[0])

        width = len(columns)
        lines = [torch.cat(products[i : i + width], dim=2) for i in range(0, len(products), width)]
        around = sum_around(torch.cat(lines, dim=1), ceil(window / cell))
        attention = ChannelProducts.unpacked(around).attention(self.temperature).to(hidden_states.dtype)
        lines = list(attention.split([row.number for row in rows], dim=1))
        attentions = [part for line in lines for part in line.split([column.number for column in columns], dim=2)]
        waiting = iter(zip(cells, attentions, strict=True))

        def branch(outer: Tensor, tile: Tile) -> Tensor:
            (row, column), part = next(waiting)
            (value,) = self.qkv(outer, normalise, tile, slice(2, 3))
            return from_cells(self.to_out(as_cells(value, row, column), part.flatten(0, 2)), row, column)

        return add_by_tiles(hidden_states, groups, slicing, branch)


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

        def branch(outer: Tensor, tile: Tile) -> Tensor:
            logits = self.to_q(self.norm(outer), key, self.num_heads)  # [B, H, W, h, N]
            return self.to_out(torch.softmax(logits, dim=-1), value)

        bytes_per_pixel = hidden_states.shape[-1] * hidden_states.element_size()
        side = tile_side(hidden_states.shape, slicing.tile_bytes, bytes_per_pixel)
        return add_by_tiles(hidden_states, tiles(hidden_states.shape, side), slicing, branch)
