import numpy as np
import pytest

pytest.importorskip("highway_env")

from data_pipelines.worlds import highway
from data_pipelines.worlds.games import GAMES
from data_pipelines.worlds.highway import BRIGHT_CAR, LANE_M, MEAN_SPEED, NUM_LANES, OWN_CAR, SPEED_RANGE, Highway

STEPS = 600


def test_cars_are_where_their_labels_say() -> None:
    """The centroids of the pixels that are brighter than other cars, and of the brightest ones."""
    game, rng = Highway(), np.random.default_rng(0)
    game.restart()
    compared = 0
    for _ in range(STEPS):
        game.step(rng.random(GAMES["highway"].num_chances, dtype=np.float32))
        x, y, own_y = game.labels()["position"]
        picture = game.picture().astype(float)
        own = picture[:, 29:35].max(axis=1)
        if abs(x - 31.5) < 8 or not 4 < x < 59:
            continue
        own_rows = np.flatnonzero((own > 160) & (own <= OWN_CAR))
        assert abs(own_rows.mean() - own_y) <= 0.5
        rows, columns = np.nonzero(picture > OWN_CAR + 10)
        assert picture.max() == BRIGHT_CAR
        assert abs(rows.mean() - y) <= 0.6 and abs(columns.mean() - x) <= 0.6
        compared += 1
    assert compared > STEPS / 6


def test_drivers_change_speed_and_lane_and_stay_near() -> None:
    game, rng = Highway(), np.random.default_rng(1)
    game.restart()
    lanes, speeds, places, traffic = set(), [], [], []
    for _ in range(2 * STEPS):
        game.step(rng.random(GAMES["highway"].num_chances, dtype=np.float32))
        own = game.drivers[0].car
        lanes.add(own.lane_index[2])
        speeds.append(own.speed)
        labels = game.labels()
        places.append(labels["position"])
        traffic.append(labels["traffic"])
        assert not any(driver.car.crashed for driver in game.drivers)
    assert len(lanes) >= 3
    assert MEAN_SPEED - 2 * SPEED_RANGE < np.mean(speeds) < MEAN_SPEED + SPEED_RANGE and np.std(speeds) > 0.5
    x = np.array(places)[:, 0]
    assert ((x >= 0) & (x < 64)).mean() > 0.95 and x.std() > 3
    ahead = np.array(traffic)[:, ::2]
    half = highway.STRETCH_M / 2 / highway.ALONG_M_PER_PX
    assert (np.abs(ahead - 31.5) < half + 15).mean() > 0.99
    y = np.array(places)[:, 1:]
    assert y.min() > 8 and y.max() < 56  # within the four lanes


def test_without_chance_nobody_changes_their_mind() -> None:
    game = Highway()
    game.restart()
    for _ in range(50):
        game.step(np.full(GAMES["highway"].num_chances, 0.5, np.float32))
    assert all(driver.deviation == 0 for driver in game.drivers)
    assert all(driver.car.target_lane_index[2] in range(NUM_LANES) for driver in game.drivers)
    assert all(
        abs(driver.car.position[1] / LANE_M - round(driver.car.position[1] / LANE_M)) < 0.5 for driver in game.drivers
    )
