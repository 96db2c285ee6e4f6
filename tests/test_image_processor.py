import io
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hidiff.image_processor import fill_padded, pad_to_multiple, postprocess, preprocess

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)


def there_and_back(image, output_type="pil"):
    """What comes out when the network changes nothing."""
    pictures = preprocess(image)
    return postprocess([pad_to_multiple(p.pixels) for p in pictures], pictures, output_type)


def rgb_of(image):
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("mode", "expected"), [("RGB", "RGB"), ("L", "L"), ("1", "L"), ("CMYK", "RGB"), ("HSV", "RGB")]
)
def test_a_pil_image_without_alpha_keeps_its_colours(mode, expected):
    image = PIL.Image.fromarray(BYTES[..., :3]).convert(mode)
    (restored,) = there_and_back(image)
    assert restored.mode == expected
    assert np.abs(rgb_of(restored).astype(int) - rgb_of(image)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_carried_over_untouched(mode):
    image = PIL.Image.fromarray(BYTES).convert(mode)
    (restored,) = there_and_back(image)
    assert restored.mode == mode
    assert np.array_equal(np.asarray(restored)[..., -1], BYTES[..., 3])


def test_a_palette_image_becomes_rgb_and_its_transparent_entry_alpha():
    image = PIL.Image.fromarray(BYTES[..., :3]).quantize(8)
    assert np.array_equal(np.asarray(there_and_back(image)[0]), rgb_of(image))
    image.info["transparency"] = 3
    (restored,) = there_and_back(image)
    assert restored.mode == "RGBA"
    assert np.array_equal(np.asarray(restored)[..., 3] == 0, np.asarray(image) == 3)


def test_grey_of_16_bits_keeps_every_value():
    values = RNG.integers(0, 65536, (9, 10), dtype=np.uint16)
    (restored,) = there_and_back(PIL.Image.fromarray(values))
    assert restored.mode == "I;16"
    assert np.abs(np.asarray(restored).astype(int) - values).max() <= 1


def test_exif_orientation_is_applied():
    image = PIL.Image.fromarray(BYTES[..., :3])
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90° to the right
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    (restored,) = there_and_back(PIL.Image.open(buffer))
    assert np.array_equal(np.asarray(restored), np.rot90(BYTES[..., :3], -1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_arrays_are_scaled_by_the_largest_value_of_their_dtype(dtype):
    values = RNG.random((2, 5, 7, 3))
    maximum = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    restored = there_and_back((values * maximum).astype(dtype), "np")
    assert restored.shape == values.shape
    assert restored.dtype == np.float32
    assert np.abs(restored - values).max() < 1 / 255


def test_16_bits_of_an_array_survive_in_floating_point():
    values = RNG.integers(0, 65536, (6, 6, 3), dtype=np.uint16)
    assert np.array_equal(np.round(there_and_back(values, "np")[0] * 65535), values)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_and_tensors_keep_their_number_of_channels(channels):
    values = RNG.random((6, 9, channels), dtype=np.float32)
    assert there_and_back(values, "np").shape == (1, 6, 9, channels)
    assert there_and_back(torch.from_numpy(values).permute(2, 0, 1), "pt").shape == (1, channels, 6, 9)


def test_a_list_mixes_kinds_and_sizes():
    images = [PIL.Image.new("RGB", (3, 4)), np.zeros((8, 8, 3), np.uint8), torch.zeros(2, 3, 5, 6)]
    restored = there_and_back(images)
    assert [image.size for image in restored] == [(3, 4), (8, 8), (6, 5), (6, 5)]
    assert isinstance(there_and_back(images, "np"), list)
    assert there_and_back(images[2:], "pt").shape == (2, 3, 5, 6)


def test_bfloat16_tensors_are_taken():
    assert there_and_back(torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16), "pt").unique().tolist() == [0.5]


@pytest.mark.parametrize(("height", "width"), [(9, 13), (16, 8), (15, 100)])
def test_padding_is_reflection_where_the_sides_are_long_enough(height, width):
    image = torch.rand(3, height, width)
    expected = torch.nn.functional.pad(image[None], (0, -width % 8, 0, -height % 8), mode="reflect")[0]
    assert torch.equal(pad_to_multiple(image), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 3000), (1, 8), (4, 4)])
def test_short_sides_are_reflected_back_and_forth(height, width):
    image = torch.rand(3, height, width)
    expected = np.pad(image.numpy(), ((0, 0), (0, -height % 8), (0, -width % 8)), mode="reflect")
    assert np.array_equal(pad_to_multiple(image).numpy(), expected)


@pytest.mark.parametrize("shape", [(16, 24, 3), (300, 5, 4), (1, 1, 2), (3, 13, 1)])
def test_filling_strip_by_strip_is_padding(shape):
    (picture,) = preprocess(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    expected = pad_to_multiple(picture.pixels)
    found = torch.full_like(expected, torch.nan)
    fill_padded(found, picture)
    assert torch.equal(found, expected)


def test_values_beyond_the_range_are_clamped_and_do_not_wrap_around():
    pictures = preprocess(np.zeros((1, 1, 3)))
    assert postprocess([torch.tensor([1.02, -0.02, 0.5]).view(3, 1, 1)], pictures, "pil")[0].getpixel((0, 0)) == (
        *(255, 0),
        128,
    )


@pytest.mark.parametrize(
    ("image", "error", "sentence"),
    [
        ([], ValueError, "`image` must hold at least one image, got none"),
        (None, TypeError, "`image` must be a path, a URL, .* got NoneType"),
        ([3], TypeError, "got int in the list"),
        (np.full((4, 4, 3), np.nan), ValueError, "`image` must be finite"),
        (np.full((4, 4, 3), 1.5), ValueError, r"`image` must lie in \[0, 1\] .* got 1.5 … 1.5"),
        (np.full((4, 4, 3), -0.5), ValueError, r"`image` must lie in \[0, 1\]"),
        (np.zeros((4, 4, 5)), ValueError, r"1 \(grey\), .* got 5 in shape \(4, 4, 5\)"),
        (np.zeros((4, 0, 3)), ValueError, "at least one pixel, got 0x4"),
        (np.zeros((0, 4, 4, 3)), ValueError, "`image` must hold at least one image"),
        (np.zeros((4,)), ValueError, r"array \[H, W\], .* got shape \(4,\)"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "dtype uint8, uint16 or floating point, got int64"),
        (torch.zeros(4, 4), ValueError, r"tensor \[C, H, W\] or \[B, C, H, W\], got shape \(4, 4\)"),
        (torch.full((3, 4, 4), torch.inf), ValueError, "`image` must be finite"),
        ("no_such_file.png", ValueError, "no_such_file.png"),
    ],
)
def test_bad_input_gets_one_clear_sentence(image, error, sentence):
    with pytest.raises(error, match=sentence):
        preprocess(image)


def test_a_path_is_read_with_its_alpha(tmp_path):
    PIL.Image.fromarray(BYTES).save(tmp_path / "image.png")
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        assert np.array_equal(np.asarray(there_and_back(path)[0]), BYTES)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_an_address_is_fetched(tmp_path):
    PIL.Image.fromarray(BYTES).save(tmp_path / "image.png")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        restored = there_and_back(f"http://127.0.0.1:{server.server_port}/image.png")[0]
        server.shutdown()
    assert np.array_equal(np.asarray(restored), BYTES)
