"""A motorway of four lanes with drivers who change their minds, simulated by highway-env (Leurent, 2018).

Cars accelerate by the Intelligent Driver Model (Treiber et al., arXiv cond-mat/0002177) and change lanes by MOBIL, as
highway-env's IDMVehicle does. That is deterministic. What is random is ours: in each frame, with probability 0.05, a
driver draws another desired speed, and with probability 0.02 moves to a neighbouring lane that is free.

The camera travels with our own car, which stays at the middle of the picture from left to right. One other car, the
brightest, keeps near to it: it wants our speed, corrected by the distance. These two make up the quantity. Five more
cars are traffic: who falls behind the stretch of road that is simulated enters it again in front, and the other way
round. Cars do not collide.

A picture shows 96 m of the road, and all lanes: 1.5 m per px along the road, 0.3 m per px across.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from highway_env.road.road import Road, RoadNetwork
from highway_env.vehicle.behavior import IDMVehicle
from numpy.typing import NDArray

from data_pipelines.worlds.games import GAMES, SIZE_PX, Chance, Picture

FRAME_S = 0.1
NUM_LANES, LANE_M = 4, 4.0
LENGTH_M, WIDTH_M = IDMVehicle.LENGTH, IDMVehicle.WIDTH
ALONG_M_PER_PX, ACROSS_M_PER_PX = 1.5, 0.3
VIEW_M = SIZE_PX * ALONG_M_PER_PX
STRETCH_M = 160.0  # of the road that is simulated, with our car in the middle
FREE_M = 12.0  # distance to the next car in a lane that counts as free

MEAN_SPEED, SPEED_RANGE = 25.0, 4.0  # desired speeds are uniform in mean +- range, m/s
NEW_SPEED, NEW_LANE = 0.05, 0.02  # probabilities per frame
COMPANION_PER_S = 0.5  # correction of the bright car's speed, m/s per m of distance

ROAD, MARKING, CAR, OWN_CAR, BRIGHT_CAR = 50, 90, 130, 190, 255  # gray levels
DASH_M, DASH_PERIOD_M = 4.0, 12.0

_KEPT = ("heading", "speed", "target_lane_index", "target_speed", "timer", "lane_index", "lane")


@dataclass
class Driver:
    """A car, and the deviation of its driver's desired speed from the usual one, m/s."""

    car: IDMVehicle
    deviation: float = 0.0


class Highway:
    """The motorway (data_pipelines.worlds.games.Simulator). Chance: one number per driver.

    drivers: our own, that of the bright car, and the others.
    """

    def __init__(self) -> None:
        # The road is so long that no recording reaches its end.
        network = RoadNetwork.straight_road_network(NUM_LANES, length=1e6, speed_limit=2 * MEAN_SPEED)
        self.road = Road(network, np_random=np.random.RandomState(0))
        self.drivers = [Driver(self._car(number)) for number in range(GAMES["highway"].num_chances)]
        self.road.vehicles = [driver.car for driver in self.drivers]
        self._start = self.save()

    def _car(self, number: int) -> IDMVehicle:
        along = STRETCH_M + (-1) ** number * 18.0 * number  # our car, then alternately behind and in front of it
        car = IDMVehicle(self.road, [along, LANE_M * (number % NUM_LANES)], speed=MEAN_SPEED, timer=number / 10 + 0.05)
        car.check_collisions = False
        return car

    def restart(self) -> None:
        self.restore(self._start)

    def step(self, chance: Chance) -> None:
        own = self.drivers[0].car
        for driver, number in zip(self.drivers, chance.tolist(), strict=True):
            if number < NEW_SPEED:
                driver.deviation = SPEED_RANGE * (2 * number / NEW_SPEED - 1)
            elif number >= 1 - NEW_LANE:
                self._move_over(driver.car, -1 if number < 1 - NEW_LANE / 2 else 1)
            driver.car.target_speed = MEAN_SPEED + driver.deviation
        ahead = self._ahead(self.drivers[1].car)
        self.drivers[1].car.target_speed = own.speed + self.drivers[1].deviation - COMPANION_PER_S * ahead
        self.road.act()
        self.road.step(FRAME_S)
        for driver in self.drivers[2:]:
            self._enter_again(driver.car)

    def _ahead(self, car: IDMVehicle) -> float:
        """Return how far a car is in front of our own, m."""
        return float(car.position[0] - self.drivers[0].car.position[0])

    def _move_over(self, car: IDMVehicle, lanes: int) -> None:
        start, end, lane = car.target_lane_index
        if car.lane_index == car.target_lane_index and 0 <= lane + lanes < NUM_LANES:
            wanted = (start, end, lane + lanes)
            if self._is_free(car, wanted, car.position[0]):
                car.target_lane_index = wanted

    def _is_free(self, car: IDMVehicle, lane: tuple[str, str, int], along_m: float) -> bool:
        """Return whether no other car is in a lane, or on the way to it, near a place."""
        return not any(
            lane in (other.lane_index, other.target_lane_index) and abs(other.position[0] - along_m) < FREE_M
            for other in self.road.vehicles
            if other is not car
        )

    def _enter_again(self, car: IDMVehicle) -> None:
        ahead = self._ahead(car)
        if abs(ahead) > STRETCH_M / 2:
            along = car.position[0] - np.sign(ahead) * STRETCH_M
            if self._is_free(car, car.lane_index, along):
                car.position = np.array([along, car.position[1]])

    def save(self) -> Any:
        return [
            (
                driver.deviation,
                driver.car.position.copy(),
                dict(driver.car.action),
                {name: getattr(driver.car, name) for name in _KEPT},
            )
            for driver in self.drivers
        ]

    def restore(self, state: Any) -> None:
        for driver, (deviation, position, action, kept) in zip(self.drivers, state, strict=True):
            driver.deviation, driver.car.position, driver.car.action = deviation, position.copy(), dict(action)
            vars(driver.car).update(kept)

    def labels(self) -> dict[str, list[float]]:
        """Return the position (x, y) of the bright car and the y of ours; and those of the traffic, (x, y) each."""
        places = [[_x_px(self._ahead(driver.car)), _y_px(driver.car.position[1])] for driver in self.drivers]
        own, bright, *others = places
        return {"position": [*bright, own[1]], "traffic": [number for place in others for number in place]}

    def picture(self) -> Picture:
        """Return the road with its cars, as rectangles along it. Pixels are means over their areas."""
        own_m = self.drivers[0].car.position[0]
        picture = np.full((SIZE_PX, SIZE_PX), float(ROAD))
        for line in range(NUM_LANES + 1):
            solid = line in (0, NUM_LANES)
            across = _covered(_y_px(LANE_M * (line - 0.5)), 0.3 / ACROSS_M_PER_PX)
            first = np.floor((own_m - VIEW_M) / DASH_PERIOD_M) * DASH_PERIOD_M
            dashes = np.arange(first, own_m + VIEW_M, DASH_PERIOD_M)
            along = sum(_covered(_x_px(dash - own_m), DASH_M / ALONG_M_PER_PX) for dash in dashes)
            _paint(picture, across, np.ones(SIZE_PX) if solid else np.asarray(along), MARKING)
        for number, driver in reversed(list(enumerate(self.drivers))):
            across = _covered(_y_px(driver.car.position[1]), WIDTH_M / ACROSS_M_PER_PX)
            along = _covered(_x_px(self._ahead(driver.car)), LENGTH_M / ALONG_M_PER_PX)
            _paint(picture, across, along, (OWN_CAR, BRIGHT_CAR)[number] if number < 2 else CAR)
        return picture.round().astype(np.uint8)


def _x_px(ahead_m: float) -> float:
    return round((ahead_m + VIEW_M / 2) / ALONG_M_PER_PX - 0.5, 3)


def _y_px(across_m: float) -> float:
    """Convert m from the middle of the first lane to px."""
    margin_m = (SIZE_PX * ACROSS_M_PER_PX - NUM_LANES * LANE_M) / 2
    return round((across_m + LANE_M / 2 + margin_m) / ACROSS_M_PER_PX - 0.5, 3)


def _covered(middle_px: float, length_px: float) -> NDArray[np.float64]:
    """Return the share of each pixel that an interval covers, [SIZE_PX]."""
    pixels = np.arange(SIZE_PX)
    low, high = middle_px - length_px / 2, middle_px + length_px / 2
    return (np.minimum(pixels + 0.5, high) - np.maximum(pixels - 0.5, low)).clip(0, 1)


def _paint(picture: NDArray[Any], across: NDArray[Any], along: NDArray[Any], gray: int) -> None:
    cover = np.outer(across, along)
    picture += cover * (gray - picture)


def simulator(name: str) -> Highway:
    """Return the simulator of the motorway."""
    return Highway()
