import io
import resource
import struct
import sys
import zlib

import cv2
import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.JpegImagePlugin
import pytest
from PIL.PngImagePlugin import putchunk

from diffusers_hidiff import image_files
from diffusers_hidiff.image_files import UnreadableImageError, over_white, read_image, write_image

RNG = np.random.default_rng(0)
SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
MAKE, ORIENTATION, EXIF_GROUP, EXPOSURE_TIME, GPS_GROUP = 271, 274, 0x8769, 0x829A, 0x8825


def noise(channels, dtype=np.uint8, height=13, width=21):
    return RNG.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype=dtype, endpoint=True)


def camera_exif(orientation):
    exif = PIL.Image.Exif()
    exif[MAKE] = "Maker"
    exif[ORIENTATION] = orientation
    exif.get_ifd(EXIF_GROUP)[EXPOSURE_TIME] = (1, 30)
    exif.get_ifd(GPS_GROUP)[1] = "N"
    return exif.tobytes()


def pixels_of(file):
    """The pixels as they stand in the file, [H, W, C]."""
    image = read_image(file).image
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def png_of_grey_with_alpha(pixels):
    """16 bits a channel, which neither Pillow nor OpenCV writes."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)  # each row begins with its filter: none
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(8)
    putchunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0))
    putchunk(file, b"IDAT", zlib.compress(rows))
    putchunk(file, b"IEND")
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(1, np.uint8), (2, np.uint8), (3, np.uint8), (4, np.uint8), (1, np.uint16), (3, np.uint16), (4, np.uint16)],
)
def test_png_and_tiff_keep_every_bit(tmp_path, suffix, channels, dtype):
    pixels = noise(channels, dtype)
    write_image(tmp_path / f"a{suffix}", pixels)
    read = pixels_of(tmp_path / f"a{suffix}")
    assert read.dtype == dtype
    assert np.array_equal(read, pixels)


def test_16_bits_of_grey_with_alpha_are_stored_as_colour(tmp_path):
    pixels = noise(2, np.uint16)
    write_image(tmp_path / "a.png", pixels)
    assert np.array_equal(pixels_of(tmp_path / "a.png"), pixels[..., [0, 0, 0, 1]])


def test_16_bits_of_grey_with_alpha_are_read_as_grey(tmp_path):
    pixels = noise(2, np.uint16)
    (tmp_path / "a.png").write_bytes(png_of_grey_with_alpha(pixels))
    assert np.array_equal(pixels_of(tmp_path / "a.png"), pixels)


# OpenCV multiplies 8 bits of colour by their alpha, so that case is left to Pillow.
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (1, np.uint16), (3, np.uint16), (4, np.uint16)]
)
def test_another_library_reads_the_same_from_a_tiff(tmp_path, dtype, channels):
    pixels = noise(channels, dtype)
    write_image(tmp_path / "a.tiff", pixels, camera_exif(1), SRGB)
    read = cv2.imread(str(tmp_path / "a.tiff"), cv2.IMREAD_UNCHANGED)
    read = read[..., None] if channels == 1 else read[..., [2, 1, 0, 3][:channels]]
    assert np.array_equal(read, pixels)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_colour_are_read_as_another_library_wrote_them(tmp_path, suffix, channels):
    pixels = noise(channels, np.uint16)
    cv2.imwrite(str(tmp_path / f"a{suffix}"), pixels[..., [2, 1, 0, 3][:channels]])
    read = read_image(tmp_path / f"a{suffix}")
    assert read.bits == 16
    assert np.array_equal(read.image, pixels)


def test_16_bits_of_grey_are_known_as_such(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), noise(1, np.uint16))
    assert read_image(tmp_path / "a.png").bits == 16


@pytest.mark.parametrize(
    ("suffix", "channels", "dtype"),
    [
        (".jpg", 3, np.uint8),
        (".jpg", 1, np.uint8),
        (".webp", 4, np.uint8),
        (".png", 3, np.uint8),
        (".png", 1, np.uint16),
        (".png", 4, np.uint16),
        (".tiff", 3, np.uint8),
        (".tiff", 4, np.uint16),
    ],
)
def test_exif_and_profile_come_back(tmp_path, suffix, channels, dtype):
    write_image(tmp_path / f"a{suffix}", noise(channels, dtype), camera_exif(1), SRGB)
    read = read_image(tmp_path / f"a{suffix}")
    exif = PIL.Image.Exif()
    exif.load(read.exif)
    assert exif[MAKE] == "Maker"
    assert exif.get_ifd(EXIF_GROUP)[EXPOSURE_TIME] == (1, 30)
    assert exif.get_ifd(GPS_GROUP)[1] == "N"
    assert set(exif) == {MAKE, ORIENTATION, EXIF_GROUP, GPS_GROUP}
    assert read.icc_profile == SRGB


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bits_of_colour_are_turned_as_8_bits_are(tmp_path, suffix, orientation):
    pixels = noise(3, np.uint16)
    write_image(tmp_path / f"deep{suffix}", pixels, camera_exif(orientation))
    write_image(tmp_path / f"flat{suffix}", (pixels >> 8).astype(np.uint8), camera_exif(orientation))
    deep, flat = read_image(tmp_path / f"deep{suffix}"), read_image(tmp_path / f"flat{suffix}")
    assert np.array_equal(deep.image >> 8, np.asarray(flat.image))
    assert deep.image.shape[:2] == ((21, 13) if orientation > 4 else (13, 21))
    for read in (deep, flat):
        exif = PIL.Image.Exif()
        exif.load(read.exif)
        assert exif.get(ORIENTATION, 1) == 1


def test_a_profile_for_ink_is_left_out(tmp_path):
    ink = SRGB[:16] + b"CMYK" + SRGB[20:]
    PIL.Image.new("CMYK", (9, 9)).save(tmp_path / "a.jpg", icc_profile=ink)
    assert read_image(tmp_path / "a.jpg").icc_profile is None


def test_a_profile_for_grey_is_left_out_where_the_file_has_colour(tmp_path):
    grey = SRGB[:16] + b"GRAY" + SRGB[20:]
    for name in ("a.webp", "a.png"):
        write_image(tmp_path / name, noise(1), icc_profile=grey)
    assert read_image(tmp_path / "a.webp").icc_profile is None
    assert read_image(tmp_path / "a.png").icc_profile == grey


def test_jpeg_keeps_the_colour_of_every_pixel(tmp_path):
    write_image(tmp_path / "a.jpg", noise(3))
    with PIL.Image.open(tmp_path / "a.jpg") as image:
        assert PIL.JpegImagePlugin.get_sampling(image) == 0  # 4:4:4


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_16_bits_become_8_where_the_format_has_no_more(tmp_path, suffix):
    write_image(tmp_path / f"a{suffix}", np.full((16, 16, 3), 0xC0C0, np.uint16))
    assert np.abs(pixels_of(tmp_path / f"a{suffix}").astype(int) - 0xC0).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_is_transparent_becomes_white_and_what_is_half_so_lighter(dtype):
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    pixels = np.array([[[0, 0], [0, white], [0, white * 0.5]]]).astype(dtype)
    assert over_white(pixels)[0, :, 0] / white == pytest.approx([1, 0, 0.5], abs=0.005)


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must end in one of"):
        write_image(tmp_path / "a.xyz", noise(3))


def truncated(image, file_format):
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()[: len(file.getvalue()) // 2]


COLOUR = PIL.Image.fromarray(noise(3, height=64, width=64))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"some text", "not an image"),
        (truncated(COLOUR, "JPEG"), "damaged: image file is truncated"),
        (truncated(COLOUR, "PNG"), "damaged: .*truncated"),
        (cv2.imencode(".png", noise(3, np.uint16, 64, 64))[1].tobytes()[:9000], "damaged: .*truncated"),
    ],
)
def test_a_damaged_file_is_said_to_be_so(tmp_path, data, reason):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UnreadableImageError, match=reason):
        read_image(tmp_path / "a.png")


def test_a_file_that_is_not_there_is_said_not_to_be(tmp_path):
    with pytest.raises(UnreadableImageError, match="no such file"):
        read_image(tmp_path / "a.png")


def test_an_image_beyond_the_limit_of_pillow_is_refused(tmp_path, monkeypatch):
    COLOUR.save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="too large"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".webp"])
def test_an_animation_is_refused(tmp_path, suffix):
    COLOUR.save(tmp_path / f"a{suffix}", save_all=True, append_images=[COLOUR.rotate(90)])
    with pytest.raises(UnreadableImageError, match="holds 2 images"):
        read_image(tmp_path / f"a{suffix}")


def test_a_phone_picture_with_a_preview_behind_it_is_read(tmp_path):
    COLOUR.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[COLOUR.resize((8, 8))])
    assert read_image(tmp_path / "a.jpg").image.size == (64, 64)


def test_32_bits_are_refused(tmp_path):
    PIL.Image.new("F", (9, 9)).save(tmp_path / "a.tiff")
    with pytest.raises(UnreadableImageError, match="32 bits"):
        read_image(tmp_path / "a.tiff")


def test_damaged_exif_does_not_keep_an_image_from_being_read(tmp_path):
    COLOUR.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03")
    assert read_image(tmp_path / "a.jpg").image.size == (64, 64)


def test_16_bits_of_colour_without_opencv_say_what_to_install(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", noise(3, np.uint16))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UnreadableImageError, match="install opencv-python-headless"):
        read_image(tmp_path / "a.png")


def test_a_write_that_fails_halfway_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the largest file that may be written
    try:
        with pytest.raises(OSError, match="too large"):
            write_image(file, noise(3, height=64, width=64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "a.png", noise(3))
    assert not list(tmp_path.iterdir())
