"""Made-up metrics and illustrations of an evaluated run, for the tests of what is written from them."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from worldmodel.evaluation.decoded import DecodedFutures
from worldmodel.evaluation.illustrations import Fans, Illustrations, Latents
from worldmodel.evaluation.surprise import Timeline
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.report.drawing import Picture
from worldmodel.runs.metrics import is_declared

ONE_FUTURE = ("prior_mean", "no_latent", "pixel_constant_velocity", "persistence")
RATIOS = {
    "model": 1.1021,
    "prior_mean": 1.5279,
    "shuffled_r": 1.2461,
    "no_latent": 1.8968,
    "pixel_constant_velocity": 1.3334,
    "persistence": 2.7063,
    "encode_decode_oracle": 1.0398,
    "simulator_oracle": 1.0,
}


def make_scores(name: str, ratio: float, num_steps: int, num_dimensions: int, *, oracle: bool) -> dict[str, Any]:
    steps = np.arange(1, num_steps + 1)
    errors = 0.5982 * ratio * (1 + 0.45 * (steps - 1))
    many = name not in ONE_FUTURE
    level = {"50": 0.47, "80": 0.765, "90": 0.881}
    bins = np.array([0.14, 0.11, 0.09, 0.08, 0.08, 0.08, 0.09, 0.09, 0.11, 0.13])
    return {
        "energy_score": errors.tolist(),
        **({"ratio_to_oracle": (ratio + 0.01 * (steps - 1)).tolist()} if oracle else {}),
        "crps": [[float(e * (0.6 + 0.03 * k)) for k in range(num_dimensions)] for e in errors],
        "best_of": (errors / 3).tolist(),
        "coverage": {
            key: [[v - 0.006 * h + 0.011 * k for k in range(num_dimensions)] for h in range(num_steps)]
            for key, v in level.items()
        }
        if many
        else None,
        "width": {
            key: [[2 * v + h for _ in range(num_dimensions)] for h in range(num_steps)] for key, v in level.items()
        }
        if many
        else None,
        "spread_skill": (0.97 - 0.02 * (steps - 1) * (ratio - 0.9)).tolist() if many else None,
        "rank_histogram": [bins.tolist()] * num_steps if many else None,
    }


def make_metrics(num_steps: int = 8) -> Any:
    """Of a run on a world with labels and a known law."""
    steps = np.arange(1, num_steps + 1)
    embedding = {"model": 0.4321, "prior_mean": 0.5678, "persistence": 0.9512, "climatology": 0.8765}
    probes = ("linear", "knn", "mlp", "few_shot_1", "few_shot_5", "few_shot_10")
    return {
        "run": "demo",
        "seed": 17,
        "queries": 1024,
        "queries_sha256": "0123456789abcdef",
        "num_samples": 64,
        "train": {"seconds": 211.4, "steps": 1200},
        "kl_nats": 2.3456,
        "horizon": num_steps,
        "segment_frames": 3,
        "space": "centroid, px",
        "quantity": {"name": "centroid", "unit": "px", "dimensions": ["x", "y"]},
        "forecasts": {name: make_scores(name, ratio, num_steps, 2, oracle=True) for name, ratio in RATIOS.items()},
        "embedding": {
            "forecasts": {
                name: make_scores(name, value, num_steps, 1, oracle=False) for name, value in embedding.items()
            },
            "retrieval": {
                "distractors": 1023,
                "forecasts": {
                    name: {
                        key: (base / (1 + 0.3 * (steps - 1)) * scale).tolist()
                        for key, scale in (("mrr", 0.5), ("hit_1", 0.3), ("hit_5", 0.7), ("hit_10", 0.9))
                    }
                    for name, base in (("model", 0.9), ("prior_mean", 0.8), ("persistence", 0.3))
                },
            },
            "effective_rank": 37.2111,
            "std": 0.9871,
        },
        "readout": {"strength": 0.01, "r2": [0.9812, 0.9854]},
        "beyond_fit_norm_99": (0.0125 * steps).tolist(),
        "probes": {
            name: {
                target: {probe: round(base - 0.03 * i, 4) for i, probe in enumerate(probes)}
                for target in ("digit", "velocity", "velocity_change")
            }
            for name, base in (("backbone", 0.93), ("embedding", 0.9437), ("r", 0.41), ("embedding_and_r", 0.9591))
        },
    }


def make_unlabelled_metrics(num_steps: int = 8) -> Any:
    """The same run where nothing is known but the video."""
    metrics = make_metrics(num_steps)
    forecasts = metrics["embedding"]["forecasts"]
    kept = {key: value for key, value in metrics.items() if key not in ("readout", "probes", "beyond_fit_norm_99")}
    return kept | {"space": "embedding", "quantity": None, "forecasts": forecasts}


def make_planning(labels: tuple[int, ...] = (100, 1000, 10_000)) -> Any:
    """planning.json of a run whose actions were decoded by `labels`, or that was trained on actions."""

    def scores(rate: float, *, steps: float | None = None) -> dict[str, Any]:
        found = {
            "success_rate": rate,
            "ci95": [rate - 0.0631, rate + 0.0417],
            "per_seed": [rate - 0.02, rate, rate + 0.02],
            "ms_per_decision": 12.3456 * rate,
        }
        return found if steps is None else found | {"path_ratio": 1.2345, "steps": steps}

    protocol = {
        "env": "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0",
        "env_kwargs": {},
        "seeds": 3,
        "episodes": 1250,
        "budget": 50,
        "first_seed": 0,
        "planning": {"planner": "icem", "horizon": 20, "init_std": 0.5, "risk_quantile": None, "num_samples": 4},
        "step": 3000,
        "labels": labels[-1] if labels else None,
    }
    curve = [{"labels": count, **scores(0.9 - 0.1 * (len(labels) - i))} for i, count in enumerate(labels)]
    return {
        **scores(0.8, steps=17.25),
        "random_floor": scores(0.132, steps=45.3),
        "oracle_ceiling": scores(0.95, steps=9.1),
        "protocol": protocol,
        **({"curve": curve} if labels else {}),
    }


def make_factors(named: str = "background") -> Any:
    """Factors of planning.json: one whose values are numbers, and one whose values are names."""

    def scores(place: int) -> dict[str, Any]:
        return {"success_rate": 0.9 - 0.2 * place, "ci95": [0.85 - 0.2 * place, 0.92 - 0.2 * place]}

    return [
        {"factor": "noise", "present": 0.0, "values": [{"value": 10 * i, **scores(i)} for i in range(3)]},
        {"factor": named, "present": named, "values": [{"value": f"{named} {i}", **scores(i)} for i in range(2)]},
    ]


def make_episodes(
    count: int = 2, *, size_px: int = 32, num_steps: int = 6, positions: bool = True, texture: bool = False
) -> list[PlannedEpisode]:
    """A bright dot goes straight to a goal, which the last episode fails to reach; plans wander around its way."""
    rng = np.random.default_rng(1)
    episodes = []
    for number in range(count):
        begin, goal = rng.uniform(4, size_px - 4, (2, 2))
        share = np.linspace(0, 1 if number < count - 1 else 0.5, num_steps + 1)[:, None]
        way = (begin + share * (goal - begin)).astype(np.float32)

        def picture(point: np.ndarray) -> np.ndarray:
            frame = rng.integers(0, 256, (3, size_px, size_px)) if texture else np.zeros((3, size_px, size_px))
            x, y = point.round().astype(int)
            frame[1, y - 1 : y + 2, x - 1 : x + 2] = 255
            return frame.astype(np.uint8)

        plans = way[:-1, None, None] + np.cumsum(rng.normal(0, 1, (num_steps, 3, 5, 2)), axis=2)
        episodes.append(
            PlannedEpisode(
                number=number,
                success=number < count - 1,
                frames=np.stack([picture(point) for point in way]),
                goal=picture(goal),
                way_px=way if positions else None,
                goal_px=goal.astype(np.float32) if positions else None,
                imagined_px=plans if positions else None,
            )
        )
    return episodes


def make_history() -> list[dict[str, Any]]:
    train = [
        {"step": s, "split": "train", "loss": 2 / (1 + s / 200), "kl_nats": s / 500, "effective_rank": 30.0 + s / 200}
        for s in range(0, 1200, 10)
    ]
    return train + [
        {"step": s, "split": "selection", "loss": 2.1 / (1 + s / 200), "energy_score": 1 - s / 3000}
        for s in range(0, 1200, 300)
    ]


def make_illustrations(
    *,
    queries: int = 2,
    num_steps: int = 8,
    num_frames: int = 3,
    channels: int = 1,
    size_px: int = 64,
    labels: bool = True,
    on_frames: bool = True,
    num_neighbours: int = 2,
    texture: bool = False,
) -> Illustrations:
    """A bright square drifts over each video; sampled paths spread around its own."""
    rng = np.random.default_rng(0)
    num_total = (1 + num_steps) * num_frames
    origin = rng.uniform(0.35, 0.65, (queries, 2)) * size_px
    direction = rng.normal(0, 0.25 * size_px / max(1, num_steps * num_frames), (queries, 2))
    frames = np.zeros((queries, num_total, channels, size_px, size_px), dtype=np.uint8)
    half = size_px // 8
    for query in range(queries):
        for t in range(num_total):
            x, y = (origin[query] + (t - num_frames + 1) * direction[query]).round().astype(int)
            frames[query, t, :, max(0, y - half) : y + half, max(0, x - half) : x + half] = 230
    if texture:  # that changes in every frame, in patches of 4 pixels
        patches = rng.integers(0, 256, (queries, num_total, channels, size_px // 4, size_px // 4), dtype=np.uint8)
        frames = patches.repeat(4, axis=-2).repeat(4, axis=-1)
    steps = np.arange(1, num_steps + 1)[:, None]
    true = origin[:, None] + steps * num_frames * direction[:, None]

    def spread(count: int, width: float) -> np.ndarray:
        walk = np.cumsum(rng.normal(0, width * size_px / 40, (queries, count, num_steps, 2)), axis=2)
        return true[:, None] + walk

    steps_shown = tuple(sorted({1, (num_steps + 1) // 2, num_steps}))
    which = rng.integers(0, max(queries, 1), (queries, len(steps_shown), num_neighbours))
    near = (
        np.stack(
            [frames[which[:, i], step * num_frames : (step + 1) * num_frames] for i, step in enumerate(steps_shown)],
            axis=1,
        )
        if queries
        else np.zeros((0, len(steps_shown), 1, num_frames, channels, size_px, size_px), dtype=np.uint8)
    )
    change = rng.normal(0, 1, (300, 2))
    r = change @ rng.normal(0, 1, (2, 8)) + rng.normal(0, 0.4, (300, 8))
    surprise = np.abs(rng.normal(1, 0.3, 80))
    surprise[[20, 60]] = 5.0, 4.0
    return Illustrations(
        frames=frames,
        num_frames=num_frames,
        fans=Fans(spread(64, 1.1), spread(128, 1.3), true, origin, on_frames) if labels else None,
        neighbours=near,
        neighbour_steps=steps_shown,
        latents=Latents(r, change if labels else None, "velocity change, px/frame" if labels else ""),
        timeline=Timeline(
            video="walk.mp4",
            frame=np.arange(80) * num_frames + num_frames,
            time_s=(np.arange(80) + 1) * 0.12 if labels else None,
            unit="nats" if labels else "units of the loss",
            surprise=surprise,
            kl_nats=surprise / 2,
            prediction_error=surprise / 20,
            scene_nats=surprise / 4,
            still_nats=surprise / 8,
            peaks=np.array([20, 60]),
            peak_frames=np.repeat(frames[:1, : 2 * num_frames], 2, axis=0)
            if queries
            else np.zeros((2, 2 * num_frames, channels, size_px, size_px), dtype=np.uint8),
        ),
    )


def make_decoded(
    clips: int = 1, *, samples: int = 6, future: int = 6, context: int = 3, channels: int = 1, side_px: int = 16
) -> DecodedFutures:
    """Random pixels, in every frame others."""
    rng = np.random.default_rng(0)

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (clips, *shape, channels, side_px, side_px), dtype=np.uint8)

    return DecodedFutures(
        step=1200,
        num_samples=64,
        frame_numbers=np.arange(future) + 1,
        context=pixels(context),
        real=pixels(future),
        decoded_real=pixels(future),
        samples=pixels(samples, future),
        mean=pixels(future),
        spread=pixels(future),
    )


def undeclared(content: Any, path: str = "") -> list[str]:
    """The places of numbers and texts in the content that no record declares."""
    if isinstance(content, dict):
        return [one for key, value in content.items() for one in undeclared(value, f"{path}.{key}" if path else key)]
    if isinstance(content, list | tuple):
        return [one for i, value in enumerate(content) for one in undeclared(value, f"{path}.{i}")]
    return [] if is_declared(path) else [path]


def moving_image(picture: Picture) -> Any:
    """Open the light version of a picture by Pillow."""
    return Image.open(BytesIO(base64.b64decode(picture.light.split(",")[1])))
