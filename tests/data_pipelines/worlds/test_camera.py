"""Pictures through a camera, against closed forms; what they depend on."""

import contextlib
from typing import Any

import gymnasium
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from data_pipelines.errors import UserError
from data_pipelines.worlds.camera import PLAIN, Camera, ThroughCamera
from data_pipelines.worlds.two_rooms import ENV_ID
from tests.data_pipelines.worlds.tiny_env import CounterEnv

RIGHT = np.array([1, 0], np.float32)


def gray(level: float, size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), level, np.uint8)


def rooms(camera: Camera, **kwargs: Any) -> ThroughCamera:
    return ThroughCamera(gymnasium.make(ENV_ID, render_mode="rgb_array", **kwargs), camera)


def test_a_plain_camera_changes_nothing() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    assert np.array_equal(PLAIN(picture, [0]), picture) and PLAIN(picture, [0]).dtype == np.uint8


def test_noise_has_its_standard_deviation_and_no_pattern() -> None:
    noise = Camera(noise=12)(gray(128, 200), [3]).astype(float) - 128
    assert noise.std() == pytest.approx(np.sqrt(144 + 1 / 12), rel=0.01)  # with that of rounding
    assert abs(noise.mean()) < 0.15 and np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.02
    for axis in (0, 1):
        shifted = np.roll(noise, 1, axis)
        assert abs((noise * shifted).mean()) / 144 < 0.02
    # black is clipped: half of a normal distribution
    assert Camera(noise=12)(gray(0, 200), [3]).mean() == pytest.approx(12 / np.sqrt(2 * np.pi), rel=0.02)


def test_contrast_and_brightness_in_closed_form() -> None:
    halves = np.concatenate([gray(40, 8), gray(120, 8)])
    assert np.unique(Camera(contrast=0.5)(halves, [])).tolist() == [60, 100]
    assert np.unique(Camera(contrast=3)(halves, [])).tolist() == [0, 200]
    assert np.unique(Camera(brightness=1.5)(halves, [])).tolist() == [60, 180]
    assert np.unique(Camera(contrast=0.5, brightness=2)(halves, [])).tolist() == [120, 200]
    green = gray(0, 8) + np.array([0, 100, 0], np.uint8)
    assert Camera(contrast=0)(green, [])[0, 0].tolist() == [59] * 3  # its luma


def test_blur_is_a_gaussian_along_both_axes_of_each_channel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for std in (0.7, 2.0):
        expected = picture.astype(float)
        for axis in (0, 1):
            expected = gaussian_filter1d(expected, std, axis=axis, mode="nearest")
        assert np.abs(Camera(blur=std)(picture, []) - expected).max() <= 0.5 + 1e-9
    dot = gray(0, 31)
    dot[15, 15, 1] = 255
    blurred = Camera(blur=1.5)(dot, []).astype(float)
    away = np.arange(31) - 15
    density = np.exp(-0.5 * (away[:, None] ** 2 + away**2) / 1.5**2) / (2 * np.pi * 1.5**2)
    assert np.abs(blurred[..., 1] - 255 * density).max() <= 0.6 and blurred[..., [0, 2]].max() == 0
    assert np.array_equal(Camera(blur=3)(gray(77), []), gray(77))  # edges are continued


def test_a_seed_gives_the_same_pictures_and_each_moment_its_own() -> None:
    def episode(env: ThroughCamera, seed: int | None) -> list[np.ndarray]:
        first, _ = env.reset(seed=seed)
        assert np.array_equal(first, env.render()) and np.array_equal(first, env.render())
        second, *_ = env.step(0 * RIGHT)
        assert np.array_equal(second, env.render())
        goal = env.goal_frame()
        env.step(0 * RIGHT)
        assert np.array_equal(goal, env.goal_frame())
        return [first, second, goal]

    env, other = rooms(Camera(noise=20)), rooms(Camera(noise=20))
    one, next_one = episode(env, 5), episode(env, None)
    again, next_again = episode(other, 5), episode(other, None)
    assert all(np.array_equal(*pair) for pair in zip(one + next_one, again + next_again, strict=True))
    assert not np.array_equal(one[0], next_one[0]) and not np.array_equal(one[0], episode(env, 6)[0])
    assert np.abs(one[0].astype(int) - one[1]).mean() > 3  # at rest, only the noise differs


def test_only_pictures_change() -> None:
    plain, seen = gymnasium.make(ENV_ID, render_mode="rgb_array", slip=0.5), rooms(Camera(brightness=0.5), slip=0.5)
    (picture, info), (dark, same) = plain.reset(seed=1), seen.reset(seed=1)
    assert np.array_equal(dark, np.rint(picture * 0.5))
    for _ in range(5):
        picture, reward, *_, info = plain.step(RIGHT)
        dark, as_well, *_, same = seen.step(RIGHT)
        assert np.array_equal(dark, np.rint(picture * 0.5)) and reward == as_well
        assert np.array_equal(info["state"], same["state"])
    assert np.array_equal(seen.goal_frame(), np.rint(plain.get_wrapper_attr("goal_frame")() * 0.5))


def test_observations_of_numbers_remain() -> None:
    with contextlib.closing(ThroughCamera(CounterEnv("rgb_array"), Camera(brightness=0.5))) as env:
        env.reset(seed=0)
        assert env.step(2)[0][:2].tolist() == [1, 2] and env.render()[0, 0].tolist() == [20, 0, 10]
    with pytest.raises(UserError, match="the environment renders str, not RGB pictures"):
        ThroughCamera(CounterEnv("rgb_array", pictures=False), Camera(noise=1)).render()


@pytest.mark.parametrize(
    ("values", "tells"),
    [
        ({"noise": -1}, "noise=-1 must be a number within 0..255"),
        ({"blur": float("nan")}, "blur=nan must be a number within 0..32"),
        ({"contrast": "low"}, "contrast='low' must be a number within 0..8"),
        ({"brightness": True}, "brightness=True"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], tells: str) -> None:
    with pytest.raises(UserError, match=tells):
        Camera(**values)
