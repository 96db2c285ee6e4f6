"""A contact sheet of what training will see: the first patches of every phase, blurry beside sharp.

    python scripts/preview_data.py --sheet sheet.png --config training/configs/small_stage1.yaml --train_data_dir PHOTOS

Takes the options of both training scripts, so that the same command with another name shows exactly the samples of that run.
Under each pair: its number, where it comes from, and the PSNR of blurry against sharp.
"""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from config import Stage1Config, Stage2Config, TrainingConfig, parse_config
from data import TrainingData
from diffusers_hidiff.image_files import write_image
from diffusers_hidiff.metrics.psnr import psnr

MARGIN, LABEL_HEIGHT = 6, 16


@dataclass
class PreviewConfig(Stage1Config, Stage2Config):
    """What either stage takes, and where the sheet goes; what does not concern the data is not looked at.

    Args:
        sheet: PNG to write.
        num_pairs: How many pairs of each phase it shows.
        num_columns: Pairs beside each other.
        first_pair: Number of the first pair of a phase that is shown.
    """

    output_dir: str = ""
    sheet: str = "sheet.png"
    num_pairs: int = 24
    num_columns: int = 4
    first_pair: int = 0

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)  # and not those of the stages, which look for networks
        for name in ("num_pairs", "num_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.first_pair < 0:
            raise ValueError(f"`first_pair` must not be negative, got {self.first_pair}.")


@dataclass(frozen=True)
class Example:
    """A pair with its label."""

    blurry: np.ndarray
    sharp: np.ndarray
    label: str


def examples_of(config: PreviewConfig) -> list[list[Example]]:
    """The pairs of each phase.

    Raises:
        ValueError: There is no data where the options say.
    """
    data = TrainingData(config)
    found = []
    for phase in tqdm(data.phases, desc="phase"):
        steps, rest = divmod(config.first_pair, phase.global_batch_size)
        if steps >= phase.num_steps:
            continue
        samples = (
            (batch["blurry"][i], batch["sharp"][i], int(batch["index"][i]))
            for batch in data.batches(phase, phase.first_step + steps)
            for i in range(len(batch["index"]))
        )
        wanted = islice(samples, rest, rest + config.num_pairs)
        found.append([example(*sample, data.source(sample[2])) for sample in wanted])
    return found


def example(blurry: Tensor, sharp: Tensor, index: int, source: str) -> Example:
    """A sample, [3, H, W] in [0, 1] each, as pictures."""
    decibels = psnr(blurry[None], sharp[None]).item()
    pictures = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in (blurry, sharp)]
    return Example(pictures[0], pictures[1], f"{index}: {decibels:.1f} dB {Path(source).name}")


def draw_sheet(phases: list[list[Example]], num_columns: int) -> np.ndarray:
    """A grid of the pairs of each phase, uint8 [H, W, 3]."""
    grids = [draw_grid(examples, num_columns) for examples in phases]
    width = max(grid.shape[1] for grid in grids)
    padded = [np.pad(grid, ((0, 0), (0, width - grid.shape[1]), (0, 0)), constant_values=255) for grid in grids]
    return np.concatenate(padded)


def draw_grid(examples: list[Example], num_columns: int) -> np.ndarray:
    """The pairs of one phase, row by row, uint8 [H, W, 3]."""
    size = examples[0].blurry.shape[0]
    cell_height, cell_width = size + LABEL_HEIGHT + MARGIN, 2 * size + 2 + MARGIN
    num_columns = min(num_columns, len(examples))
    num_rows = -(-len(examples) // num_columns)
    sheet = PIL.Image.new("RGB", (num_columns * cell_width + MARGIN, num_rows * cell_height + MARGIN), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, shown in enumerate(examples):
        top = MARGIN + number // num_columns * cell_height
        left = MARGIN + number % num_columns * cell_width
        for offset, picture in ((0, shown.blurry), (size + 2, shown.sharp)):
            sheet.paste(PIL.Image.fromarray(picture), (left + offset, top))
        draw.text((left, top + size + 2), shortened(shown.label, 2 * size, draw), fill="black")
    return np.asarray(sheet)


def shortened(label: str, width: int, draw: PIL.ImageDraw.ImageDraw) -> str:
    """As much of a label as fits, with an ellipsis where something is missing."""
    if draw.textlength(label) <= width:
        return label
    while label and draw.textlength(label + "...") > width:
        label = label[:-1]
    return label + "..."


def main(arguments: list[str] | None = None) -> int:
    try:
        config = parse_config(PreviewConfig, arguments)
        if Path(config.sheet).suffix.lower() != ".png":
            raise ValueError(f"`sheet` must end in .png, got {config.sheet!r}.")
        phases = examples_of(config)
        if not phases:
            raise ValueError(f"`first_pair` must lie within a phase, got {config.first_pair}.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(config.sheet).parent.mkdir(parents=True, exist_ok=True)
    write_image(config.sheet, draw_sheet(phases, config.num_columns))
    print(f"{sum(map(len, phases))} pairs in {config.sheet}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
