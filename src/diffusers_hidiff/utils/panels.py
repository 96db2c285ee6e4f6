"""Pictures in a grid, large enough to be read where a page shows them 800 pixels wide.

H, W pixels
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI, BAR = 11.0, 150, 0.06  # inches, pixels per inch, of a colour bar against a picture
TITLE_SIZE, TEXT_SIZE = 14, 12  # points: half of it where 1650 pixels are shown as 800
JPEG = {"quality": 90, "subsampling": 0, "optimize": True}


@dataclass(frozen=True)
class Panel:
    """A picture of the grid.

    Args:
        title: Above it.
        image: uint8 [H, W, 3], or a map [H, W] of any range.
        limits: Darkest and brightest value of a map.
        unit: What a map shows, for the colour bar.
        colours: Of a map, as Matplotlib calls them.
    """

    title: str
    image: np.ndarray
    limits: tuple[float, float] | None = None
    unit: str = ""
    colours: str = "inferno"

    @property
    def is_map(self) -> bool:
        return self.image.ndim == 2


def sheet(rows: Sequence[Sequence[Panel]], heading: str, side_titles: Sequence[str] = ()) -> "Figure":
    """Rows of panels, with a colour bar at the end of each row that has a map.

    Args:
        rows: Of the same length, the pictures of a row of the same shape.
        heading: A sentence above all, that says what is to be seen.
        side_titles: Left of each row.
    """
    has_bar = any(panel.is_map for row in rows for panel in row)
    widths = [1.0] * len(rows[0]) + [BAR] * has_bar
    shapes = [row[0].image.shape[:2] for row in rows]
    heights = [WIDTH / sum(widths) * min(2.0, max(0.2, height / width)) for height, width in shapes]
    lines = max(panel.title.count("\n") + 1 for row in rows for panel in row)
    figure = empty_figure(heading, sum(heights) + 0.28 * lines * len(rows))
    ratios = {"width_ratios": widths, "height_ratios": heights}
    grid = figure.subplots(len(rows), len(widths), squeeze=False, gridspec_kw=ratios)
    for i, (axes, row) in enumerate(zip(grid, rows, strict=True)):
        maps = [(axis, panel) for axis, panel in zip(axes, row, strict=False) if panel.is_map]
        for axis, panel in zip(axes, row, strict=False):
            draw(axis, panel)
        if side_titles:
            axes[0].set_ylabel(side_titles[i], fontsize=TEXT_SIZE)
        if has_bar and maps:
            bar = figure.colorbar(maps[-1][0].images[0], cax=axes[-1])
            bar.set_label(maps[-1][1].unit, fontsize=TEXT_SIZE)
            bar.ax.tick_params(labelsize=TEXT_SIZE)
        elif has_bar:
            axes[-1].set_axis_off()
    return figure


def empty_figure(heading: str, height: float) -> "Figure":
    """A figure of the usual width with a sentence on top.

    Args:
        heading: The sentence.
        height: Of what comes below it, in inches.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    lines = heading.count("\n") + 1
    figure = Figure(figsize=(WIDTH, height + 0.1 + 0.27 * lines), dpi=DPI, layout="constrained")
    figure.suptitle(heading, fontsize=TITLE_SIZE)
    return figure


def draw(axis: "Axes", panel: Panel) -> None:
    """One panel, without ticks."""
    low, high = panel.limits or (None, None)
    axis.imshow(panel.image, cmap=panel.colours, vmin=low, vmax=high)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(panel.title, fontsize=TEXT_SIZE)


def encoded(figure: "Figure", suffix: str) -> bytes:
    """The figure as a file.

    Args:
        figure: Any figure of Matplotlib.
        suffix: ".png", or ".jpg" for photographs, which is several times smaller.
    """
    stream, is_jpeg = io.BytesIO(), suffix.lower() in (".jpg", ".jpeg")
    figure.savefig(stream, format="jpeg" if is_jpeg else "png", pil_kwargs=JPEG if is_jpeg else {})
    return stream.getvalue()
