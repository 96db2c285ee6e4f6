import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hidiff.data.blur_synthesis import (
    BlurOptions,
    SyntheticBlurDataset,
    average_of_frames,
    average_over_poses,
    boost_highlights,
    expose,
    linear_to_srgb,
    object_mask,
    shake_trajectory,
    srgb_to_linear,
    synthesise_blur,
)

NO_NOISE = BlurOptions(max_shot_noise=0.0, max_read_noise=0.0)


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


def test_the_srgb_curve_has_its_published_values_and_an_inverse():
    assert srgb_to_linear(np.array([0.0, 0.04045, 0.5, 1.0])) == pytest.approx([0, 0.0031308, 0.2140, 1], abs=1e-4)
    values = np.linspace(0, 1, 256)
    assert linear_to_srgb(srgb_to_linear(values)) == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("extent", [0.0, 3.0, 30.0])
def test_a_shake_is_centred_and_has_the_extent_asked_for(extent, rng):
    positions = shake_trajectory(extent, 40, rng)
    assert np.abs(positions.mean(axis=0)).max() < 1e-4
    largest = np.linalg.norm(positions[:, None] - positions[None], axis=-1).max()
    assert largest == pytest.approx(extent, abs=1e-4)


def test_one_pose_at_rest_changes_nothing_and_a_shift_shifts(rng):
    image = rng.random((12, 14, 3), dtype=np.float32)
    assert average_over_poses(image, np.zeros((1, 2)), np.zeros(1)) == pytest.approx(image, abs=1e-6)
    shifted = average_over_poses(image, np.array([[2.0, 1.0]]), np.zeros(1))
    assert shifted[3:-3, 3:-3] == pytest.approx(image[2:-4, 1:-5], abs=1e-5)


def test_blur_keeps_the_light_and_stays_centred_on_the_sharp_point(rng):
    image = np.zeros((65, 65, 3), np.float32)
    image[32, 32] = 1
    blurry = average_over_poses(image, shake_trajectory(12.0, 60, rng), np.zeros(60))
    assert blurry.sum() == pytest.approx(3, abs=1e-3)
    weights = blurry[..., 0]
    centre = [(weights.sum(axis=1 - axis) * np.arange(65)).sum() for axis in (0, 1)]
    assert centre == pytest.approx([32, 32], abs=0.05)


def test_a_turning_camera_blurs_the_corners_more_than_the_centre(rng):
    checks = np.kron(np.indices((16, 16)).sum(0) % 2, np.ones((4, 4)))[..., None].repeat(3, -1).astype(np.float32)
    change = np.abs(average_over_poses(checks, np.zeros((21, 2)), np.linspace(-0.1, 0.1, 21)) - checks)
    assert change[:16, :16].mean() > 2 * change[24:40, 24:40].mean()


def test_clipped_highlights_become_brighter_than_the_sensor_can_hold_and_bright_skies_stay():
    image = np.array([[[0.5] * 3, [0.92] * 3, [1.0] * 3]], np.float32)
    boosted = boost_highlights(image, gain=2.0)
    assert boosted[0, :2] == pytest.approx(image[0, :2])
    assert boosted[0, 2] == pytest.approx([3.0] * 3)


def test_exposure_saturates_rounds_to_8_bits_and_adds_the_noise_asked_for(rng):
    grey = np.full((200, 200, 3), 0.25, np.float32)
    assert expose(grey * 8, 0, 0, rng).min() == 255
    assert (expose(grey, 0, 0, rng) == 137).all()  # sRGB of 0.25 is 0.537
    noisy = srgb_to_linear(expose(grey, 1e-3, 5e-3, rng) / 255)
    assert noisy.std() == pytest.approx((1e-3 * 0.25 + 5e-3**2) ** 0.5, rel=0.05)


def test_an_object_has_a_soft_edge_within_the_image(rng):
    mask = object_mask(64, 80, rng)
    assert mask.shape == (64, 80)
    assert 0 <= mask.min() < mask.max() <= 1
    assert ((mask > 0.1) & (mask < 0.9)).any()


def test_an_image_of_one_colour_stays_what_it_is(rng):
    flat = np.full((64, 64, 3), 100, np.uint8)
    assert np.abs(synthesise_blur(flat, NO_NOISE, rng).astype(int) - 100).max() <= 1


def test_an_average_of_frames_is_taken_in_linear_light():
    frames = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 255)])
    assert (average_of_frames(frames) == 188).all()  # sRGB of 0.5 is 0.735, not 0.5


def test_an_item_depends_on_seed_and_index_alone(photos):
    first, again = (SyntheticBlurDataset(photos, 32, 20, seed=1) for _ in range(2))
    again[3]
    for name in ("blurry", "sharp"):
        assert torch.equal(first[7][name], again[7][name])
    assert not torch.equal(first[7]["blurry"], first[8]["blurry"])
    assert not torch.equal(first[7]["blurry"], SyntheticBlurDataset(photos, 32, 20, seed=2)[7]["blurry"])


def test_items_do_not_depend_on_the_number_of_workers(photos):
    dataset = SyntheticBlurDataset(photos, 32, 6, seed=0)
    alone, shared = (
        torch.cat([batch["blurry"] for batch in torch.utils.data.DataLoader(dataset, 2, num_workers=n)]) for n in (0, 2)
    )
    assert torch.equal(alone, shared)


def test_items_are_pairs_in_the_unit_range(photos):
    item = SyntheticBlurDataset(photos, 32, 4, seed=0)[0]
    assert item["blurry"].shape == item["sharp"].shape == (3, 32, 32)
    assert item["blurry"].dtype == torch.float32
    assert 0 <= item["blurry"].min() <= item["blurry"].max() <= 1


def test_a_pair_from_frames_has_the_middle_frame_as_its_sharp_image(photos, frames):
    dataset = SyntheticBlurDataset(
        photos, 32, 4, seed=0, frames_dir=frames, frames_probability=1.0, min_frames=3, max_frames=7
    )
    for item in (dataset[i] for i in range(4)):
        sharp, blurry = (item[name].unique() for name in ("sharp", "blurry"))
        assert len(sharp) == len(blurry) == 1
        assert abs(sharp - blurry) * 255 < 10  # frames rise evenly, so their mean is near the middle one


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must hold images"):
        SyntheticBlurDataset(tmp_path, 32, 4, seed=0)
    with pytest.raises(ValueError, match="must be a folder of images"):
        SyntheticBlurDataset(tmp_path / "nowhere", 32, 4, seed=0)


def test_a_patch_larger_than_the_photo_is_an_error(photos):
    with pytest.raises(ValueError, match="`size` must fit into the image, got size=80 and an image of 72x64"):
        SyntheticBlurDataset(photos, 80, 4, seed=0)[0]
