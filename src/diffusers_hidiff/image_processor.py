"""PIL, NumPy, tensor, path, URL <-> RGB in [0, 1]; pads to a multiple of 8 and crops back.

diffusers' `VaeImageProcessor` does not serve here: it resizes, drops 16-bit scaling and alpha, and lets values above one
wrap around.

H, W pixels · C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import load_image
from torch import Tensor

ImageInput: TypeAlias = str | Path | PIL.Image.Image | np.ndarray | Tensor
OutputType: TypeAlias = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's conversion to "L"
TOLERANCE = 1e-4  # what resampling in floating point may leave outside [0, 1]


@dataclass
class Picture:
    """One image as the networks see it, with what has to be put back afterwards.

    Args:
        pixels: RGB, [3, H, W], float32 in [0, 1].
        alpha: Opacity, [1, H, W], float32 in [0, 1]; none where the image had none.
        grey: Whether the image had a single channel of colour.
        bits: 8, 16 or 32 (floating point): depth of the image's channels.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    grey: bool = False
    bits: int = 8


def preprocess(images: ImageInput | Sequence[ImageInput]) -> list[Picture]:
    """Reads whatever holds an image.

    Args:
        images: A path, URL, PIL image (any mode; EXIF orientation is applied), NumPy array [H, W], [H, W, C] or
            [B, H, W, C] (uint8, uint16 or floating point in [0, 1]), tensor [C, H, W] or [B, C, H, W] (uint8 or floating
            point in [0, 1]), or a list of those, of any sizes.
    Raises:
        TypeError: Something is none of those.
        ValueError: An image cannot be read, is empty, out of range, not finite, or has other than 1 to 4 channels.
    """
    if isinstance(images, str | Path | PIL.Image.Image | np.ndarray | Tensor):
        images = [images]
    if not isinstance(images, Sequence):
        raise TypeError(
            "`image` must be a path, a URL, a PIL image, a NumPy array, a tensor, or a list of those,"
            f" got {type(images).__name__}."
        )
    pictures = [picture for image in images for picture in _pictures(image)]
    if not pictures:
        raise ValueError("`image` must hold at least one image, got none.")
    return pictures


def _pictures(image: ImageInput) -> list[Picture]:
    """An array or tensor may hold a batch; everything else is one picture."""
    if isinstance(image, str | Path):
        image = _fetched(str(image))
    if isinstance(image, PIL.Image.Image):
        return [_from_channels_last(*_array_of_pil(PIL.ImageOps.exif_transpose(image)))]
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3, 4):
            raise ValueError(f"`image` must be an array [H, W], [H, W, C] or [B, H, W, C], got shape {image.shape}.")
        batch = image[None, :, :, None] if image.ndim == 2 else image[None] if image.ndim == 3 else image
        return [_from_channels_last(*_unit_range(single)) for single in batch]
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4):
            raise ValueError(f"`image` must be a tensor [C, H, W] or [B, C, H, W], got shape {tuple(image.shape)}.")
        if image.dtype == torch.bfloat16:  # NumPy has none
            image = image.float()
        batch = image.detach().cpu().numpy()
        batch = batch[None] if batch.ndim == 3 else batch
        return [_from_channels_last(*_unit_range(single.transpose(1, 2, 0))) for single in batch]
    raise TypeError(
        f"`image` must be a path, a URL, a PIL image, a NumPy array or a tensor, got {type(image).__name__} in the list."
    )


def _fetched(address: str) -> PIL.Image.Image:
    """The image of a file or a URL, decoded, upright and in the mode that it has there."""
    try:
        image: PIL.Image.Image = load_image(address, convert_method=lambda loaded: loaded)
        image.load()
    except Exception as error:  # of the network, of the file, of whatever decoder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"`image` must be the path or URL of a readable image, got {address!r}: {reason}") from error
    return image


def _array_of_pil(image: PIL.Image.Image) -> tuple[np.ndarray, int]:
    """[H, W, C] in [0, 1] and the bits of a channel."""
    mode = image.mode
    if mode.startswith("I"):  # 16 bits, or 32 of which a PNG reader uses 16
        return _unit_range(np.asarray(image.convert("I"))[..., None], integer_maximum=65535)
    if mode == "F":
        return _unit_range(np.asarray(image)[..., None])
    has_alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    colour = "L" if mode in ("1", "L", "LA", "La") else "RGB"
    if mode == "La":
        image = image.convert("LA")
    array = np.asarray(image.convert(colour + "A" if has_alpha else colour))
    return _unit_range(array if array.ndim == 3 else array[..., None])


def _unit_range(array: np.ndarray, integer_maximum: int | None = None) -> tuple[np.ndarray, int]:
    """Scales one image [H, W, C] to [0, 1] by its dtype's largest value; tells the bits of a channel."""
    if array.dtype in (np.uint8, np.uint16) or integer_maximum is not None:
        maximum = integer_maximum or np.iinfo(array.dtype).max
        array, bits = array.astype(np.float32) / np.float32(maximum), 8 if maximum == 255 else 16
    elif np.issubdtype(array.dtype, np.floating):
        array, bits = array.astype(np.float32), 32
    else:
        raise TypeError(f"`image` must be of dtype uint8, uint16 or floating point, got {array.dtype}.")
    if array.size and not np.isfinite(array).all():
        raise ValueError("`image` must be finite, got NaN or infinity.")
    if array.size and (array.min() < -TOLERANCE or array.max() > 1 + TOLERANCE):
        raise ValueError(
            f"`image` must lie in [0, 1] (after scaling by the dtype's maximum), got {array.min():.4g} … {array.max():.4g}."
        )
    return array.clip(0, 1), bits


def _from_channels_last(array: np.ndarray, bits: int) -> Picture:
    height, width, channels = array.shape
    if channels not in (1, 2, 3, 4):
        raise ValueError(
            "`image` must have 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels,"
            f" got {channels} in shape {array.shape} (height, width, channels)."
        )
    if not height or not width:
        raise ValueError(f"`image` must have at least one pixel, got {width}x{height}.")
    tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    grey, has_alpha = channels <= 2, channels in (2, 4)
    colour, alpha = (tensor[:-1], tensor[-1:]) if has_alpha else (tensor, None)
    return Picture(colour.expand(3, -1, -1), alpha, grey, bits)


def reflected(size: int, multiple: int) -> Tensor:
    """Which of `size` pixels stands at each place once they are continued by reflection to a multiple.

    Reflection goes back and forth where the side is shorter than what is to be added; a single pixel is repeated.
    """
    index = torch.arange(size + -size % multiple)
    if size == 1:
        return torch.zeros_like(index)
    index = index % (2 * (size - 1))
    return torch.minimum(index, 2 * (size - 1) - index)


def pad_to_multiple(pixels: Tensor, multiple: int = 8) -> Tensor:
    """Continues [..., H, W] by reflection, right and below, until both sides are multiples of `multiple`."""
    height, width = pixels.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return pixels
    rows, columns = (reflected(size, multiple).to(pixels.device) for size in (height, width))
    return pixels[..., rows[:, None], columns]


def postprocess(
    restored: Sequence[Tensor], pictures: Sequence[Picture], output_type: OutputType
) -> list[PIL.Image.Image] | np.ndarray | list[np.ndarray] | Tensor | list[Tensor]:
    """Crops, clamps, puts grey and alpha back, and converts.

    Args:
        restored: One a picture, [3, H', W'], padded.
        pictures: What `preprocess` returned.
        output_type: "pil" (8 bits; grey of 16 bits stays 16), "np" (float32 [B, H, W, C]) or "pt" (float32 [B, C, H, W]).
    Returns:
        A list of PIL images; or one array or tensor, a list of them where sizes or channels differ.
    """
    finished = []
    for image, picture in zip(restored, pictures, strict=True):
        height, width = picture.pixels.shape[-2:]
        tensor = image[:, :height, :width].float().cpu().clamp(0, 1)
        if picture.grey:
            tensor = (tensor * torch.tensor(LUMA)[:, None, None]).sum(dim=0, keepdim=True)
        if picture.alpha is not None:
            tensor = torch.cat((tensor, picture.alpha))
        finished.append(tensor)
    if output_type == "pil":
        return [to_pil(tensor, picture.bits) for tensor, picture in zip(finished, pictures, strict=True)]
    stackable = len({tensor.shape for tensor in finished}) == 1
    if output_type == "pt":
        return torch.stack(finished) if stackable else finished
    arrays = [tensor.permute(1, 2, 0).numpy() for tensor in finished]
    return np.stack(arrays) if stackable else arrays


def to_pil(tensor: Tensor, bits: int = 8) -> PIL.Image.Image:
    """[C, H, W] in [0, 1] as L, LA, RGB or RGBA; as I;16 where it is grey and had 16 bits.

    PIL has no mode for more than 8 bits of colour.
    """
    if len(tensor) == 1 and bits == 16:
        return PIL.Image.fromarray((tensor[0] * 65535).round().numpy().astype(np.uint16))
    array = (tensor * 255).round().byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
