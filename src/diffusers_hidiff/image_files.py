"""Image files <-> pixels and what goes with them: EXIF, colour profile, depth.

Pillow reads and writes what it can. It has no mode for 16 bits of colour, so those pixels are read and, in PNG, written
by OpenCV. What OpenCV writes has no room for EXIF and profile, so a TIFF is put together from Pillow's table of tags.

H, W pixels · C channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha
"""

import io
import os
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from PIL import PngImagePlugin, TiffImagePlugin, TiffTags

# What is looked for in a folder. A file given by name may be of any kind that Pillow reads.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")

# What is written, and as what.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}

# Tags of a TIFF that say how its pixels are stored, and its blocks that are no EXIF (XMP, IPTC, Photoshop, the profile):
# true of the file that was read, false of the one that is written.
STORAGE_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 280, 281, 284, 292, 293, 297, 317, 320),
    *(322, 323, 324, 325, 330, 338, 339, 340, 341, 347, 529, 530, 531, 532, 700, 33723, 34377, 34675),
}
ORIENTATION, EXTRA_SAMPLES, BITS_PER_SAMPLE = 274, 338, 258
PNG_HEADER_SIZE = 33  # signature and IHDR: other chunks may follow from here


class UnreadableImageError(ValueError):
    """A file that cannot be read as one image; the message says why and does not name the file."""


@dataclass
class ImageFile:
    """One image as it stood in its file.

    Args:
        image: What the pipeline takes, turned upright: a PIL image, or uint16 [H, W, C] where it has 16 bits of colour.
        bits: 8 or 16: depth of the image's channels.
        exif: Its EXIF, orientation set to upright.
        icc_profile: Its colour profile, where that fits grey or RGB.
    """

    image: PIL.Image.Image | np.ndarray
    bits: int = 8
    exif: bytes | None = None
    icc_profile: bytes | None = None


def read_image(file: str | Path) -> ImageFile:
    """Reads a still image.

    Raises:
        UnreadableImageError: The file cannot be opened, is no image, is damaged, too large, moving, or deeper than 16 bits.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise UnreadableImageError((error.strerror or str(error)).lower()) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of images that are large but not too large
            return _decode(data)
    except UnreadableImageError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise UnreadableImageError("not an image, or of an unknown kind") from error
    except PIL.Image.DecompressionBombError as error:
        raise UnreadableImageError(f"too large: {error}") from error
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise UnreadableImageError(f"damaged: {str(error) or type(error).__name__}") from error


def stored_size(file: str | Path) -> tuple[int, int]:
    """Width and height as the file's header has them, before it is turned upright; (0, 0) where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(file) as image:
                return image.size
    except Exception:  # as above; the reason is told when the image is read
        return 0, 0


def write_image(
    file: str | Path, pixels: np.ndarray, exif: bytes | None = None, icc_profile: bytes | None = None
) -> None:
    """Writes an image in the format that the suffix names: wholly, or not at all.

    PNG and TIFF keep what they are given, but for 16 bits of grey with alpha, which a PNG holds as RGBA. JPEG (quality 95,
    4:4:4) and WebP (quality 95) have 8 bits, and JPEG has no alpha: the image is laid over white.

    Args:
        file: Where to; its folder exists.
        pixels: uint8 or uint16, [H, W, C].
        exif: As `read_image` gives it.
        icc_profile: As `read_image` gives it; left out where it is for grey and the file is not.
    Raises:
        ValueError: The suffix is not in `FORMATS`, or the format cannot hold the image or its EXIF.
        OSError: The file cannot be written.
    """
    file = Path(file)
    file_format = FORMATS.get(file.suffix.lower())
    if file_format is None:
        raise ValueError(f"`file` must end in one of {' '.join(FORMATS)}, got {file.name!r}.")
    if pixels.dtype == np.uint16 and file_format in ("JPEG", "WEBP"):
        pixels = (pixels / 257).round().astype(np.uint8)
    if file_format == "JPEG":
        pixels = over_white(pixels)
    if pixels.dtype == np.uint16 and file_format == "PNG" and pixels.shape[-1] == 2:
        pixels = pixels[..., [0, 0, 0, 1]]
    is_grey = pixels.shape[-1] <= 2 and file_format != "WEBP"  # which has no grey
    if icc_profile is not None and icc_profile[16:20] == b"GRAY" and not is_grey:
        icc_profile = None
    write_whole(file, _encode(pixels, file_format, exif, icc_profile))


def over_white(pixels: np.ndarray) -> np.ndarray:
    """An image without its alpha, laid over white: [H, W, C] of any dtype in, one or three channels of it out."""
    channels = pixels.shape[-1]
    if channels not in (2, 4):
        return pixels
    white = 1 if np.issubdtype(pixels.dtype, np.floating) else np.iinfo(pixels.dtype).max
    colour, opacity = pixels[..., :-1].astype(np.float32), pixels[..., -1:].astype(np.float32) / white
    blended = colour * opacity + white * (1 - opacity)
    return (blended if white == 1 else blended.round()).astype(pixels.dtype)


def _decode(data: bytes) -> ImageFile:
    with PIL.Image.open(io.BytesIO(data)) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a phone's JPEG with its previews behind it
            raise UnreadableImageError(f"holds {frames} images; only a single still image can be restored")
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise UnreadableImageError("has 32 bits a channel; only 8 and 16 can be restored")
        image.load()
        orientation = image.getexif().get(ORIENTATION, 1)  # Pillow turns a TIFF on loading and forgets the tag
        upright = image if orientation == 1 else PIL.ImageOps.exif_transpose(image)  # which would make a copy
        exif, icc_profile = _exif(image), image.info.get("icc_profile")
        if icc_profile is not None and icc_profile[16:20] not in (b"RGB ", b"GRAY"):
            icc_profile = None  # CMYK and Lab become RGB
        if image.mode in ("RGB", "RGBA") and _bits(image, data) == 16:
            pixels = _upright(_read_16_bits_of_colour(data, image), orientation)
            return ImageFile(pixels, 16, exif, icc_profile)
        bits = 16 if image.mode.startswith("I") else 8
        return ImageFile(upright, bits, exif, icc_profile)


def _exif(image: PIL.Image.Image) -> bytes | None:
    """EXIF that says upright. It changes what `image` says of itself, so the image is turned before."""
    exif = image.getexif()
    for tag in STORAGE_TAGS & set(exif):
        del exif[tag]
    if ORIENTATION in exif:
        exif[ORIENTATION] = 1
    if not len(exif):
        return None
    try:
        return exif.tobytes()
    except Exception:  # damaged EXIF is no reason to leave the image blurry
        return None


def _bits(image: PIL.Image.Image, data: bytes) -> int:
    """Bits of a channel as the file has them; a mode of Pillow does not tell."""
    if image.format == "PNG":
        return data[24]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    return 8


def _read_16_bits_of_colour(data: bytes, image: PIL.Image.Image) -> np.ndarray:
    """uint16 [H, W, C]; a TIFF is already turned upright, a PNG is not."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(EXTRA_SAMPLES) == (1,):
        raise UnreadableImageError("has 16 bits and premultiplied alpha; store it with plain alpha")
    cv2 = _opencv()
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise UnreadableImageError("OpenCV cannot read its 16 bits of colour")
    if image.format == "PNG" and data[25] == 4:  # grey and alpha
        return pixels[..., [0, 3]]
    has_alpha = image.mode == "RGBA" or "transparency" in image.info
    return pixels[..., [2, 1, 0, 3] if has_alpha else [2, 1, 0]]  # OpenCV has blue first


def _opencv() -> Any:
    """OpenCV, imported only where it is needed."""
    try:
        import cv2  # noqa: PLC0415
    except ImportError as error:
        raise UnreadableImageError(
            "16 bits of colour need OpenCV; install it with `pip install opencv-python-headless`"
        ) from error
    return cv2


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns [H, W, C] as the EXIF orientation, 1 to 8, asks."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _encode(pixels: np.ndarray, file_format: str, exif: bytes | None, icc_profile: bytes | None) -> bytes:
    channels = pixels.shape[-1]
    if file_format == "TIFF":
        return _tiff(pixels, exif, icc_profile)
    if pixels.dtype == np.uint16 and channels > 1:
        return _png_of_16_bits_of_colour(pixels, exif, icc_profile)
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))
    options: dict[str, dict[str, Any]] = {
        "PNG": {},
        "JPEG": {"quality": 95, "subsampling": "4:4:4"},
        "WEBP": {"quality": 95},
    }
    metadata = {"exif": exif, "icc_profile": icc_profile}
    encoded = io.BytesIO()
    image.save(encoded, file_format, **options[file_format], **{key: value for key, value in metadata.items() if value})
    return encoded.getvalue()


def _png_of_16_bits_of_colour(pixels: np.ndarray, exif: bytes | None, icc_profile: bytes | None) -> bytes:
    """As OpenCV writes it, with profile and EXIF put in behind the header."""
    blue_first = [2, 1, 0, 3][: pixels.shape[-1]]
    encoded = _opencv().imencode(".png", np.ascontiguousarray(pixels[..., blue_first]))[1].tobytes()
    chunks = io.BytesIO()
    if icc_profile is not None:
        PngImagePlugin.putchunk(chunks, b"iCCP", b"ICC Profile\0\0", zlib.compress(icc_profile))
    if exif is not None:
        PngImagePlugin.putchunk(chunks, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    return encoded[:PNG_HEADER_SIZE] + chunks.getvalue() + encoded[PNG_HEADER_SIZE:]


def _tiff(pixels: np.ndarray, exif: bytes | None, icc_profile: bytes | None) -> bytes:
    """Of any number of channels and bits: deflated, each pixel as its difference to the one on its left."""
    height, width, channels = pixels.shape
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if exif is not None:
        given = PIL.Image.Exif()
        given.load(exif)
        for tag in given:
            tags[tag] = _without_offsets(given.get_ifd(tag)) if tag in TiffTags.TAGS_V2_GROUPS else given[tag]
    if icc_profile is not None:
        tags[TiffImagePlugin.ICCPROFILE] = icc_profile

    differences = np.diff(pixels, axis=1, prepend=np.zeros_like(pixels[:, :1]))  # wraps around, as it should
    strip = zlib.compress(differences.astype(pixels.dtype.newbyteorder("<")).tobytes())
    tags[TiffImagePlugin.IMAGEWIDTH] = width
    tags[TiffImagePlugin.IMAGELENGTH] = height
    tags[BITS_PER_SAMPLE] = (8 * pixels.dtype.itemsize,) * channels
    tags[TiffImagePlugin.COMPRESSION] = 8  # deflate
    tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 1 if channels <= 2 else 2  # black is zero, or RGB
    tags[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    tags[TiffImagePlugin.ROWSPERSTRIP] = height
    tags[TiffImagePlugin.PLANAR_CONFIGURATION] = 1  # channels beside each other
    tags[TiffImagePlugin.PREDICTOR] = 2  # horizontal difference
    if channels in (2, 4):
        tags[EXTRA_SAMPLES] = 2  # alpha, not multiplied into the colour
    tags[TiffImagePlugin.STRIPOFFSETS] = 0  # counted from the end of the tags
    tags.tagtype[TiffImagePlugin.STRIPBYTECOUNTS] = TiffTags.LONG
    tags[TiffImagePlugin.STRIPBYTECOUNTS] = len(strip)
    encoded = io.BytesIO()
    tags.save(encoded)
    return encoded.getvalue() + strip


def _without_offsets(tags: dict[int, Any]) -> dict[int, Any]:
    """A group of EXIF tags but for its pointer to another group, which would point nowhere."""
    return {tag: value for tag, value in tags.items() if tag != PIL.ExifTags.IFD.Interop}


def write_whole(file: Path, encoded: bytes) -> None:
    """Writes beside `file` and renames: whoever looks sees the old file, the new one, or none."""
    temporary = file.with_name(f".hidiff-{uuid4().hex}.part")  # other threads and machines may write here, too
    try:
        temporary.write_bytes(encoded)
        os.replace(temporary, file)
    except BaseException:  # Ctrl-C, too
        temporary.unlink(missing_ok=True)
        raise
