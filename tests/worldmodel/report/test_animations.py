import base64
from io import BytesIO

import numpy as np
from PIL import Image

from tests.worldmodel.report.samples import make_episodes, moving_image
from worldmodel.evaluation.illustrations import Fans
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.report.animations import animation, imagined_paths, path_until, planning_animation


def test_paths_grow_straight_between_the_ends_of_segments() -> None:
    ends = np.array([[[2.0, 0.0], [2.0, 4.0]]])
    origin = np.zeros(2)
    assert path_until(origin, ends, 0.5).tolist() == [[[0, 0], [1, 0]]]
    assert path_until(origin, ends, 1.25).tolist() == [[[0, 0], [2, 0], [2, 1]]]
    assert path_until(origin, ends, 2.0).tolist() == [[[0, 0], [2, 0], [2, 4]]]


def test_the_ring_is_drawn_where_the_frames_show_the_truth() -> None:
    """A white pixel moves along the true path: in the last frame the ring must be around it."""
    centre, velocity, n = np.array([20, 12]), np.array([4, 3]), 3
    frames = np.zeros((2 * n, 1, 64, 64), dtype=np.uint8)
    for k in range(1, n + 1):
        frames[n + k - 1, 0, centre[1] + k * velocity[1], centre[0] + k * velocity[0]] = 255
    true = (centre + n * velocity).astype(float)
    fans = Fans(np.array([[[[40.0, 4.0]]]]), None, true[None, None], centre[None].astype(float), on_frames=True)
    picture = animation(frames, n, "alt", fans=fans)
    assert picture.still is not None
    image = Image.open(BytesIO(base64.b64decode(picture.still.split(",")[1]))).convert("RGB")
    pixels = np.asarray(image).astype(int)[:320, :320]
    white = np.argwhere((pixels.min(axis=2) > 100) & (np.ptp(pixels, axis=2) < 20))
    orange = np.argwhere((pixels[..., 0] > 190) & (pixels[..., 2] < 100))
    tip = orange.max(axis=0)  # the path goes right and down, so the ring's edge is the outermost orange
    middle = true[::-1] * 5 + 2
    assert np.abs(white.mean(axis=0) - middle).max() < 4
    assert np.all(tip - middle > 5) and abs((tip - middle)[0] - (tip - middle)[1]) <= 3


def test_long_episodes_are_thinned_from_their_first_frame_to_their_last() -> None:
    (episode,) = make_episodes(1, size_px=16, num_steps=200)
    assert moving_image(planning_animation(episode, "alt")).n_frames == 64


def test_the_way_the_goal_and_the_plan_are_drawn_where_they_are() -> None:
    """Blue from the agent to where the plan leads, a pink cross at the goal, orange behind the agent."""
    way = np.array([[10.0, 10.0], [20.0, 10.0]])
    plan = np.array([[[[20.0, 40.0], [50.0, 40.0]]]])
    frames = np.zeros((2, 3, 64, 64), np.uint8)
    episode = PlannedEpisode(0, True, frames, frames[0], way, np.array([50.0, 20.0]), plan)
    assert imagined_paths(episode, 0).tolist() == [[[10, 10], [20, 40], [50, 40]]]
    moving = moving_image(planning_animation(episode, "alt"))

    def seen(number: int) -> dict[str, np.ndarray]:
        moving.seek(number)
        red, green, blue = np.moveaxis(np.asarray(moving.convert("RGB")).astype(int)[:320], -1, 0)
        return {
            "plan": np.argwhere((blue > 150) & (red < 140)),
            "goal": np.argwhere((red > 150) & (blue > 120) & (green < 150)),
            "way": np.argwhere((red > 180) & (blue < 90)),
        }

    def at(x: float, y: float) -> np.ndarray:
        return 5 * np.array([y, x]) + 2

    first, last = seen(0), seen(1)
    assert np.abs(first["plan"].min(axis=0) - at(10, 10)).max() < 5
    assert np.abs(first["plan"].max(axis=0) - at(50, 40)).max() < 8
    assert np.abs(first["goal"].mean(axis=0) - at(50, 20)).max() < 3
    assert len(first["way"]) == 0 and len(last["plan"]) == 0
    assert np.abs(last["way"].min(axis=0) - at(10, 10)).max() < 5
    assert np.abs(last["way"].max(axis=0) - at(20, 10)).max() < 5
