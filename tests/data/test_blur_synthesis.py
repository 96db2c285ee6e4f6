import cv2
import numpy as np
import pytest

from diffusers_hidiff.data.blur_synthesis import (
    TONE_CURVES,
    BlurOptions,
    average_of_frames,
    average_over_poses,
    boost_highlights,
    camera_homographies,
    defocus_disc,
    expose,
    jpeg_round_trip,
    linear_to_gamma,
    linear_to_srgb,
    moving_object,
    object_mask,
    random_motion,
    shake_trajectory,
    srgb_to_linear,
    synthesise_blur,
    to_bytes,
    to_light,
)

NO_NOISE = BlurOptions(max_shot_noise=0.0, max_read_noise=0.0)


def dots(size, places):
    """Black but for white spots of 3x3 pixels, [size, size, 3]."""
    image = np.zeros((size, size, 3), np.float32)
    for x, y in places:
        image[y - 1 : y + 2, x - 1 : x + 2] = 1
    return image


def centre_of_mass(light, place=None, reach=None):
    """(x, y) of the light of the first channel, of that within `reach` of `place` if given."""
    weights = light[..., 0].astype(np.float64)
    ys, xs = np.indices(weights.shape)
    if place is not None:
        weights = weights * ((np.abs(xs - place[0]) <= reach) & (np.abs(ys - place[1]) <= reach))
    return [float((weights * axis).sum() / weights.sum()) for axis in (xs, ys)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


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
    at_rest = camera_homographies((12, 14), np.zeros((1, 2)), np.zeros(1))
    assert average_over_poses(image, at_rest) == pytest.approx(image, abs=1e-6)
    moved = camera_homographies((12, 14), np.array([[2.0, 1.0]]), np.zeros(1))
    assert average_over_poses(image, moved)[3:-3, 3:-3] == pytest.approx(image[2:-4, 1:-5], abs=1e-5)


def test_a_margin_is_left_out_and_changes_nothing_else(rng):
    image = rng.random((40, 48, 4), dtype=np.float32)
    motion = random_motion((40, 48), BlurOptions(max_tilt=0.05), rng)
    whole = average_over_poses(image, motion)
    assert average_over_poses(image, motion, margin=7) == pytest.approx(whole[7:-7, 7:-7], abs=1e-5)


def test_homographies_are_those_of_a_pinhole_camera():
    """Points are turned in space and projected, one by one."""
    tilt, roll, focal_length = np.array([0.03, -0.02]), 0.05, 200.0
    ((homography),) = camera_homographies(
        (101, 81), np.array([[3.0, -2.0]]), np.array([roll]), tilt[None], focal_length
    )
    rotation, _ = cv2.Rodrigues(np.array([tilt[1], tilt[0], roll]))
    centre = np.array([40.0, 50.0])
    axis = rotation @ [0, 0, focal_length]  # where the centre goes; the shift replaces that
    for point in ([0.0, 0.0], [80.0, 100.0], [40.0, 50.0], [12.0, 77.0]):
        seen = rotation @ [*(np.array(point) - centre), focal_length]
        expected = focal_length * (seen[:2] / seen[2] - axis[:2] / axis[2])
        x, y, w = homography @ [*point, 1]
        assert np.array([x / w, y / w]) == pytest.approx(centre + np.array([3, -2]) + expected, abs=1e-6)


def test_without_tilts_a_pose_is_a_similarity():
    homographies = camera_homographies((64, 64), np.ones((1, 2)), np.array([0.1]), np.zeros((1, 2)))
    assert homographies == pytest.approx(camera_homographies((64, 64), np.ones((1, 2)), np.array([0.1])), abs=1e-9)
    assert homographies[0, 2] == pytest.approx([0, 0, 1])


def test_blur_keeps_the_light_and_stays_centred_on_the_sharp_point(rng):
    image = dots(65, [(32, 32)])
    blurry = average_over_poses(image, camera_homographies((65, 65), shake_trajectory(12.0, 60, rng), np.zeros(60)))
    assert blurry.sum() == pytest.approx(image.sum(), abs=1e-2)
    assert centre_of_mass(blurry) == pytest.approx([32, 32], abs=0.05)


@pytest.mark.parametrize("max_tilt", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_a_turning_camera_keeps_every_part_of_the_image_centred(max_tilt, seed):
    options = BlurOptions(max_tilt=max_tilt, max_extent=12.0)
    places = [(40, 40), (120, 40), (80, 80), (40, 120), (120, 120)]
    motion = random_motion((161, 161), options, np.random.default_rng(seed))
    blurry = average_over_poses(dots(161, places), motion)
    for place in places:
        assert centre_of_mass(blurry, place, reach=18) == pytest.approx(place, abs=0.25)


def test_a_turning_camera_blurs_the_corners_more_than_the_centre(rng):
    checks = np.kron(np.indices((16, 16)).sum(0) % 2, np.ones((4, 4)))[..., None].repeat(3, -1).astype(np.float32)
    turning = camera_homographies((64, 64), np.zeros((21, 2)), np.linspace(-0.1, 0.1, 21))
    change = np.abs(average_over_poses(checks, turning) - checks)
    assert change[:16, :16].mean() > 2 * change[24:40, 24:40].mean()


def test_a_moving_object_stays_centred_and_leaves_the_background_at_rest(rng):
    light, background = dots(81, [(40, 40)]), np.full((81, 81, 3), 0.25, np.float32)
    mask = np.zeros((81, 81), np.float32)
    mask[30:51, 30:51] = 1
    motion = camera_homographies((81, 81), shake_trajectory(10.0, 40, rng), np.zeros(40))
    seen = moving_object(light, background, mask, motion)
    assert seen[:15] == pytest.approx(background[:15])
    dark = moving_object(np.zeros_like(light), background, mask, motion)
    assert centre_of_mass(seen - dark) == pytest.approx([40, 40], abs=0.05)
    assert centre_of_mass(background - dark) == pytest.approx([40, 40], abs=0.05)


def test_a_moving_object_at_rest_changes_nothing(rng):
    light = rng.random((64, 64, 3), dtype=np.float32)
    at_rest = camera_homographies((64, 64), np.zeros((3, 2)), np.zeros(3))
    assert moving_object(light, light, object_mask(64, 64, rng), at_rest) == pytest.approx(light, abs=1e-5)


@pytest.mark.parametrize("radius", [0.0, 0.7, 3.0, 4.6])
def test_a_defocus_disc_keeps_the_light_is_centred_and_has_its_radius(radius):
    disc = defocus_disc(radius)
    assert disc.sum() == pytest.approx(1, abs=1e-6)
    assert disc == pytest.approx(disc[::-1])
    assert disc == pytest.approx(disc.T)
    ys, xs = np.indices(disc.shape) - len(disc) // 2
    assert (2 * (disc * (xs**2 + ys**2)).sum()) ** 0.5 == pytest.approx(radius, abs=0.4)  # of a disc, sqrt(2 E[r^2])


def test_an_average_of_evenly_moving_frames_is_centred_on_the_middle_one():
    frames = np.stack([to_bytes(dots(41, [(14 + 2 * i, 20 - i)])) for i in range(7)])
    blurry = to_light(average_of_frames(frames))
    assert centre_of_mass(blurry) == pytest.approx(centre_of_mass(to_light(frames[3])), abs=0.02)


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
    assert (average_of_frames(frames, "gamma") == 186).all()  # 0.5 to the power of 1 / 2.2 is 0.730


@pytest.mark.parametrize("tone_curve", TONE_CURVES)
def test_8_bits_survive_the_way_to_light_and_back(tone_curve):
    values = np.arange(256, dtype=np.uint8)
    assert (to_bytes(to_light(values, tone_curve), tone_curve) == values).all()
    assert (np.diff(to_light(values, tone_curve)) > 0).all()


def test_a_gamma_of_2_2_has_its_values():
    assert linear_to_gamma(np.array([0.0, 0.5, 1.0, 2.0])) == pytest.approx([0, 0.5 ** (1 / 2.2), 1, 1])


def test_a_jpeg_of_low_quality_loses_more_and_has_blocks_of_8_pixels_wherever_they_begin(rng):
    image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    losses = [np.abs(jpeg_round_trip(image, quality).astype(int) - image).mean() for quality in (95, 60, 10)]
    assert losses == sorted(losses)
    ramp = np.tile(np.linspace(60, 200, 48).astype(np.uint8)[None, :, None], (48, 1, 3))
    for left in (0, 3, 5):
        jumps = np.abs(np.diff(jpeg_round_trip(ramp, 3, (0, left)).astype(int), axis=1)).mean(axis=(0, 2))
        edges = [x for x in range(47) if (x + 1 + left) % 8 == 0]
        assert jumps[edges].mean() > 3 * np.delete(jumps, edges).mean()


@pytest.fixture
def blocks():
    coarse = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def test_kinds_of_blur_that_are_off_leave_the_others_as_they_were(blocks):
    """Mean, deviation and roughness of eight results, computed before defocus, JPEG, tilts and tone curves were there."""
    expected = [
        *((133.04, 60.71, 8.51), (135.82, 55.12, 9.84), (146.69, 31.38, 5.84), (144.81, 37.70, 7.40)),
        *((147.07, 26.25, 4.82), (143.62, 38.21, 7.26), (141.67, 41.92, 7.63), (127.85, 69.46, 9.71)),
    ]
    for seed, figures in enumerate(expected):
        blurry = synthesise_blur(blocks, NO_NOISE, np.random.default_rng(seed), 16).astype(float)
        found = (blurry.mean(), blurry.std(), np.abs(np.diff(blurry, axis=0)).mean())
        assert found == pytest.approx(figures, abs=0.05)


@pytest.mark.parametrize(
    "option",
    [{"defocus_probability": 1.0}, {"jpeg_probability": 1.0}, {"max_tilt": 0.1}, {"tone_curve": "gamma"}],
    ids=lambda option: next(iter(option)),
)
def test_every_kind_of_blur_can_be_switched_on(blocks, option):
    plain = synthesise_blur(blocks, NO_NOISE, np.random.default_rng(3))
    options = BlurOptions(max_shot_noise=0.0, max_read_noise=0.0, **option)
    changed = synthesise_blur(blocks, options, np.random.default_rng(3))
    assert changed.shape == plain.shape
    assert np.abs(changed.astype(int) - plain).mean() > 0.5
    assert np.array_equal(changed, synthesise_blur(blocks, options, np.random.default_rng(3)))


@pytest.mark.parametrize("seed", range(4))
def test_the_sharp_image_is_aligned_with_the_blur_of_all_kinds_together(seed):
    """A white disc on black: its light, where nothing saturates, is centred where the disc is."""
    sharp = to_bytes(cv2.circle(np.zeros((161, 161, 3), np.float32), (80, 80), 9, (0.9, 0.9, 0.9), -1))
    options = BlurOptions(max_extent=20.0, defocus_probability=1.0, max_tilt=0.02, object_probability=0.0)
    blurry = synthesise_blur(sharp, options, np.random.default_rng(seed))
    assert centre_of_mass(to_light(blurry)) == pytest.approx([80, 80], abs=0.5)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"object_probability": -0.1}, "`object_probability` must be at least 0 and at most 1, got -0.1"),
        ({"min_extent": 30.0}, "`min_extent` must not exceed `max_extent`=26.0, got 30.0"),
        ({"max_shot_noise": "much"}, "`max_shot_noise` must be of type float, got 'much'"),
        ({"min_frames": 7.5}, "`min_frames` must be of type int, got 7.5"),
        ({"max_jpeg_quality": 101}, "`max_jpeg_quality` must be at least 1 and at most 100, got 101"),
        ({"max_softness": 0.5}, "`max_softness` must be at least 1 and at most inf, got 0.5"),
        ({"tone_curve": "film"}, "`tone_curve` must be 'srgb' or 'gamma', got 'film'"),
    ],
)
def test_impossible_options_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        BlurOptions(**values)
