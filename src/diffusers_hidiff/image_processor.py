"""PIL, NumPy, tensor, path, URL <-> RGB in [0, 1]; pads to a multiple of 8 and crops back.

diffusers' `VaeImageProcessor` does not serve here: it resizes, drops 16-bit scaling and alpha, and lets values above one
wrap around.

H, W pixels · C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import load_image
from torch import Tensor

ImageInput: TypeAlias = str | Path | PIL.Image.Image | np.ndarray | Tensor
OutputType: TypeAlias = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's conversion to "L"
STRIP = 256  # rows
TOLERANCE = 1e-4  # what resampling in floating point may leave outside [0, 1]


@dataclass
class Picture:
    """One image as it was given, and as the networks see it.

    Args:
        array: [H, W, C], uint8, uint16, or float32 in [0, 1]. Integers stay integers: they take a quarter of the memory.
        bits: 8, 16 or 32 (floating point): depth of the image's channels.
    """

    array: np.ndarray
    bits: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width, _ = self.array.shape
        return height, width

    @property
    def channels(self) -> int:
        """1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha."""
        return int(self.array.shape[-1])

    @property
    def pixels(self) -> Tensor:
        """RGB, [3, H, W], float32 in [0, 1]."""
        return self.colour(slice(None))

    @property
    def alpha(self) -> Tensor | None:
        """Opacity, [1, H, W], float32 in [0, 1]; none where the image has none."""
        return self.opacity(slice(None))

    def colour(self, rows: slice) -> Tensor:
        """Some rows of `pixels`."""
        has_alpha = self.channels in (2, 4)
        return _unit_range(self.array[rows, :, : -1 if has_alpha else None]).expand(3, -1, -1)

    def opacity(self, rows: slice) -> Tensor | None:
        """Some rows of `alpha`."""
        return _unit_range(self.array[rows, :, -1:]) if self.channels in (2, 4) else None


def strips(height: int) -> Iterator[slice]:
    """Rows of an image, a few at a time: what is made of them on the way is then small."""
    return (slice(start, min(start + STRIP, height)) for start in range(0, height, STRIP))


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
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:  # otherwise it would only be copied
            image = PIL.ImageOps.exif_transpose(image)
        return [_picture(_array_of_pil(image))]
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3, 4):
            raise ValueError(f"`image` must be an array [H, W], [H, W, C] or [B, H, W, C], got shape {image.shape}.")
        batch = image[None, :, :, None] if image.ndim == 2 else image[None] if image.ndim == 3 else image
        return [_picture(single) for single in batch]
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4):
            raise ValueError(f"`image` must be a tensor [C, H, W] or [B, C, H, W], got shape {tuple(image.shape)}.")
        if image.dtype == torch.bfloat16:  # NumPy has none
            image = image.float()
        batch = image.detach().cpu().numpy()
        batch = batch[None] if batch.ndim == 3 else batch
        return [_picture(single.transpose(1, 2, 0)) for single in batch]
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


def _array_of_pil(image: PIL.Image.Image) -> np.ndarray:
    """[H, W, C], uint8, uint16 or floating point."""
    mode = image.mode
    if mode.startswith("I"):  # 16 bits, or 32 of which a PNG reader uses 16
        array = np.asarray(image.convert("I"))[..., None]
        _check_range(array / 65535)
        return array.astype(np.uint16)
    if mode == "F":
        return np.asarray(image)[..., None]
    has_alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    colour = "L" if mode in ("1", "L", "LA", "La") else "RGB"
    if mode == "La":
        image = image.convert("LA")
    wanted = colour + "A" if has_alpha else colour
    array = np.asarray(image if image.mode == wanted else image.convert(wanted))
    return array if array.ndim == 3 else array[..., None]


def _picture(array: np.ndarray) -> Picture:
    """Checks one image [H, W, C]."""
    if array.dtype in (np.uint8, np.uint16):
        bits = 8 * array.dtype.itemsize
    elif np.issubdtype(array.dtype, np.floating):
        bits = 32
        array = array.astype(np.float32)
        if array.size and not np.isfinite(array).all():
            raise ValueError("`image` must be finite, got NaN or infinity.")
        _check_range(array)
        array = array.clip(0, 1)
    else:
        raise TypeError(f"`image` must be of dtype uint8, uint16 or floating point, got {array.dtype}.")
    height, width, channels = array.shape
    if channels not in (1, 2, 3, 4):
        raise ValueError(
            "`image` must have 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels,"
            f" got {channels} in shape {array.shape} (height, width, channels)."
        )
    if not height or not width:
        raise ValueError(f"`image` must have at least one pixel, got {width}x{height}.")
    return Picture(array, bits)


def _check_range(array: np.ndarray) -> None:
    if array.size and (array.min() < -TOLERANCE or array.max() > 1 + TOLERANCE):
        raise ValueError(
            f"`image` must lie in [0, 1] (after scaling by the dtype's maximum), got {array.min():.4g} … {array.max():.4g}."
        )


def _unit_range(array: np.ndarray) -> Tensor:
    """[H, W, C] of a picture as float32 [C, H, W] in [0, 1]."""
    array = np.ascontiguousarray(array.transpose(2, 0, 1))
    if array.dtype != np.float32:
        array = array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    return torch.from_numpy(array)


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


def fill_padded(pixels: Tensor, picture: Picture) -> None:
    """Writes a picture to [3, H', W'], multiples of 8, as `pad_to_multiple` would make it; needs no memory beside that."""
    height, width = picture.size
    for strip in strips(height):
        pixels[:, strip, :width] = picture.colour(strip)
    across, down = reflected(width, 8), reflected(height, 8)
    pixels[:, :height, width:] = pixels[:, :height, across[width:]]
    pixels[:, height:] = pixels[:, down[height:]]


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
    sizes = [picture.size for picture in pictures]
    if output_type == "pil":
        return [
            to_pil(image[:, :height, :width], picture)
            for image, picture, (height, width) in zip(restored, pictures, sizes, strict=True)
        ]
    finished = [
        _finished(_clamped(image[:, :height, :width].float().cpu()), picture, slice(None))
        for image, picture, (height, width) in zip(restored, pictures, sizes, strict=True)
    ]
    stackable = len({tensor.shape for tensor in finished}) == 1
    single = len(finished) == 1  # needs no copy
    if output_type == "pt":
        return finished[0][None] if single else torch.stack(finished) if stackable else finished
    arrays = [tensor.permute(1, 2, 0).numpy() for tensor in finished]
    return arrays[0][None] if single else np.stack(arrays) if stackable else arrays


def _clamped(colour: Tensor) -> Tensor:
    """Without a copy if nothing has to be clamped."""
    low, high = torch.aminmax(colour)
    return colour if low >= 0 and high <= 1 else colour.clamp(0, 1)


def _finished(colour: Tensor, picture: Picture, rows: slice) -> Tensor:
    """Some rows of an image with their channels as in the picture, [3, H, W] -> [C, H, W]."""
    if picture.channels <= 2:
        colour = (colour * torch.tensor(LUMA)[:, None, None]).sum(dim=0, keepdim=True)
    alpha = picture.opacity(rows)
    return colour if alpha is None else torch.cat((colour, alpha))


def to_pil(image: Tensor, picture: Picture) -> PIL.Image.Image:
    """[3, H, W] as L, LA, RGB or RGBA; as I;16 where the picture is grey and has 16 bits.

    PIL has no mode for more than 8 bits of colour.
    """
    bits = 16 if picture.bits == 16 and picture.channels == 1 else 8
    array = np.empty(picture.array.shape, np.uint16 if bits == 16 else np.uint8)
    for rows in strips(len(array)):
        strip = _finished(image[:, rows].float().cpu().clamp(0, 1), picture, rows)
        array[rows] = to_integers(strip.permute(1, 2, 0).numpy(), bits)
    return PIL.Image.fromarray(array[..., 0] if picture.channels == 1 else array)


def to_integers(pixels: np.ndarray, bits: int) -> np.ndarray:
    """[H, W, C] in [0, 1] as uint8 or uint16."""
    integers = np.empty(pixels.shape, np.uint16 if bits == 16 else np.uint8)
    for rows in strips(len(pixels)):
        integers[rows] = (pixels[rows] * (2**bits - 1)).round()
    return integers
