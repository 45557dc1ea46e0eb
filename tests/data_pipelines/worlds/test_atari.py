"""Positions from the console's memory against coloured pixels of its screen; our stickiness against the emulator's."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("ale_py")
from ale_py import Action, ALEInterface, roms

from data_pipelines.worlds.atari import (
    BREAKOUT_CUT,
    FRAME_SKIP,
    FREEWAY_CUT,
    PONG_CUT,
    STICKINESS,
    Atari,
    Cut,
    area_means,
    simulator,
)
from data_pipelines.worlds.games import GAMES

CHICKEN, RED, WHITE, GREEN, ORANGE = (252, 252, 84), (200, 72, 72), (236, 236, 236), (92, 186, 92), (213, 130, 74)


def played(name: str, num_frames: int, seed: int = 0) -> Iterator[tuple[Atari, list[float]]]:
    game, rng = simulator(name), np.random.default_rng(seed)
    game.restart()
    for _ in range(num_frames):
        game.step(rng.random(GAMES[name].num_chances, dtype=np.float32))
        yield game, game.labels()["position"]


def middle(screen: np.ndarray, colour: tuple[int, int, int], rows: slice, columns: slice) -> np.ndarray | None:
    """Return (x, y) of the middle of the box around the pixels of a colour, and its width and height; None if none."""
    y, x = np.nonzero((screen[rows, columns] == colour).all(axis=-1))
    if not len(x):
        return None
    x, y = x + columns.start, y + rows.start
    return np.array([(x.min() + x.max()) / 2, (y.min() + y.max()) / 2, np.ptp(x) + 1, np.ptp(y) + 1])


def test_the_chicken_is_where_its_label_says() -> None:
    seen = 0
    for game, [y] in played("freeway", 400):
        for rows in (slice(14, 100), slice(110, 198)):  # between them is a line of the same colour
            box = middle(game.ale.getScreenRGB(), CHICKEN, rows, slice(42, 52))
            if box is not None and box[3] == 8 and box[2] <= 7:  # not partly behind a car
                assert abs(FREEWAY_CUT.y_px(box[1]) - y) <= 0.6 * 64 / 184
                seen += 1
    assert seen > 200


def test_the_ball_and_the_paddle_of_breakout_are_where_their_labels_say() -> None:
    balls = paddles = 0
    for game, [ball_x, ball_y, paddle_x] in played("breakout", 600):
        screen = game.ale.getScreenRGB()
        ball = middle(screen, RED, slice(93, 189), slice(8, 152))  # below the bricks, above the paddle
        if ball is not None and tuple(ball[2:]) == (2, 4):
            assert (BREAKOUT_CUT.x_px(ball[0]), BREAKOUT_CUT.y_px(ball[1])) == (ball_x, ball_y)
            balls += 1
        paddle = middle(screen, RED, slice(190, 193), slice(8, 152))
        if paddle is not None and paddle[2] == 16:  # without a ball, and not partly in the wall
            assert BREAKOUT_CUT.x_px(paddle[0]) == paddle_x
            paddles += 1
    assert balls > 300 and paddles > 300


def test_the_ball_and_the_paddles_of_pong_are_where_their_labels_say() -> None:
    counts = np.zeros(3, int)
    field = slice(34, 194)
    for game, [ball_x, *heights] in played("pong", 600):
        screen = game.ale.getScreenRGB()
        boxes = [middle(screen, colour, field, slice(0, 160)) for colour in (WHITE, GREEN, ORANGE)]
        for part, (box, height) in enumerate(zip(boxes, (4, 16, 16), strict=True)):
            if box is not None and box[3] == height:
                assert abs(PONG_CUT.y_px(box[1]) - heights[part]) <= 1.2 * 64 / 160
                counts[part] += 1
        if boxes[0] is not None and boxes[0][2] == 2:
            assert PONG_CUT.x_px(boxes[0][0]) == ball_x
    assert (counts > 250).all()


@pytest.mark.parametrize(("name", "least"), [("breakout", 20), ("pong", 30)])
def test_the_ball_is_visible_in_the_small_picture_at_its_label(name: str, least: int) -> None:
    """The brightest pixel around the label stands out from the median of its surroundings in nearly every frame."""
    contrasts = []
    for game, [x, y, *_] in played(name, 300):
        column, row = round(x), round(y)
        if 8 <= column < 56 and 28 <= row < 54:  # away from bricks, walls and paddles
            picture = game.picture().astype(int)
            near = picture[row - 1 : row + 2, column - 1 : column + 2].max()
            contrasts.append(near - np.median(picture[row - 4 : row + 5, column - 4 : column + 5]))
    assert len(contrasts) > 40
    assert np.quantile(contrasts, 0.02) >= least


def test_play_is_interesting() -> None:
    """A rally of Pong is more than a serve: the player returns most balls, and loses some; so in Breakout."""
    ball_x = np.array([position[0] for _, position in played("pong", 1500)])
    towards_us = np.diff(ball_x) > 0
    turns = np.flatnonzero(towards_us[:-1] & ~towards_us[1:])
    returned = (ball_x[turns + 1] > 50) & (ball_x[turns + 2] > 45)
    assert 0.5 < returned.mean() < 0.98
    heights = np.array([position[0] for _, position in played("freeway", 1500)])
    assert heights.min() < 8 and heights.max() > 58  # the chicken arrives, and starts again


@pytest.mark.slow
def test_stickiness_has_the_law_of_the_emulators_own() -> None:
    """A chicken that went down is to go up for four frames: how many are lost, by our stickiness and the emulator's."""

    def distribution(emulated: bool) -> np.ndarray:
        ale, rng = ALEInterface(), np.random.default_rng(0)
        ale.setInt("random_seed", 1)
        ale.setFloat("repeat_action_probability", STICKINESS if emulated else 0.0)
        rom = roms.get_rom_path("freeway")
        assert rom is not None
        ale.loadROM(rom)
        for _ in range(40):
            ale.act(Action.UP)
        start, counts = ale.cloneState(), np.zeros(2 * FRAME_SKIP + 1)
        for _ in range(1200):
            ale.restoreState(start)
            held = Action.DOWN
            for wanted in [Action.DOWN] * 6 + [Action.UP] * FRAME_SKIP:
                if emulated or rng.random() >= STICKINESS:
                    held = wanted
                ale.act(held)
                if wanted == Action.DOWN:
                    before = int(ale.getRAM()[14])
            counts[FRAME_SKIP - (int(ale.getRAM()[14]) - before)] += 1
        return counts / counts.sum()

    # Each of the first frames that stick costs two steps.
    expected = np.zeros(2 * FRAME_SKIP + 1)
    expected[::2] = [(1 - STICKINESS) * STICKINESS**k for k in range(FRAME_SKIP)] + [STICKINESS**FRAME_SKIP]
    for emulated in (False, True):
        assert np.abs(distribution(emulated) - expected).max() < 0.05


def test_pixels_are_means_over_areas() -> None:
    source = np.random.default_rng(0).random((152, 3))
    parts = source.repeat(64, axis=0).reshape(64, 152, 3)  # 64 equal parts of every source pixel
    assert np.allclose(area_means(source, 64), parts.mean(axis=1))
    assert Cut(14, 198, 8, 160).x_px(8 - 0.5) == -0.5 and Cut(14, 198, 8, 160).y_px(197.5) == 63.5


@pytest.mark.parametrize("name", ["freeway", "pong", "breakout"])
def test_the_first_frame_of_an_episode_is_not_that_of_the_one_before(name: str) -> None:
    """Nor is the frame after a game over, or a restored one: the console restores its memory, but not its screen."""
    fresh, used = simulator(name), simulator(name)
    fresh.restart()
    state, shown = fresh.save(), fresh.picture()
    used.restart()
    for row in np.random.default_rng(0).random((200, GAMES[name].num_chances), dtype=np.float32):
        used.step(row)
    played = used.save(), used.picture()
    assert not np.array_equal(played[1], shown)
    used.restart()
    np.testing.assert_array_equal(used.picture(), shown)
    used.restore(played[0])
    np.testing.assert_array_equal(used.picture(), played[1])
    used.restore(state)
    np.testing.assert_array_equal(used.picture(), shown)
