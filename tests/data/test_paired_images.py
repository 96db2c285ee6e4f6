import numpy as np
import PIL.Image
import pytest

from diffusers_hidiff.data.paired_images import paired_files, read_rgb
from diffusers_hidiff.data.transforms import random_crop, random_flip_rotation


def write(folder, name, size=(6, 4)):
    folder.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size).save(folder / name)


def test_pairs_are_found_by_name_whatever_the_suffix(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / "blurry", f"{name}.png")
        write(tmp_path / "sharp", f"{name}.webp")
    assert [(b.name, s.name) for b, s in paired_files(tmp_path)] == [("a.png", "a.webp"), ("b.png", "b.webp")]


def test_an_image_without_a_partner_is_named(tmp_path):
    write(tmp_path / "blurry", "a.png")
    write(tmp_path / "blurry", "lonely.png")
    write(tmp_path / "sharp", "a.png")
    with pytest.raises(ValueError, match=r"these do not: .*lonely"):
        paired_files(tmp_path)


def test_reading_applies_the_exif_orientation(tmp_path):
    image = PIL.Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(tmp_path / "turned.jpg").shape == (6, 4, 3)


def test_a_pair_is_cropped_and_turned_as_one_image():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    seen = set()
    for _ in range(60):
        a, b = random_flip_rotation(random_crop((image, 255 - image), 8, rng), rng)
        assert np.array_equal(a, 255 - b)
        assert a.shape == (8, 8, 3)
    small = np.arange(4).reshape(2, 2, 1)
    for _ in range(200):
        seen.add(random_flip_rotation((small,), rng)[0].tobytes())
    assert len(seen) == 8
