"""Whole images through the networks as they will be used: PSNR and sample pictures."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_hidiff.data.paired_images import paired_files, read_rgb
from diffusers_hidiff.metrics.psnr import psnr
from objective import Objective


def to_pixels(image: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [H, W, 3] to RGB in [0, 1], [1, 3, H, W]."""
    return torch.tensor(image, device=device).permute(2, 0, 1)[None].float() / 255


class Validation:
    """The validation pairs of a run.

    Args:
        accelerator: The processes share the pairs out.
        folder: Pairs, as `paired_files` takes them.
        max_samples: How many of them are used.
        pictures_dir: Where the sample pictures go: blurry, restored and sharp side by side.
    """

    num_pictures = 4

    def __init__(self, accelerator: Accelerator, folder: str, max_samples: int, pictures_dir: Path) -> None:
        self.accelerator = accelerator
        self.pairs = paired_files(folder)[:max_samples]
        self.pictures_dir = pictures_dir

    @torch.no_grad()
    def psnr(self, objective: Objective, step: int, shared: bool = True) -> float:
        """Mean PSNR in dB over the pairs, on 8-bit images; the same number in every process.

        Args:
            objective: Its networks are judged.
            step: Names the pictures.
            shared: Whether every process has the weights; if not, the first does all the work.
        """
        total = torch.zeros(2, dtype=torch.float64)  # sum, number
        step_size = self.accelerator.num_processes if shared else 1
        first = self.accelerator.process_index
        for number in range(first, len(self.pairs) if shared or first == 0 else 0, step_size):
            images = [read_rgb(file) for file in self.pairs[number]]
            blurry, sharp = (to_pixels(image, self.accelerator.device) for image in images)
            restored = (objective.restore(blurry, sharp).clamp(0, 1) * 255).round()
            total += torch.stack([psnr(restored / 255, sharp).cpu()[0], torch.tensor(1.0)])
            if number < self.num_pictures:
                array = restored[0].permute(1, 2, 0).byte().cpu().numpy()
                self.write_picture(number, step, np.concatenate([images[0], array, images[1]], axis=1))
        total = self.accelerator.reduce(total.float().to(self.accelerator.device), "sum")
        return (total[0] / total[1]).item()

    def write_picture(self, number: int, step: int, picture: np.ndarray) -> None:
        folder = self.pictures_dir / f"{number}_{self.pairs[number][0].stem}"
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / f"{step:07}.png")
