import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hidiff.data.blur_synthesis import BlurOptions
from diffusers_hidiff.data.synthetic_patches import Frames, Photos, SyntheticPatchesDataset


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path, rng):
    """Three photographs, one of them turned by its EXIF orientation, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        smooth = np.kron(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        PIL.Image.fromarray(smooth).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(15):
        PIL.Image.fromarray(np.full((70, 80, 3), 10 * i, np.uint8)).save(folder / f"{i:03}.png")
    return folder


def test_an_item_depends_on_seed_and_index_alone(photos):
    first, again = (SyntheticPatchesDataset(Photos(photos), 32, 20, seed=1) for _ in range(2))
    again[3]
    for name in ("blurry", "sharp"):
        assert torch.equal(first[7][name], again[7][name])
    assert not torch.equal(first[7]["blurry"], first[8]["blurry"])
    assert not torch.equal(first[7]["blurry"], SyntheticPatchesDataset(Photos(photos), 32, 20, seed=2)[7]["blurry"])


def test_items_do_not_depend_on_the_number_of_workers(photos):
    dataset = SyntheticPatchesDataset(Photos(photos), 32, 6, seed=0)
    alone, shared = (
        torch.cat([batch["blurry"] for batch in torch.utils.data.DataLoader(dataset, 2, num_workers=n)]) for n in (0, 2)
    )
    assert torch.equal(alone, shared)


def test_items_are_pairs_in_the_unit_range(photos):
    item = SyntheticPatchesDataset(Photos(photos), 32, 4, seed=0)[0]
    assert item["blurry"].shape == item["sharp"].shape == (3, 32, 32)
    assert item["blurry"].dtype == torch.float32
    assert 0 <= item["blurry"].min() <= item["blurry"].max() <= 1


def test_a_pair_from_frames_has_the_middle_frame_as_its_sharp_image(photos, frames):
    options = BlurOptions(min_frames=3, max_frames=7)
    dataset = SyntheticPatchesDataset(Photos(photos), 32, 4, 0, options, Frames(frames), frames_probability=1.0)
    for item in (dataset[i] for i in range(4)):
        sharp, blurry = (item[name].unique() for name in ("sharp", "blurry"))
        assert len(sharp) == len(blurry) == 1
        assert abs(sharp - blurry) * 255 < 10  # frames rise evenly, so their mean is near the middle one
    assert dataset.source(0) == str(frames)


def test_too_few_frames_or_frames_of_two_sizes_are_refused(photos, frames):
    with pytest.raises(ValueError, match="`frames_dir` must hold at least 31 frames, got 15"):
        SyntheticPatchesDataset(Photos(photos), 32, 4, 0, BlurOptions(max_frames=30), Frames(frames))
    PIL.Image.new("RGB", (8, 8)).save(frames / "999.png")
    with pytest.raises(ValueError, match="`frames_dir` must hold frames of one size"):
        Frames(frames)


def test_photos_stay_in_memory_as_far_as_there_is_room_for_them(photos):
    big = np.zeros((600, 1000, 3), np.uint8)
    for i in range(3):
        PIL.Image.fromarray(big).save(photos / f"{i}.png")
    kept = Photos(photos, cache_megabytes=4)
    for _ in range(2):
        assert all(kept.read(i).shape == (600, 1000, 3) for i in range(3))
    assert list(kept.kept) == [0, 1]
    assert kept.read(0) is kept.read(0)


def test_a_cached_photo_gives_the_same_item(photos):
    plain, cached = (SyntheticPatchesDataset(Photos(photos, megabytes), 32, 9, 0) for megabytes in (0, 64))
    for _ in range(2):
        assert all(torch.equal(plain[i]["blurry"], cached[i]["blurry"]) for i in range(6))


def test_a_truncated_photo_is_named(photos):
    file = photos / "0.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"0\.png' cannot be read as an image"):
        Photos(photos).read(0)


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must hold images"):
        Photos(tmp_path)
    with pytest.raises(ValueError, match="must be a folder of images"):
        Photos(tmp_path / "nowhere")


def test_a_patch_larger_than_the_photo_is_an_error(photos):
    with pytest.raises(ValueError, match=r"`size` must fit into the image, got size=80 and an image of 72x64, .*\.png"):
        SyntheticPatchesDataset(Photos(photos), 80, 4, seed=0)[0]
