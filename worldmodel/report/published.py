"""Published success rates of planning to goal images, by the id of the environment here that is nearest to theirs.

None of them was measured here. Pictures, data, starts and planners differ, and mostly the environment itself: each row
says what it is of. A source is a file of the authors' repository at a commit, unless the row says otherwise. To add a
figure, add a row here and in docs/results.md; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worldmodel.report.numbers import DASH, Number, Numbers, between, mapping, number, number_at, numbers_at
from worldmodel.runs.metrics import RunMetrics, value_at


@dataclass(frozen=True)
class Published:
    """A share of successes in [0, 1] as text, with the spread that its source states; its setting; its source."""

    model: str
    success: str
    setting: str
    source: str


_SEEN = "224 px, goals 25 steps after starts, of episodes that training saw, budget 50"
_CEM = "CEM, 300 candidates, 5 steps of 5 actions, all executed"
_BASELINES = "stable-worldmodel, docs/baselines.md, addbab4"
_SUB_JEPA = "Sub-JEPA, README.md, bf21e0c"
_GC_IDM = "GC-IDM (arXiv 2605.08732), README.md, 0dca8eb"
_OF_STABLE_WORLDMODEL = (
    ("LeWM", f"{_SEEN}, 50 episodes; {_CEM}", _BASELINES),
    ("PLDM", f"{_SEEN}, 50 episodes", _BASELINES),
    ("DINO-WM", f"{_SEEN}, 50 episodes; {_CEM}", _BASELINES),
    ("GCBC on DINOv2", f"{_SEEN}, 50 episodes; no search", _BASELINES),
    ("LeWM, trained again", f"{_SEEN}, 6 evaluation seeds; {_CEM}", _SUB_JEPA),
    ("Sub-JEPA", f"{_SEEN}, 6 evaluation seeds; {_CEM}", _SUB_JEPA),
    ("GC-IDM on LeWM", "224 px, 200 episodes; no search", _GC_IDM),
)
"""Models, their settings in any environment of stable-worldmodel, and sources."""


def _stable_worldmodel(world: str, *success: str | None) -> list[Published]:
    """Return the rows of an environment, for the success of each model; None where a source has none."""
    rows = zip(_OF_STABLE_WORLDMODEL, success, strict=True)
    return [Published(model, rate, f"{world}, {rest}", source) for (model, rest, source), rate in rows if rate]


_U_MAZE = (
    "D4RL's U-shaped maze (7 free cells), MuJoCo's pictures, 224 px, drawn starts and goals, 96 episodes; "
    "CEM, 6 steps of 5 actions"
)
_JEPA_WMS = "jepa-wms (arXiv 2512.24497) by secondary reports; the setting from its configs, 6eafb14"
PUBLISHED: dict[str, Sequence[Published]] = {
    "worldmodel/TwoRooms-v0": [
        Published(
            "eb_jepa",
            "0.97 ± 0.02",
            "eb_jepa's two rooms, random wall, drawn goals, 20 episodes x 3 training seeds x 3 checkpoints; MPPI",
            "eb_jepa, examples/ac_video_jepa/README.md, 966e61e",
        ),
    ],
    "worldmodel/SwmTwoRoom-v0": _stable_worldmodel(
        "the same environment",
        *("0.87", "0.97", "1.00", "1.00", "0.843 ± 0.042", "0.950 ± 0.028", "1.000"),
    ),
    "worldmodel/PushT-v0": _stable_worldmodel(
        "PushT of stable-worldmodel, data of another expert",
        *("0.96", "0.78", "0.74", "0.75", "0.847 ± 0.065", "0.890 ± 0.053", "0.842"),
    ),
    "worldmodel/Reacher-v0": _stable_worldmodel(
        "Reacher of stable-worldmodel, MuJoCo's pictures, other data",
        *("0.86", "0.78", "0.79", None, "0.827 ± 0.044", "0.840 ± 0.040", "0.997"),
    ),
    "worldmodel/Cube-v0": _stable_worldmodel(
        "OGBench's cube-single in stable-worldmodel, OGBench's camera, solved starts count, other data",
        *("0.74", "0.65", "0.86", "0.84", "0.673 ± 0.050", "0.763 ± 0.060", "0.987"),
    ),
    "worldmodel/PointMaze-v0": [
        Published("jepa-wms", "0.839", _U_MAZE, _JEPA_WMS),
        Published("DINO-WM, trained by jepa-wms", "0.816", _U_MAZE, _JEPA_WMS),
    ],
}


def published_for(metrics: RunMetrics) -> Sequence[Published]:
    """Return the published rows for the environment that a run has planned in; none if there are none."""
    return PUBLISHED.get(str(value_at(metrics, "planning.protocol.env")).rpartition(":")[2], ())


def own_success(metrics: RunMetrics) -> Numbers:
    """Return the success of a run with its interval."""
    interval = between(numbers_at(metrics, "planning.ci95"), " to ")
    return [number_at(metrics, "planning.success_rate"), Number(" ("), *interval, Number(")")]


def own_setting(metrics: RunMetrics) -> str:
    """Return the setting of a run's planning, in the words of the published rows."""
    protocol = mapping(value_at(metrics, "planning.protocol"))
    planning = mapping(protocol.get("planning"))
    kwargs = "".join(f", {name}={value}" for name, value in mapping(protocol.get("env_kwargs")).items())
    recorded = protocol.get("protocol") == "recorded"
    offset = f"goals {number(protocol.get('offset'))} steps after starts, of held-out episodes"
    episodes = f"{number(protocol.get('seeds'))} x {number(protocol.get('episodes'))} episodes"
    planner = planning.get("planner")
    block, executed = protocol.get("block") or 1, planning.get("replan_every") or 1
    search = (
        f"{mapping(planner).get('name') or planner or DASH}, {number(planning.get('candidates'))} candidates, "
        f"{number(planning.get('horizon'))} steps of {number(block)} action{'s' * (block != 1)}, "
        f"{'one step' if executed == 1 else f'{number(executed)} steps'} executed"
    )
    return (
        f"{str(protocol.get('env')).rpartition('/')[2]}{kwargs}, {offset if recorded else 'drawn starts and goals'}, "
        f"budget {number(protocol.get('budget'))}, {episodes}; "
        f"{'no search' if protocol.get('policy') == 'gc' else search}"
    )
