from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from diffusers_hidiff.data.paired_images import find_pairs, paired_files, read_rgb
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
    with pytest.raises(ValueError, match=r"1 have none; the first: .*lonely\.png has no partner in sharp/"):
        paired_files(tmp_path)


@pytest.mark.parametrize(
    ("blurry", "sharp"),
    [
        (["input/a.png"], ["target/a.png"]),
        (["GOPR01/blur/01.png", "GOPR02/blur/01.png"], ["GOPR01/sharp/01.png", "GOPR02/sharp/01.png"]),
        (["scene001/blur/blur_1.png", "scene001/blur/blur_2.png"], ["scene001/gt/gt_1.png", "scene001/gt/gt_2.png"]),
    ],
)
def test_published_layouts_are_found(tmp_path, blurry, sharp):
    for name in (*blurry, *sharp):
        write(tmp_path / Path(name).parent, Path(name).name)
    found = [tuple(str(file.relative_to(tmp_path)) for file in pair) for pair in paired_files(tmp_path)]
    assert found == list(zip(blurry, sharp, strict=True))


def test_a_list_like_realblurs_names_the_sharp_file_first(tmp_path):
    for name in ("s/gt/gt_1.png", "s/blur/blur_1.png"):
        write(tmp_path / Path(name).parent, Path(name).name)
    (tmp_path / "train.txt").write_text("s/gt/gt_1.png s/blur/blur_1.png 17\n\n")
    assert paired_files(tmp_path / "train.txt") == [(tmp_path / "s/blur/blur_1.png", tmp_path / "s/gt/gt_1.png")]
    (tmp_path / "train.txt").write_text("s/gt/gt_1.png s/blur/blur_2.png\n")
    with pytest.raises(ValueError, match=r"line 1 of train\.txt, 's/gt/gt_1.png s/blur/blur_2.png', must name a sharp"):
        paired_files(tmp_path / "train.txt")


def test_a_list_whose_folders_say_otherwise_may_name_the_blurry_file_first(tmp_path):
    for name in ("blur", "sharp"):
        write(tmp_path / "train" / "GOPR1" / name, "1.png")
    (tmp_path / "pairs.txt").write_text("train/GOPR1/blur/1.png train/GOPR1/sharp/1.png\n")
    ((name, blurry, sharp),) = find_pairs(tmp_path / "pairs.txt")
    assert (name, blurry.parent.name, sharp.parent.name) == ("train/GOPR1/1", "blur", "sharp")


def test_gopros_own_folder_needs_a_split_to_be_named(tmp_path):
    for split, scene in (("train", "GOPR1"), ("test", "GOPR2")):
        for name in ("blur", "blur_gamma", "sharp"):
            write(tmp_path / split / scene / name, "000001.png")
    assert [pair.name for pair in find_pairs(tmp_path, "train")] == ["GOPR1/000001"]
    assert [pair.name for pair in find_pairs(tmp_path / "test")] == ["GOPR2/000001"]
    assert find_pairs(tmp_path, "test")[0].blurry.parent.name == "blur"
    with pytest.raises(ValueError, match="has train/ and test/, give the one that is meant"):
        find_pairs(tmp_path)


def test_hides_sharp_images_lie_in_one_folder_for_all_splits(tmp_path):
    for name in ("1.png", "2.png", "3.png"):
        write(tmp_path / "GT", name)
    write(tmp_path / "train", "1.png")
    write(tmp_path / "test" / "test-close-ups", "2.png")
    write(tmp_path / "test" / "test-long-shot", "3.png")
    assert [pair.name for pair in find_pairs(tmp_path, "train")] == ["1"]
    for folder, split in ((tmp_path, "test"), (tmp_path / "test", None)):
        assert [pair.name for pair in find_pairs(folder, split)] == ["test-close-ups/2", "test-long-shot/3"]


def test_realblurs_own_folder_is_read_by_its_list(tmp_path):
    for scene in ("scene001", "scene002"):
        for name in ("blur", "gt"):
            write(tmp_path / "RealBlur-J" / scene / name, f"{name}_1.png")
    for split, scene in (("train", "scene001"), ("test", "scene002")):
        line = f"RealBlur-J/{scene}/gt/gt_1.png RealBlur-J/{scene}/blur/blur_1.png \n"
        (tmp_path / f"RealBlur_J_{split}_list.txt").write_text(line)
    assert [pair.name for pair in find_pairs(tmp_path, "train")] == ["RealBlur-J/scene001/1"]
    with pytest.raises(ValueError, match=r"more than one list, give .* RealBlur_J_train_list\.txt, RealBlur_J_test"):
        find_pairs(tmp_path)


def test_files_that_a_system_leaves_behind_are_no_images(tmp_path):
    for folder in ("blurry", "sharp"):
        write(tmp_path / folder, "a.png")
    (tmp_path / "blurry" / "._a.png").write_bytes(b"")
    (tmp_path / "blurry" / "Thumbs.db").write_bytes(b"")
    assert [pair.name for pair in find_pairs(tmp_path)] == ["a"]


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("a.png", "a.webp"):
        write(tmp_path / "blurry", name)
    write(tmp_path / "sharp", "a.png")
    with pytest.raises(ValueError, match=r"blurry/a\.webp bears the name of a\.png"):
        find_pairs(tmp_path)


def test_a_scene_without_sharp_images_is_named(tmp_path):
    write(tmp_path / "scene001" / "blur", "1.png")
    with pytest.raises(ValueError, match="scene001 has no sharp or gt or target/"):
        find_pairs(tmp_path)


def test_a_folder_without_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold blurry/ and sharp/, input/ and target/, or scenes"):
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
