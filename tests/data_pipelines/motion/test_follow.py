"""Tracked positions against the painted ones, through the encoder and decoder."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.decoders import read_facts
from data_pipelines.motion import follow as module
from data_pipelines.motion.blobs import blob_of_places
from data_pipelines.motion.follow import Motion, NothingMoves, follow, interpolated
from data_pipelines.motion.tracks import split
from tests.data_pipelines.conftest import WriteVideo
from tests.data_pipelines.motion.painted import HEIGHT, WIDTH, Array, circle, line, painted, scenery, write

NUM_FRAMES = 90


def tracked(path: Path, num_objects: int = 1) -> Motion:
    """The motion in a video; the steps before it count its frames."""
    video = read_facts(path)
    *steps, motion = follow(path.parent, video, num_objects)
    assert steps == list(range(1, video.num_frames + 1)) and isinstance(motion, Motion)
    assert motion.positions.shape == (video.num_frames, num_objects, 2)
    return motion


def errors(motion: Motion, paths: Array) -> Array:
    """The distances [F, N] from the paths [F, N, 2], for the numbering of the objects that fits the first frame."""
    first = np.linalg.norm(motion.positions[0][:, None] - paths[0][None], axis=-1)
    return np.linalg.norm(motion.positions - paths[:, first.argmin(axis=1)], axis=-1)


@pytest.mark.parametrize(("level", "ground"), [(20, 170), (230, 60)], ids=["dark", "bright"])
def test_one_object_in_noise_and_changing_light(
    level: int, ground: int, write_video: WriteVideo, tmp_path: Path
) -> None:
    frames = np.arange(NUM_FRAMES)
    light = 1 + 0.06 * np.sin(frames) + 0.15 * frames / NUM_FRAMES  # flicker and drift
    path = circle(NUM_FRAMES)[:, None]
    video = write(write_video, tmp_path / "a.mp4", painted(scenery(level=ground), path, [level], noise=4, light=light))
    motion = tracked(video)
    assert motion.is_found.all() and motion.interpolated == 0 and motion.stirring < 0.01
    assert errors(motion, path).max() < 1.0


@pytest.mark.slow
def test_a_large_frame_is_reduced_and_positions_are_in_its_own_pixels(write_video: WriteVideo, tmp_path: Path) -> None:
    path = 4.3 * circle(30)[:, None]
    frames = painted(scenery(480, 640), path, [10], radius=20, noise=3)
    motion = tracked(write(write_video, tmp_path / "a.mp4", frames))
    assert module.working_factor(480, 640) == 2
    assert errors(motion, path).max() < 1.5
    assert np.abs(np.median(motion.positions - path, axis=(0, 1))).max() < 0.25  # no shift by half a block


def test_frames_have_the_numbers_of_the_index(write_video: WriteVideo, tmp_path: Path) -> None:
    """A disk that moves to and fro by 4 pixels, at irregular times, with B-frames: a frame too many would show."""
    path = line(NUM_FRAMES, (20, 20), (100, 70))[:, None] + 4.0 * (np.arange(NUM_FRAMES) % 2 * 2 - 1)[:, None, None]
    times_ms = np.cumsum(np.random.default_rng(0).integers(20, 200, NUM_FRAMES)).tolist()
    options = {"bf": "3", "g": "25", "sc_threshold": "0"}
    video = write(write_video, tmp_path / "a.mkv", painted(scenery(), path, [10]), times_ms=times_ms, options=options)
    assert errors(tracked(video), path).max() < 1.0


def test_a_ghost_is_not_followed(write_video: WriteVideo, tmp_path: Path) -> None:
    """Rest for six tenths of the video, then move: the median of the frames shows the object where it rested."""
    rest, move = NUM_FRAMES * 6 // 10, NUM_FRAMES * 4 // 10
    path = np.concatenate([line(rest, (30, 30), (30, 30)), line(move, (30, 30), (105, 70))])[:, None]
    frames = painted(scenery(), path, [15], noise=2)
    median = np.median(np.stack(frames), axis=0)
    assert median[30, 30] < 40 and median[70, 100] > 80  # so it does
    motion = tracked(write(write_video, tmp_path / "a.mp4", frames))
    assert motion.is_found.all() and errors(motion, path).max() < 1.5


def test_two_rest_most_of_the_time_in_turn(write_video: WriteVideo, tmp_path: Path) -> None:
    half = NUM_FRAMES // 2
    first = np.concatenate([line(half, (25, 25), (25, 25)), line(half, (25, 25), (100, 25))])
    second = np.concatenate([line(half, (25, 70), (100, 70)), line(half, (100, 70), (100, 70))])
    path = np.stack([first, second], axis=1)
    motion = tracked(write(write_video, tmp_path / "a.mp4", painted(scenery(), path, [15, 15], noise=2)), 2)
    assert motion.is_found.all() and errors(motion, path).max() < 1.5


@pytest.mark.parametrize("offset", [1.0, 5.0], ids=["through each other", "past each other"])
def test_crossing_objects_keep_their_identities(offset: float, write_video: WriteVideo, tmp_path: Path) -> None:
    path = np.stack(
        [line(NUM_FRAMES, (15, 20), (113, 76)), line(NUM_FRAMES, (15 + offset, 76), (113 + offset, 20))], axis=1
    )
    motion = tracked(write(write_video, tmp_path / "a.mp4", painted(scenery(), path, [15, 15], noise=2)), 2)
    apart = np.linalg.norm(path[:, 0] - path[:, 1], axis=-1)
    assert apart.min() < 7  # the radius of each
    distances = errors(motion, path)
    assert distances[apart > 20].max() < 1.5 and distances.max() < 5


def test_objects_that_turn_back_when_they_touch(write_video: WriteVideo, tmp_path: Path) -> None:
    """They touch for a third of the time, side by side: one blob, which is split."""
    third = NUM_FRAMES // 3
    left = np.concatenate(
        [line(third, (15, 40), (57, 40)), line(third, (57, 40), (57, 55)), line(third, (57, 55), (15, 70))]
    )
    path = np.stack([left, left * [-1, 1] + [WIDTH, 0]], axis=1)
    motion = tracked(write(write_video, tmp_path / "a.mp4", painted(scenery(), path, [15, 15], noise=2)), 2)
    assert motion.is_found.all() and errors(motion, path).max() < 3


def test_a_hidden_object_is_interpolated(write_video: WriteVideo, tmp_path: Path) -> None:
    path = line(NUM_FRAMES, (15, 20), (113, 76))[:, None]
    shown = path.copy()
    shown[40:60] = np.nan
    motion = tracked(write(write_video, tmp_path / "a.mp4", painted(scenery(), shown, [15], noise=2)))
    assert np.flatnonzero(~motion.is_found).tolist() == list(range(40, 60))
    assert motion.interpolated == pytest.approx(20 / NUM_FRAMES)
    assert errors(motion, path).max() < 1.5  # a straight line is what it followed


def test_only_light_and_noise(write_video: WriteVideo, tmp_path: Path) -> None:
    light = 1 + 0.1 * np.sin(np.arange(NUM_FRAMES))
    nothing = np.full((NUM_FRAMES, 1, 2), np.nan)
    video = write(write_video, tmp_path / "a.mp4", painted(scenery(), nothing, [0], noise=6, light=light))
    with pytest.raises(NothingMoves, match="nothing moves"):
        tracked(video)
    one = write(write_video, tmp_path / "b.mp4", painted(scenery(), circle(NUM_FRAMES)[:, None], [15], noise=2))
    with pytest.raises(NothingMoves, match="1 of 2 moving objects are found"):
        tracked(one, 2)
    still = write(write_video, tmp_path / "c.mp4", painted(scenery(), nothing[:1], [0]))
    with pytest.raises(NothingMoves):
        tracked(still)


def test_a_moving_camera_stirs_the_whole_picture(write_video: WriteVideo, tmp_path: Path) -> None:
    wide = np.kron(np.random.default_rng(0).uniform(60, 200, (16, 60)), np.ones((8, 8)))
    frames = [wide[:HEIGHT, 2 * number : 2 * number + WIDTH] for number in range(60)]
    path = circle(60)[:, None]
    images = [painted(frame, path[number : number + 1], [5])[0] for number, frame in enumerate(frames)]
    assert tracked(write(write_video, tmp_path / "a.mp4", images)).stirring > 0.2


@pytest.mark.slow
def test_long_videos_have_a_background_per_window(
    write_video: WriteVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the scenery changes in the middle, as when the sun comes out: no single background fits."""
    path = circle(120, turns=3)[:, None]
    changed = scenery(seed=1)
    changed[:, WIDTH // 2 :] += 40
    images = [
        painted(scenery() if number < 60 else changed, path[number : number + 1], [5], noise=2, seed=number)[0]
        for number in range(120)
    ]
    video = write(write_video, tmp_path / "a.mp4", images)
    monkeypatch.setattr(module, "WINDOW_FRAMES", 30)
    distances = errors(tracked(video), path)[:, 0]
    assert (distances < 1.5).mean() > 0.9  # not in a window with both


def test_split_recovers_two_disks_that_overlap() -> None:
    y, x = np.mgrid[:60, :60]
    centres = np.array([[25.0, 30.0], [35.0, 30.0]])
    inside = np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1]).min(axis=-1) <= 8
    rows, columns = np.nonzero(inside)
    blob = blob_of_places(np.stack([columns, rows], axis=1).astype(np.float32), np.ones(len(rows), np.float32))
    found = split(blob, centres + np.array([[-2.0, 1.0], [2.0, 3.0]]), np.full(2, 16.0))
    assert np.linalg.norm(found - centres, axis=1).max() < 1.5


def test_interpolation_is_linear_and_holds_the_ends() -> None:
    found = np.full((6, 1, 2), np.nan)
    found[1], found[4] = [[0.0, 9.0]], [[3.0, 0.0]]
    expected = [[0, 9], [0, 9], [1, 6], [2, 3], [3, 0], [3, 0]]
    assert interpolated(found)[:, 0].tolist() == expected
