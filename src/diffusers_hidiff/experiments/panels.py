"""Pictures in a grid, each with a title and, where there is a ground truth, its PSNR."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt

import numpy as np

from ..metrics.psnr import psnr_of_arrays


@dataclass(frozen=True)
class Panel:
    """A picture of the grid.

    Args:
        title: Above it.
        image: uint8 [H, W, 3], or a map [H, W] of any range.
        sharp: Ground truth, for the PSNR.
        limits: Darkest and brightest value of a map.
    """

    title: str
    image: np.ndarray
    sharp: np.ndarray | None = None
    limits: tuple[float, float] | None = None


def sheet(panels: Sequence[Panel], columns: int | None = None) -> bytes:
    """The grid, as PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    columns = columns or min(6, isqrt(len(panels) - 1) + 1)
    rows = ceil(len(panels) / columns)
    height, width = panels[0].image.shape[:2]
    size = (2.6 * columns, (2.6 * height / width + 0.35) * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        title = panel.title
        if panel.sharp is not None:
            title += f"\n{psnr_of_arrays(panel.image, panel.sharp):.2f} dB"
        low, high = panel.limits or (None, None)
        axes.imshow(panel.image, cmap="magma", vmin=low, vmax=high)
        axes.set_title(title, fontsize=8)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    plt.close(figure)
    return encoded.getvalue()
