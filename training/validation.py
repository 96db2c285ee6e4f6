"""Whole images through the networks as they will be used: PSNR, SSIM and sample pictures."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_hidiff.data.paired_images import paired_files, read_rgb
from diffusers_hidiff.metrics.psnr import psnr_of_arrays
from diffusers_hidiff.metrics.ssim import volumetric_ssim
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
    def scores(self, objective: Objective, step: int, shared: bool = True) -> dict[str, float]:
        """Means over the pairs, on 8-bit images; the same numbers in every process.

        Args:
            objective: Its networks are judged.
            step: Names the pictures.
            shared: Whether every process has the weights; if not, the first does all the work.
        Returns:
            `validation_psnr` in dB and `validation_ssim`, that of GoPro's protocol (metrics/ssim.py), whatever the data: one
            number to watch. `hidiff evaluate` follows the protocol of each data set.
        """
        total = torch.zeros(3)  # PSNR, SSIM, number
        step_size = self.accelerator.num_processes if shared else 1
        first = self.accelerator.process_index
        for number in range(first, len(self.pairs) if shared or first == 0 else 0, step_size):
            blurry, sharp = (read_rgb(file) for file in self.pairs[number])
            pixels = (to_pixels(image, self.accelerator.device) for image in (blurry, sharp))
            restored = (objective.restore(*pixels)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            total += torch.tensor([psnr_of_arrays(restored, sharp), volumetric_ssim(restored, sharp), 1.0])
            if number < self.num_pictures:
                self.write_picture(number, step, np.concatenate([blurry, restored, sharp], axis=1))
        psnr, ssim, number = self.accelerator.reduce(total.to(self.accelerator.device), "sum").tolist()
        return {"validation_psnr": psnr / number, "validation_ssim": ssim / number}

    def write_picture(self, number: int, step: int, picture: np.ndarray) -> None:
        folder = self.pictures_dir / f"{number}_{self.pairs[number][0].stem}"
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / f"{step:07}.png")
