"""Small LeRobot data sets of two cameras, of versions 2.1 and 3.0, with the row of each frame painted into it."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.data_pipelines.conftest import paint

FPS = 10
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
LENGTHS = (30, 200, 25, 5, 61)
STARTS = np.cumsum([0, *LENGTHS])
# The cameras divide their episodes differently among files of version 3, and have other keyframes.
FIRST_OF_FILE = {FRONT: (0, 2), WRIST: (0, 1, 4)}
OPTIONS = {FRONT: {"g": "40", "bf": "2", "sc_threshold": "0"}, WRIST: {"g": "12", "bf": "0", "sc_threshold": "0"}}
TEMPLATES = {
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}


def write_cameras(
    root: Path, write_video: Any, version: str, sizes: Sequence[tuple[int, int]] = ((48, 64),) * 2
) -> Path:
    """Write five episodes. The frame of camera c in row r of the tables shows the numbers c and r.

    The first number of the label "action" is the row, the second the episode.
    """
    camera_keys = {camera: {"dtype": "video", "shape": [48, 64, 3]} for camera in (FRONT, WRIST)}
    numbers = {name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index")}
    info: dict[str, Any] = {
        "codebase_version": version,
        "fps": FPS,
        "total_episodes": len(LENGTHS),
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": TEMPLATES[version],
        "features": {**camera_keys, "action": {"dtype": "float32", "shape": [2]}, **numbers},
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    for camera, size in zip((FRONT, WRIST), sizes, strict=True):
        for place, rows in files_of(version, camera).items():
            write_camera(root / place, write_video, camera, rows, size=size)
    tables = {"file-000": range(3), "file-001": range(3, 5)}  # divided elsewhere than the videos
    if version == "v2.1":
        for episode in range(len(LENGTHS)):
            _write_rows(root / f"data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet", [episode])
        return root
    for name, episodes in tables.items():
        _write_rows(root / "data" / "chunk-000" / f"{name}.parquet", episodes)
    write_table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet", episode_columns())
    return root


def files_of(version: str, camera: str) -> dict[str, range]:
    """Return the rows of the tables that each file of a camera shows, by its path below the root."""
    if version == "v2.1":
        template = TEMPLATES[version]
        return {
            template.format(video_key=camera, episode_chunk=episode // 2, episode_index=episode): range(*bounds)
            for episode, bounds in enumerate(pairwise(STARTS.tolist()))
        }
    bounds = [*FIRST_OF_FILE[camera], len(LENGTHS)]
    return {
        TEMPLATES[version].format(video_key=camera, chunk_index=0, file_index=file): range(STARTS[first], STARTS[stop])
        for file, (first, stop) in enumerate(pairwise(bounds))
    }


def write_camera(path: Path, write_video: Any, camera: str, rows: Sequence[int], **settings: Any) -> None:
    """Write a file of a camera that shows these rows."""
    size = settings.setdefault("size", (48, 64))
    images = [paint((FRONT, WRIST).index(camera), row, *size) for row in rows]
    write_video(path, images=images, num_frames=len(images), **{"options": OPTIONS[camera], "fps": FPS} | settings)


def episode_columns() -> dict[str, Any]:
    """Return the table meta/episodes of version 3."""
    columns: dict[str, Any] = {
        "episode_index": list(range(len(LENGTHS))),
        "dataset_from_index": STARTS[:-1].tolist(),
        "dataset_to_index": STARTS[1:].tolist(),
    }
    for camera, firsts in FIRST_OF_FILE.items():
        files = [sum(first <= episode for first in firsts) - 1 for episode in range(len(LENGTHS))]
        in_file = [STARTS[episode] - STARTS[firsts[file]] for episode, file in enumerate(files)]
        columns |= {
            f"videos/{camera}/chunk_index": [0] * len(LENGTHS),
            f"videos/{camera}/file_index": files,
            f"videos/{camera}/from_timestamp": [frame / FPS + 1e-7 for frame in in_file],
        }
    return columns


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write a table as Parquet."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def _write_rows(path: Path, episodes: Sequence[int]) -> None:
    rows = [(episode, row) for episode in episodes for row in range(STARTS[episode], STARTS[episode + 1])]
    write_table(
        path,
        {
            "action": [[float(row), float(episode)] for episode, row in rows],
            "frame_index": [row - int(STARTS[episode]) for episode, row in rows],
            "episode_index": [episode for episode, _ in rows],
            "index": [row for _, row in rows],
        },
    )
