"""Sharp images -> blurry ones, as a camera would have taken them.

Light adds up linearly, so everything happens in linear light: images here are float32 [H, W, 3], 1.0 the brightest
value that the sensor can hold. Every random draw comes from the generator handed in.

K poses, points in time · H, W pixels
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import cv2
import numpy as np

cv2.setNumThreads(0)  # the data loader's workers are the parallelism

# Tone curves: 8-bit values <-> light


def srgb_to_linear(image: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4).astype(np.float32)


def linear_to_srgb(image: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB (IEC 61966-2-1)."""
    image = np.clip(image, 0, 1)
    return np.where(image <= 0.0031308, image * 12.92, 1.055 * image ** (1 / 2.4) - 0.055).astype(np.float32)


def gamma_to_linear(image: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to linear light by a gamma of 2.2, the camera that the GoPro data set assumes (Nah et al. 2017)."""
    return (np.asarray(image) ** 2.2).astype(np.float32)


def linear_to_gamma(image: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to values by a gamma of 2.2."""
    return (np.clip(image, 0, 1) ** (1 / 2.2)).astype(np.float32)


Curve = Callable[[np.ndarray], np.ndarray]
TONE_CURVES: dict[str, tuple[Curve, Curve]] = {
    "srgb": (srgb_to_linear, linear_to_srgb),
    "gamma": (gamma_to_linear, linear_to_gamma),
}


@cache
def light_of_bytes(tone_curve: str) -> np.ndarray:
    """The light of each 8-bit value, [256]."""
    return TONE_CURVES[tone_curve][0](np.arange(256) / 255)


def to_light(image: np.ndarray, tone_curve: str = "srgb") -> np.ndarray:
    """uint8 to linear light, of the same shape."""
    return light_of_bytes(tone_curve)[image]


def to_bytes(light: np.ndarray, tone_curve: str = "srgb") -> np.ndarray:
    """Linear light to uint8, of the same shape; what is brighter than 1 saturates."""
    return np.round(TONE_CURVES[tone_curve][1](light) * 255).astype(np.uint8)


# Camera shake


def shake_trajectory(extent: float, num_poses: int, rng: np.random.Generator) -> np.ndarray:
    """Where a hand-held camera points during the exposure: a random walk with inertia, centred on its mean.

    Args:
        extent: Largest distance between two of its points, in pixels.
        num_poses: K, points in time, evenly spaced.
        rng: Source of randomness.
    Returns:
        [K, 2], pixels.
    Source:
        After Boracchi and Foi, "Modeling the performance of image restoration from motion blur", IEEE TIP 2012: a
        velocity with inertia, small random changes, and now and then a jerk.
    """
    inertia = rng.uniform(0.7, 0.98)
    velocity = rng.normal(size=2)
    velocity /= np.linalg.norm(velocity) + 1e-9
    positions = np.zeros((num_poses, 2))
    for i in range(1, num_poses):
        velocity = inertia * velocity + (1 - inertia) * rng.normal(size=2) * 2
        if rng.random() < 0.02:
            velocity += 2 * rng.normal(size=2)
        positions[i] = positions[i - 1] + velocity
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    positions *= extent / (distances.max() + 1e-9)
    return (positions - positions.mean(axis=0)).astype(np.float32)


def camera_homographies(
    size: tuple[int, int],
    positions: np.ndarray,
    rolls: np.ndarray,
    tilts: np.ndarray | None = None,
    focal_length: float = 1000.0,
) -> np.ndarray:
    """How a turning camera moves the image: K·R·K⁻¹ about the image's centre, shifted by `positions`.

    Turns about the optical axis and shifts make similarities. Turns about the other two axes mostly shift the whole image,
    which `positions` do already; what they add is perspective, a fraction r·tilt/focal_length of a pixel's distance r from
    the centre.

    Args:
        size: H and W.
        positions: Where the image's centre goes, [K, 2] as (x, y), pixels.
        rolls: Turns about the optical axis, [K], radians.
        tilts: Turns about the vertical and the horizontal axis, [K, 2], radians; None means none.
        focal_length: Of the camera, pixels.
    Returns:
        [K, 3, 3], from pixels of the sharp image to pixels of each pose.
    Source:
        Whyte, Sivic, Zisserman and Ponce, "Non-uniform deblurring for shaken images", CVPR 2010.
    """
    centre = (np.array(size[::-1]) - 1) / 2
    homographies = np.zeros((len(positions), 3, 3))
    lens = np.diag([focal_length, focal_length, 1.0])
    for i, (position, roll) in enumerate(zip(positions, rolls, strict=True)):
        if tilts is None:
            cos, sin = np.cos(roll), np.sin(roll)
            turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        else:
            rotation, _ = cv2.Rodrigues(np.array([tilts[i][1], tilts[i][0], roll], np.float64))
            turn = lens @ rotation @ np.linalg.inv(lens)
            turn = translation(-turn[:2, 2] / turn[2, 2]) @ turn / turn[2, 2]
        homographies[i] = translation(centre + position) @ turn @ translation(-centre)
    return homographies


def translation(shift: np.ndarray) -> np.ndarray:
    """The homography of a shift (x, y), [3, 3]."""
    return np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1.0]])


def average_over_poses(image: np.ndarray, homographies: np.ndarray, margin: int = 0) -> np.ndarray:
    """Mean of `image` over camera poses: what a sensor sees that integrates while the image moves.

    Args:
        image: [H, W, C], linear light; beyond its border it is mirrored. OpenCV warps four channels in half the time that
            it takes for three.
        homographies: [K, 3, 3], as `camera_homographies` makes them.
        margin: So many pixels at each border, which blur reaches in from, are left out of the result.
    Returns:
        [H - 2 margin, W - 2 margin, C].
    """
    height, width = (side - 2 * margin for side in image.shape[:2])
    inside = translation(np.array([-margin, -margin])) @ homographies
    total = np.zeros((height, width, image.shape[2]), np.float32)
    for homography in inside:
        warped = cv2.warpPerspective(image, homography, (width, height), borderMode=cv2.BORDER_REFLECT)
        total += np.reshape(warped, total.shape)  # OpenCV drops the axis of a single channel
    return total / len(homographies)


def with_channel(image: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] and a channel [H, W] as [H, W, 4]."""
    return np.dstack([image, channel])


# Other causes of blur


def object_mask(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth-edged random polygon, [H, W] in [0, 1]: the outline of something that moves."""
    centre = rng.uniform(0.25, 0.75, size=2) * (width, height)
    angles = np.sort(rng.uniform(0, 2 * np.pi, size=rng.integers(5, 10)))
    radii = rng.uniform(0.15, 0.4, size=len(angles)) * min(height, width)
    corners = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = np.zeros((height, width), np.float32)
    cv2.fillPoly(mask, [corners.round().astype(np.int32)], 1.0)
    return cv2.GaussianBlur(mask, (0, 0), 1.5)


def moving_object(
    light: np.ndarray, background: np.ndarray, mask: np.ndarray, homographies: np.ndarray, margin: int = 0
) -> np.ndarray:
    """Something that moves before a background: object over background, averaged over time.

    Args:
        light: The sharp image, of which the object is a part, [H, W, 3].
        background: What is behind it, at rest or blurred, [H - 2 margin, W - 2 margin, 3].
        mask: The object's outline, [H, W] in [0, 1].
        homographies: The object's motion, [K, 3, 3].
        margin: As for `average_over_poses`.
    Returns:
        [H - 2 margin, W - 2 margin, 3].
    Source:
        The operator `over` of Porter and Duff, "Compositing digital images", SIGGRAPH 1984, which is linear in the object
        and its mask; so its mean over time is that of their means.
    """
    blurred = average_over_poses(with_channel(light * mask[..., None], mask), homographies, margin)
    return blurred[..., :3] + (1 - blurred[..., 3:]) * background


def defocus_disc(radius: float) -> np.ndarray:
    """The image of a point out of focus: an evenly lit disc, smooth at its edge.

    Args:
        radius: Pixels.
    Returns:
        Weights that add up to 1, [2r + 1, 2r + 1] with r = `radius` rounded up.
    Source:
        Potmesil and Chakravarty, "A lens and aperture camera model for synthetic image generation", SIGGRAPH 1981.
    """
    reach = int(np.ceil(radius))
    offsets = np.arange(-reach, reach + 1)
    distances = np.hypot(offsets[:, None], offsets[None])
    disc = np.clip(radius + 0.5 - distances, 0, 1)
    return (disc / disc.sum()).astype(np.float32)


def average_of_frames(frames: np.ndarray, tone_curve: str = "srgb") -> np.ndarray:
    """A long exposure from consecutive frames of a fast camera.

    Args:
        frames: uint8, [K, H, W, 3].
        tone_curve: "srgb" or "gamma".
    Returns:
        uint8, [H, W, 3]; sharp is the middle frame.
    Source:
        Nah, Kim and Lee, "Deep multi-scale convolutional neural network for dynamic scene deblurring", CVPR 2017: how the
        GoPro data set was made.
    """
    return to_bytes(to_light(frames, tone_curve).mean(axis=0), tone_curve)


# The sensor and the file


def boost_highlights(image: np.ndarray, gain: float) -> np.ndarray:
    """Gives clipped highlights back a brightness of up to 1 + `gain`, so that blur smears them into bright streaks.

    Only what is all but clipped (sRGB 247 and above) can have been brighter: boosting less bright skies as well would teach a
    network to darken them.

    Source:
        After Rim, Kim, Kim, Lee, Lee and Cho, "Realistic blur synthesis for learning image deblurring", ECCV 2022, who
        show that blur without saturation teaches little about lights at night.
    """
    brightness = np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])[..., None]
    return image * (1 + gain * np.clip((brightness - 0.93) / 0.07, 0, 1) ** 2)


def expose(
    image: np.ndarray, shot: float, read: float, rng: np.random.Generator, tone_curve: str = "srgb"
) -> np.ndarray:
    """What the sensor writes down: saturation, shot and read noise, tone curve, 8 bits.

    Args:
        image: [H, W, 3], linear light.
        shot: Variance of the noise per unit of light.
        read: Standard deviation of the noise in the dark.
        rng: Source of randomness.
        tone_curve: "srgb" or "gamma".
    Returns:
        uint8, [H, W, 3].
    Source:
        Foi, Trimeche, Katkovnik and Egiazarian, "Practical Poissonian-Gaussian noise modeling and fitting for single-image
        raw-data", IEEE TIP 2008.
    """
    image = np.clip(image, 0, 1)
    if shot or read:
        image = image + rng.standard_normal(image.shape, np.float32) * np.sqrt(shot * image + read**2)
    return to_bytes(image, tone_curve)


def jpeg_round_trip(image: np.ndarray, quality: int, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """What is left of an image in a JPEG file, with colour at half the resolution.

    Args:
        image: uint8 RGB, [H, W, 3].
        quality: 1 to 100.
        offset: How far the file's 8x8 blocks begin above and left of the image, 0 to 7 each; a patch of a photo begins
            anywhere in a block.
    Returns:
        uint8 RGB, [H, W, 3].
    Source:
        ITU-T T.81, as libjpeg writes it.
    """
    top, left = offset
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, top, 0, left, 0, cv2.BORDER_REFLECT)
    _, encoded = cv2.imencode(".jpg", padded[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))[..., ::-1]
    return np.ascontiguousarray(decoded[top : top + height, left : left + width])


# All together


@dataclass(frozen=True)
class BlurOptions:
    """What kinds of blur are made, and how strong.

    Args:
        min_extent: Shortest shake, pixels.
        max_extent: Longest shake, pixels.
        max_angle: Largest turn of the camera about its optical axis during the exposure, radians.
        max_tilt: Likewise about the other two axes, for perspective; a patch is too small to tell at common focal lengths.
        focal_length: Of the camera, pixels; it matters to tilts only.
        object_probability: How often something moves over a still or shaking background.
        defocus_probability: How often the picture is out of focus as well.
        max_defocus_radius: By how much at most, pixels.
        tone_curve: Of the photos and of the result, "srgb" or "gamma" (2.2, as GoPro was made).
        highlight_probability: How often clipped highlights are taken to have been brighter than the sensor can hold.
        max_highlight_gain: By how much at most, as a share of what the sensor can hold.
        noise_probability: How often there is noise at all: an average of video frames has next to none.
        max_shot_noise: Largest variance of the noise per unit of light.
        max_read_noise: Largest standard deviation of the noise in the dark.
        jpeg_probability: How often the result has been a JPEG file.
        min_jpeg_quality: Of these files.
        max_jpeg_quality: Of these files.
        soft_probability: How often a photo is enlarged first: not every sharp picture is sharp to the pixel.
        max_softness: By how much at most.
        min_frames: Fewest frames in an average of video frames.
        max_frames: Most frames in it.
    Raises:
        ValueError: A value is impossible.
    """

    min_extent: float = 4.0
    max_extent: float = 26.0
    max_angle: float = 0.06
    max_tilt: float = 0.0
    focal_length: float = 1000.0
    object_probability: float = 0.15
    defocus_probability: float = 0.0
    max_defocus_radius: float = 4.0
    tone_curve: str = "srgb"
    highlight_probability: float = 0.4
    max_highlight_gain: float = 2.0
    noise_probability: float = 0.65
    max_shot_noise: float = 4e-4
    max_read_noise: float = 4e-3
    jpeg_probability: float = 0.0
    min_jpeg_quality: int = 70
    max_jpeg_quality: int = 98
    soft_probability: float = 0.3
    max_softness: float = 1.8
    min_frames: int = 7
    max_frames: int = 13

    def __post_init__(self) -> None:
        for field in fields(self):
            self.check(field.name, type(field.default))
        for smaller, larger in (
            ("min_extent", "max_extent"),
            ("min_frames", "max_frames"),
            ("min_jpeg_quality", "max_jpeg_quality"),
        ):
            if getattr(self, smaller) > getattr(self, larger):
                raise ValueError(
                    f"`{smaller}` must not exceed `{larger}`={getattr(self, larger)}, got {getattr(self, smaller)}."
                )

    def check(self, name: str, kind: type) -> None:
        """Refuses a value of another type or out of range."""
        value: Any = getattr(self, name)
        if name == "tone_curve":
            if value not in TONE_CURVES:
                raise ValueError(f"`tone_curve` must be {' or '.join(map(repr, TONE_CURVES))}, got {value!r}.")
            return
        allowed = (int, float) if kind is float else (kind,)
        if type(value) not in allowed:
            raise ValueError(f"`{name}` must be of type {kind.__name__}, got {value!r}.")
        low, high = 0.0, float("inf")
        if name.endswith("_probability"):
            high = 1
        elif name.endswith("_quality"):
            low, high = 1, 100
        elif name in ("min_frames", "max_softness", "focal_length"):
            low = 1
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be at least {low:g} and at most {high:g}, got {value}.")


def random_motion(size: tuple[int, int], options: BlurOptions, rng: np.random.Generator) -> np.ndarray:
    """A shake within the options, as homographies [K, 3, 3] of an image of `size`."""
    extent = rng.uniform(options.min_extent, options.max_extent)
    num_poses = int(1.2 * extent) + 4
    positions = shake_trajectory(extent, num_poses, rng)
    rolls = shake_trajectory(rng.uniform(0, options.max_angle), num_poses, rng)[:, 0]
    tilts = None
    if options.max_tilt:
        tilts = shake_trajectory(rng.uniform(0, options.max_tilt), num_poses, rng)
    return camera_homographies(size, positions, rolls, tilts, options.focal_length)


def synthesise_blur(sharp: np.ndarray, options: BlurOptions, rng: np.random.Generator, margin: int = 0) -> np.ndarray:
    """One blurry photograph of a sharp one; both are aligned, the blur's centre of mass being zero.

    What is switched off draws no random number, so that a new kind of blur leaves the others as they were.

    Args:
        sharp: uint8, [H, W, 3].
        options: Kinds and strengths.
        rng: Source of randomness.
        margin: So many pixels at each border, which blur reaches in from, are left out of the result.
    Returns:
        uint8, [H - 2 margin, W - 2 margin, 3].
    """
    height, width = size = sharp.shape[:2]
    boosted, gain = rng.random() < options.highlight_probability, rng.uniform(0, options.max_highlight_gain)
    light = to_light(sharp, options.tone_curve)
    if boosted:
        light = boost_highlights(light, gain)
    if options.defocus_probability and rng.random() < options.defocus_probability:
        disc = defocus_disc(rng.uniform(0, options.max_defocus_radius))
        light = cv2.filter2D(light, -1, disc, borderType=cv2.BORDER_REFLECT)

    four_channels = with_channel(light, np.zeros_like(light[..., 0]))
    blurry = average_over_poses(four_channels, random_motion(size, options, rng), margin)[..., :3]
    if rng.random() < options.object_probability:
        mask = object_mask(height, width, rng)
        motion = random_motion(size, options, rng)
        background = light[margin : height - margin, margin : width - margin] if rng.random() < 0.5 else blurry
        blurry = moving_object(light, background, mask, motion, margin)

    noisy = rng.random() < options.noise_probability
    shot, read = rng.uniform(0, options.max_shot_noise), rng.uniform(0, options.max_read_noise)
    photo = expose(blurry, shot * noisy, read * noisy, rng, options.tone_curve)
    if options.jpeg_probability and rng.random() < options.jpeg_probability:
        quality = int(rng.integers(options.min_jpeg_quality, options.max_jpeg_quality + 1))
        top, left = rng.integers(8, size=2)
        photo = jpeg_round_trip(photo, quality, (int(top), int(left)))
    return photo
