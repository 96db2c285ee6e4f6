"""Pairs of images with the figures that the published evaluation code gives them, and images to be scored."""

import json
from pathlib import Path

import numpy as np
import PIL.Image

from diffusers_hidiff.data.paired_images import read_rgb

GOLDEN = Path(__file__).parent / "golden" / "metrics"
FIGURES = json.loads((GOLDEN / "metrics.json").read_text())


def golden_pair(name):
    """Restored and sharp image, uint8 [H, W, 3]."""
    return read_rgb(GOLDEN / f"{name}_restored.png"), read_rgb(GOLDEN / f"{name}_sharp.png")


def noise(height=16, width=24, seed=0):
    """A random image, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(file, pixels):
    """Writes an image, with its folders."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(file)
    return file


def write_pairs(folder, count, height=16, width=24):
    """`folder`/blurry and sharp, with images named 00, 01 and so on."""
    for i in range(count):
        write(folder / "blurry" / f"{i:02d}.png", noise(height, width, 2 * i))
        write(folder / "sharp" / f"{i:02d}.png", noise(height, width, 2 * i + 1))
    return folder
