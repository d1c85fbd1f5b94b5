"""Frames to the square the towers see, against loops over pixels and closed forms."""

import math

import numpy as np
import pytest
from PIL import Image

from reachrl.config.policy import OpenVLAConfig
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.preprocess import center_crop, fit_frames, letterbox, normalise_pixels, resize_naive
from reachrl.types import Observation


def frames(height: int, width: int, num: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


# --- centre crop ------------------------------------------------------------------------------------------------


def crop_value(image: np.ndarray, i: int, j: int, channel: int, area: float) -> float:
    """One output pixel before it is rounded, times 255.5, in float64."""
    height, width, _ = image.shape
    low, high = (1 - math.sqrt(area)) / 2, (1 + math.sqrt(area)) / 2
    y = low * (height - 1) + (i * (high - low) * (height - 1) / (height - 1) if height > 1 else 0)
    x = low * (width - 1) + (j * (high - low) * (width - 1) / (width - 1) if width > 1 else 0)
    value = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            if share > 0:
                value += share * image[row, column, channel] / 255
    return value * 255.5


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 16), (16, 7), (1, 5), (6, 1)])
@pytest.mark.parametrize("area", [0.9, 0.5])
def test_the_centre_crop_equals_a_loop_over_pixels(height: int, width: int, area: float) -> None:
    images = frames(height, width)
    cropped = center_crop(images, area)
    assert cropped.shape == images.shape and cropped.dtype == np.uint8
    for n, i, j, channel in np.ndindex(*images.shape):
        value = crop_value(images[n], i, j, channel, area)
        got = int(cropped[n, i, j, channel])
        near_an_integer = abs(value - round(value)) < 1e-3  # float32 may fall on either side
        assert got == min(int(value), 255) or (near_an_integer and abs(got - value) < 1.01), (n, i, j, value, got)


def test_a_crop_of_one_colour_or_of_everything_changes_nothing() -> None:
    grey = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(5, 1).repeat(6, 2).repeat(3, 3)
    assert np.array_equal(center_crop(grey), grey)
    images = frames(8, 10)
    assert np.array_equal(center_crop(images, 1.0), images)


def test_a_ramp_stays_a_ramp_around_the_same_centre() -> None:
    ramp = np.arange(256, dtype=np.uint8)[None, None, :, None].repeat(4, 1).repeat(3, 3)
    for images in (ramp, ramp.swapaxes(1, 2)):
        cropped = center_crop(images)
        line = (cropped[0, 0] if images.shape[2] == 256 else cropped[0, :, 0])[:, 0].astype(float)
        place = np.arange(256)
        slope, offset = np.polyfit(place, line, 1)
        assert abs(slope - math.sqrt(0.9) * 255.5 / 255) < 1e-3  # with sides of 0.9 it would be 0.9
        assert abs(slope * 127.5 + offset - 127.5) < 0.5
        assert np.abs(line - (127.5 + (place - 127.5) * math.sqrt(0.9))).max() <= 1


def test_frames_are_cropped_one_by_one() -> None:
    images = frames(10, 12, 3)
    assert np.array_equal(center_crop(images)[1], center_crop(images[1:2])[0])


# --- letterbox --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(4, 10), (10, 4), (6, 10), (8, 8)])
def test_borders_go_around_the_frame(height: int, width: int) -> None:
    images = frames(height, width)
    side = max(height, width)
    boxed = letterbox(images, side, (1, 2, 3))
    assert boxed.shape == (2, side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    for i in range(side):
        for j in range(side):
            inside = 0 <= i - top < height and 0 <= j - left < width
            want = images[:, i - top, j - left] if inside else np.array([[1, 2, 3]] * 2)
            assert np.array_equal(boxed[:, i, j], want), (i, j)


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 30), (40, 40)])
def test_the_padded_square_is_resized_as_the_release_does(height: int, width: int) -> None:
    images = frames(height, width)
    boxed = letterbox(images, 24, (10, 127, 240))
    for image, got in zip(images, boxed, strict=True):
        square = Image.new("RGB", (max(height, width),) * 2, (10, 127, 240))
        square.paste(Image.fromarray(image), ((50 - width) // 2, (50 - height) // 2) if height != width else (0, 0))
        assert np.array_equal(got, np.asarray(square.resize((24, 24), Image.Resampling.BICUBIC)))


def test_an_odd_difference_leaves_a_line_that_is_cut() -> None:
    wide = frames(4, 5)
    assert np.array_equal(letterbox(wide, 4, (0, 0, 0)), wide[:, :, :4])
    tall = frames(7, 4)  # a border of one column on each side makes 7 x 6; 7 rows are one too many
    boxed = letterbox(tall, 6, (9, 9, 9))
    assert np.array_equal(boxed[:, :, 1:5], tall[:, :6]) and (boxed[:, :, [0, 5]] == 9).all()


def test_square_frames_need_no_borders() -> None:
    images = frames(20, 20)
    assert np.array_equal(letterbox(images, 14, (1, 2, 3)), resize_naive(images, 14))


# --- as configured ----------------------------------------------------------------------------------------------


def config(**changes: object) -> OpenVLAConfig:
    sizes: dict[str, object] = {
        "image_size": 16,
        "towers": ({"kind": "conv", "stages": [{"channels": 8, "kernel": 8, "stride": 8}]},) * 2,
        "image_mean": ((0.1, 0.2, 0.3), (0.5, 0.25, 0.75)),
        "language_model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "value_hidden_size": 8,
    }
    return OpenVLAConfig.model_validate({**sizes, **changes})


def test_the_configuration_chooses() -> None:
    images, colour = frames(12, 30), (127, 63, 191)  # the last tower's mean, rounded down
    assert np.array_equal(fit_frames(images, config()), resize_naive(images, 16))
    assert np.array_equal(fit_frames(images, config(resize="letterbox")), letterbox(images, 16, colour))
    cropped = fit_frames(images, config(center_crop=True, resize="letterbox"))
    assert np.array_equal(cropped, letterbox(center_crop(images), 16, colour))
    assert not np.array_equal(cropped, letterbox(images, 16, colour))


@pytest.mark.parametrize("changes", [{"resize": "letterbox"}, {"center_crop": True}, {"rlds_frames": True}])
def test_the_policy_sees_the_frames_so(changes: dict[str, object]) -> None:
    images = frames(12, 20)
    policy, plain = OpenVLAPolicy(config(**changes)), OpenVLAPolicy(config())
    observation = Observation(images={"camera": images}, instructions=("push the puck", "open the door"))
    seen = policy.encode(observation).pixel_values
    wanted = fit_frames(images, policy.config)
    assert seen is not None
    assert seen.equal(normalise_pixels(wanted, policy.config.image_mean, policy.config.image_std))
    assert not seen.equal(plain.encode(observation).pixel_values)
