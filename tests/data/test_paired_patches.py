import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hidiff.data.paired_images import FilePairs
from diffusers_hidiff.data.paired_patches import PairedPatchesDataset, PatchCutter
from diffusers_hidiff.data.transforms import random_tile


def write(file, image):
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image).save(file)


@pytest.fixture
def pairs(tmp_path):
    """Three pairs; the blurry image is the negative of the sharp one."""
    rng = np.random.default_rng(0)
    for i in range(3):
        sharp = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
        write(tmp_path / "blurry" / f"{i}.png", 255 - sharp)
        write(tmp_path / "sharp" / f"{i}.png", sharp)
    return tmp_path


def patches(folder, size, length, seed, **tiles):
    return PairedPatchesDataset(FilePairs(folder), PatchCutter(size, seed, **tiles), length)


def test_a_patch_is_cut_and_turned_as_a_pair_and_depends_on_seed_and_index_alone(pairs):
    dataset, again = (patches(pairs, 16, 12, seed=1) for _ in range(2))
    again[5]
    for i in range(12):
        item = dataset[i]
        assert item["blurry"].shape == (3, 16, 16)
        assert torch.allclose(item["blurry"], 1 - item["sharp"])
    assert torch.equal(dataset[7]["blurry"], again[7]["blurry"])
    assert not torch.equal(dataset[7]["blurry"], patches(pairs, 16, 12, seed=2)[7]["blurry"])


def test_every_pair_is_visited_once_before_one_is_visited_again(pairs):
    dataset = patches(pairs, 16, 30, seed=0)
    sources = [dataset.source(i) for i in range(30)]
    assert all(len(set(sources[i : i + 3])) == 3 for i in range(0, 30, 3))
    assert len({tuple(sources[i : i + 3]) for i in range(0, 30, 3)}) > 1


def test_tiles_overlap_and_end_at_the_edge():
    image = np.indices((720, 1280)).transpose(1, 2, 0)
    rng = np.random.default_rng(0)
    tiles = [random_tile((image,), 512, 256, rng)[0] for _ in range(200)]
    assert {tile.shape for tile in tiles} == {(512, 512, 2)}
    assert {tuple(tile[0, 0]) for tile in tiles} == {(y, x) for y in (0, 208) for x in (0, 256, 512, 768)}
    assert random_tile((image[:300, :400],), 512, 256, rng)[0].shape == (300, 400, 2)


def test_patches_lie_within_the_tiles(pairs):
    dataset = patches(pairs, 24, 8, seed=0, tile_size=24)
    assert all(dataset[i]["sharp"].shape == (3, 24, 24) for i in range(8))
    with pytest.raises(ValueError, match="`tile_size` must be at least the patch size"):
        patches(pairs, 32, 8, seed=0, tile_size=24)


def test_a_pair_of_two_sizes_is_refused(pairs):
    write(pairs / "sharp" / "1.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must have one size, got \['56x40', '40x40'\]"):
        [patches(pairs, 16, 3, seed=0)[i] for i in range(3)]


def test_a_pair_that_is_damaged_or_smaller_than_a_patch_is_named(pairs):
    with pytest.raises(ValueError, match=r"size=48 and an image of 56x40\. It is that of .*blurry/\d\.png"):
        patches(pairs, 48, 3, seed=0)[0]
    file = pairs / "sharp" / "1.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"sharp/1\.png' cannot be read as an image: image file is truncated"):
        [patches(pairs, 16, 3, seed=0)[i] for i in range(3)]
