"""Scripted policies for PushT: one that pushes the block to its goal, and one that pushes it anywhere.

Without friction, a disc that touches the block at a point with inward normal n and lever arm d = r x n pushes it along
the twist (n, d / L) in the coordinates (x, y, L * angle) of its centre of mass, L^2 = moment / mass. The expert chooses
the contact whose twist removes most of the error in these coordinates per expected step, goes round the block to it,
pushes until nothing is left to gain there, and chooses again. At last it takes the disc to its own goal.

Each episode has a tempo. Its range makes episodes as long as those of people: the 206 demonstrations of Diffusion
Policy (arXiv 2303.04137) have 25,650 frames, 125 each. Recorded goals some steps away are then as far away, too.

Contacts and ways round the block are in the block's frame, where the T does not move.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.worlds.policies import Policy
from data_pipelines.worlds.push_t_law import (
    ACTION_UNITS,
    AGENT_RADIUS,
    CANVAS,
    CENTRE_OF_MASS,
    DAMPING,
    MASS,
    MOMENT,
    OUTLINE,
    STIFFNESS,
    SUB_STEP_S,
    SUB_STEPS,
    angle_between,
    block_distance,
    rotated,
    to_block,
    to_canvas,
)
from data_pipelines.worlds.shapes import Array

ARM = float(np.sqrt(MOMENT / MASS))
"""L, units: a turn by 1 rad counts as much as a shift by L."""
GAP = 4.0  # of the disc from the block on its way
SPACING = 5.0  # of the contacts on the outline
TRAVEL_SPEED, PUSH_SPEED = 30.0, 14.0  # units per step at tempo 1
TEMPO = 0.35, 0.65  # range from which an episode's is drawn, uniformly
OVERHEAD_STEPS = 4.0  # per contact, of slowing down and touching
DONE_UNITS = 5.0  # error of the block that the expert leaves
LEAST_GAIN = 1.0
PATIENCE = 5  # steps without progress before another contact is tried
MAX_APPROACH_STEPS = 40
EXPERT_NOISE, WEAK_NOISE = 0.05, 0.15


# ------------------------------------------------------------------------------------------------ contacts and ways


@dataclass(frozen=True)
class Contacts:
    """N places at which the disc can touch the block, in the block's frame: the disc's centre, and the inward normal.

    centres, normals [N, 2]; levers [N], the normal's moment about the centre of mass; before [N, 2], a gap away.
    """

    centres: Array
    normals: Array
    levers: Array

    @property
    def before(self) -> Array:
        return self.centres - GAP * self.normals


def contacts() -> Contacts:
    """Return contacts every 5 units along the outline, but for those that the disc cannot reach."""
    points, normals = [], []
    for start, end in zip(OUTLINE, np.roll(OUTLINE, -1, axis=0), strict=True):
        length = float(np.linalg.norm(end - start))
        along = (end - start) / length
        places = np.linspace(SPACING / 2, length - SPACING / 2, int(length / SPACING))
        points.append(start + places[:, None] * along)
        normals.append(np.broadcast_to(rotated(along, np.pi / 2), points[-1].shape))
    point, normal = np.concatenate(points), np.concatenate(normals)
    arm = point - CENTRE_OF_MASS
    levers = arm[:, 0] * normal[:, 1] - arm[:, 1] * normal[:, 0]
    centres = point - AGENT_RADIUS * normal
    free = block_distance(centres - GAP * normal) > AGENT_RADIUS + GAP - 1e-6
    return Contacts(centres[free], normal[free], levers[free])


CONTACTS = contacts()

_CONVEX = np.array([0, 1, 2, 4, 5, 7])
_OUTWARD = np.array([[-1, -1], [1, -1], [1, 1], [1, 1], [-1, 1], [-1, 1]])
BENDS = OUTLINE[_CONVEX] + (AGENT_RADIUS + 2 * GAP) * _OUTWARD
"""Corners of paths around the block, [6, 2]."""


def is_clear(starts: Array, ends: Array, gap: float = GAP - 1.0) -> NDArray[np.bool_]:
    """Return whether the disc keeps a gap from the block on straight lines from starts to ends, [..., 2] -> [...]."""
    fractions = np.linspace(0, 1, 25)[:, None]
    points = starts[..., None, :] + fractions * (ends - starts)[..., None, :]
    return np.all(block_distance(points) > AGENT_RADIUS + gap, axis=-1)


def pushed_off(point: Array, gap: float = GAP) -> Array:
    """Return the point [2], moved away from the block until the disc is a gap from it."""
    for _ in range(4):
        lacking = AGENT_RADIUS + gap - float(block_distance(point))
        if lacking <= 0:
            break
        eps = 1e-3 * np.eye(2)
        slope = block_distance(point + eps) - block_distance(point - eps)
        point = point + lacking * slope / max(float(np.linalg.norm(slope)), 1e-9)
    return point


def ways(start: Array, ends: Array, usable: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return the lengths of the shortest ways from start [2] to ends [N, 2], and the first points on them, [N, 2].

    They bend at the usable ones among BENDS, bool [6]. The length is infinite if there is no way.
    """
    cost = np.where(is_clear(BENDS[:, None], BENDS[None]), _apart(BENDS[:, None], BENDS[None]), np.inf)
    cost[~usable] = np.inf
    cost[:, ~usable] = np.inf
    for middle in range(len(BENDS)):  # Floyd and Warshall
        cost = np.minimum(cost, cost[:, middle, None] + cost[None, middle])
    out = np.where(is_clear(start, BENDS) & usable, _apart(start, BENDS), np.inf)
    home = np.where(is_clear(BENDS[:, None], ends[None]), _apart(BENDS[:, None], ends[None]), np.inf)
    over = out[:, None] + (cost[:, :, None] + home[None]).min(axis=1)  # [first bend, end]
    first = over.argmin(axis=0)
    direct = np.where(is_clear(start, ends), _apart(start, ends), np.inf)
    straight = direct <= over.min(axis=0)
    return np.minimum(direct, over.min(axis=0)), np.where(straight[:, None], ends, BENDS[first])


def _apart(points: Array, others: Array) -> Array:
    return np.linalg.norm(points - others, axis=-1)


# ------------------------------------------------------------------------------------------------ control


def response() -> tuple[float, float]:
    """Return the disc's motion in a step per unit of distance to its target, and per unit/s of its velocity."""
    step = np.eye(2)
    for _ in range(SUB_STEPS):  # of (position - target, velocity); the velocity changes first
        kick = np.array([[1, 0], [-STIFFNESS * SUB_STEP_S, 1 - DAMPING * SUB_STEP_S]])
        step = np.array([[1, SUB_STEP_S], [0, 1]]) @ kick @ step
    return float(1 - step[0, 0]), float(step[0, 1])


PER_DISTANCE, PER_VELOCITY = response()


def action_towards(place: Array, state: NDArray[Any], speed: float) -> Array:
    """Return the action [2] that takes the disc in a step towards a place on the canvas, at most `speed` units."""
    ahead = place - state[:2]
    ahead = ahead * min(1.0, speed / max(float(np.linalg.norm(ahead)), 1e-9))
    distance = (ahead - PER_VELOCITY * state[5:7]) / PER_DISTANCE
    return np.clip(distance / ACTION_UNITS, -1, 1)


def pushed(state: NDArray[Any], contact: int, units: float) -> Array:
    """Return the pose [5] after the disc has pushed by `units` along the normal of a contact, to first order."""
    pose = np.asarray(state[:5], np.float64).copy()
    normal, lever = rotated(CONTACTS.normals[contact], pose[4]), CONTACTS.levers[contact]
    shift = units / (1 + (lever / ARM) ** 2)
    centre = to_canvas(CENTRE_OF_MASS, pose) + shift * normal
    pose[4] += shift * lever / ARM**2
    pose[2:4] = centre - rotated(CENTRE_OF_MASS, pose[4])
    return pose


def gains(state: NDArray[Any], goal: NDArray[Any]) -> tuple[float, Array]:
    """Return the block's error in (x, y, L * angle), units, and the part of it along the twist of each contact, [N]."""
    shift = to_canvas(CENTRE_OF_MASS, goal) - to_canvas(CENTRE_OF_MASS, state)
    error = np.array([*shift, ARM * angle_between(goal[4], state[4])])
    twists = np.column_stack([rotated(CONTACTS.normals, float(state[4])), CONTACTS.levers / ARM])
    return float(np.linalg.norm(error)), twists @ error / np.linalg.norm(twists, axis=1)


class Stroke:
    """One contact: the way of the disc to it, then a push for as long as its owner likes."""

    def __init__(self, contact: int, tempo: float) -> None:
        self.contact, self.tempo = contact, tempo
        self.is_pushing = False
        self.steps = 0  # of the way, then of the push

    def action(self, state: NDArray[Any], units: float) -> Array:
        """Return the next action [2]; units: how far the contact shall still be pushed."""
        self.steps += 1
        if not self.is_pushing:
            place = CONTACTS.before[self.contact]
            if _apart(_disc(state), place) > GAP:
                return travel(state, place, self.tempo)
            self.is_pushing, self.steps = True, 0
        pose = pushed(state, self.contact, min(units, self.tempo * PUSH_SPEED))
        return action_towards(to_canvas(CONTACTS.centres[self.contact], pose), state, CANVAS)

    def has_failed(self, state: NDArray[Any]) -> bool:
        """Return whether the disc takes too long, or has slipped off."""
        if not self.is_pushing:
            return self.steps > MAX_APPROACH_STEPS
        return bool(_apart(_disc(state), CONTACTS.centres[self.contact]) > 3 * GAP)


def travel(state: NDArray[Any], place: Array, tempo: float) -> Array:
    """Return the action [2] that takes the disc round the block towards a place [2] in the block's frame."""
    speed = tempo * TRAVEL_SPEED
    here = _disc(state)
    start, end = pushed_off(here), pushed_off(place)
    if _apart(start, here) > 1:  # away from the block, or straight to a place at it
        near = _apart(here, place) < _apart(here, start) + GAP
        return action_towards(to_canvas(place if near else start, state), state, speed)
    first = place if _apart(here, end) < 1 else ways(start, end[None], usable(state))[1][0]
    return action_towards(to_canvas(first, state), state, min(speed, 1 + 0.7 * float(_apart(here, first))))


def usable(state: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which of BENDS are on the canvas, bool [6]."""
    return _on_canvas(to_canvas(BENDS, state))


def reachable(state: NDArray[Any]) -> Array:
    """Return the lengths of the ways from the disc to all contacts, [N]; infinite if there is none on the canvas."""
    lengths, _ = ways(pushed_off(_disc(state)), CONTACTS.before, usable(state))
    return np.where(_on_canvas(to_canvas(CONTACTS.before, state)), lengths, np.inf)


def _on_canvas(places: Array) -> NDArray[np.bool_]:
    return np.all((places > 0) & (places < CANVAS), axis=-1)


def _disc(state: NDArray[Any]) -> Array:
    return to_block(np.asarray(state[:2], np.float64), state)


# ------------------------------------------------------------------------------------------------ policies


def expert(rng: np.random.Generator, noise: float = EXPERT_NOISE) -> Policy:
    """Return a policy that pushes the block to info["goal"] and then takes the disc there.

    noise: standard deviation of what is added to each action, normally distributed.
    """
    tempo = rng.uniform(*TEMPO)
    stroke: Stroke | None = None
    best, since_best = np.inf, 0  # the least error during a push, and the steps since then
    tried: set[int] = set()  # contacts that moved nothing

    def act(observation: Any, info: Mapping[str, Any]) -> NDArray[np.float32]:
        nonlocal stroke, best, since_best
        state, goal = info["state"], info["goal"]
        error, gain = gains(state, goal)
        if stroke is not None and stroke.is_pushing:
            best, since_best = (error, 0) if error < best - 0.5 else (best, since_best + 1)
            if since_best >= PATIENCE:
                tried.add(stroke.contact)
            elif since_best == 0:
                tried.clear()
        over = stroke is not None and (
            stroke.has_failed(state) or since_best >= PATIENCE or gain[stroke.contact] < LEAST_GAIN
        )
        if stroke is None or over:
            stroke, best, since_best = _next_stroke(state, error, gain, tried, tempo), np.inf, 0
        if stroke is None:
            tried.clear()
            action = travel(state, to_block(np.asarray(goal[:2], np.float64), state), tempo)
        else:
            twist = np.hypot(1, CONTACTS.levers[stroke.contact] / ARM)
            action = stroke.action(state, max(0.0, gain[stroke.contact]) * twist)
        return _noisy(action, noise, rng)

    return act


def _next_stroke(state: NDArray[Any], error: float, gain: Array, tried: set[int], tempo: float) -> Stroke | None:
    """Return the stroke that removes most error per step; None if the error is small enough."""
    if error < DONE_UNITS:
        return None
    gain = gain.clip(0, error)
    removed = error - np.sqrt(error**2 - gain**2)
    pace = removed / (OVERHEAD_STEPS + (reachable(state) / TRAVEL_SPEED + gain / PUSH_SPEED) / tempo)
    pace[list(tried)] = 0
    contact = int(pace.argmax())
    return Stroke(contact, tempo) if pace[contact] > 0 and gain[contact] > LEAST_GAIN else None


def weak(rng: np.random.Generator, noise: float = WEAK_NOISE) -> Policy:
    """Return a policy that knows no goal: it pushes for 3 to 15 steps at one contact after another, drawn uniformly."""
    tempo = rng.uniform(*TEMPO)
    stroke: Stroke | None = None
    length, speed = 0, 0.0

    def act(observation: Any, info: Mapping[str, Any]) -> NDArray[np.float32]:
        nonlocal stroke, length, speed
        state = info["state"]
        if stroke is None or stroke.has_failed(state) or (stroke.is_pushing and stroke.steps >= length):
            within = np.flatnonzero(np.isfinite(reachable(state)))
            stroke = Stroke(int(rng.choice(within if len(within) else len(CONTACTS.levers))), tempo)
            length, speed = int(rng.integers(3, 16)), tempo * PUSH_SPEED * rng.uniform(0.3, 1)
        return _noisy(stroke.action(state, speed), noise, rng)

    return act


def _noisy(action: Array, noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    return np.clip(action + rng.normal(0, noise, 2), -1, 1).astype(np.float32)
