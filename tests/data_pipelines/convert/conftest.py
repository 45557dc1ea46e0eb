"""Sources of every layout: four episodes whose frames are painted with the numbers of episode and frame."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data_pipelines.conftest import paint

LENGTHS = (9, 12, 10, 11)
SIZE = (48, 64)
CAMERA = "observation.images.front"

Frames = NDArray[np.uint8]


def painted(episode: int, num_frames: int | None = None, *, size: tuple[int, int] = SIZE) -> Frames:
    """Return the frames of an episode in colour, [T, H, W, 3]: blue is inverted, which shows a change of channels."""
    count = LENGTHS[episode] if num_frames is None else num_frames
    gray = np.stack([paint(episode, frame, *size) for frame in range(count)])
    return np.stack([gray, gray, 255 - gray], axis=-1)


def columns_of(episodes: Sequence[int] = range(4)) -> dict[str, NDArray[Any]]:
    """Return frames, and labels that state the frame and the episode, row after row."""
    frames = np.concatenate([np.arange(LENGTHS[episode]) for episode in episodes])
    numbers = np.repeat(list(episodes), [LENGTHS[episode] for episode in episodes])
    return {
        "pixels": np.concatenate([painted(episode) for episode in episodes]),
        "action": np.stack([frames, numbers], axis=1).astype(np.float32),
        "state": np.stack([frames / 7, numbers, frames * 0.1], axis=1),
        "reward": (frames * 0.5).astype(np.float32),
        "number": numbers.astype(np.int64),
    }


def _bounds() -> dict[str, Any]:
    return {"ep_len": np.array(LENGTHS, np.int32), "ep_offset": np.cumsum([0, *LENGTHS[:-1]])}


def write_stable_worldmodel(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in (columns_of() | _bounds()).items():
            file.create_dataset(name, data=values)
        file.create_dataset("task", data=["push"] * sum(LENGTHS), dtype=h5py.string_dtype())
    return path


def write_d4rl(path: Path) -> Path:
    columns = columns_of()
    last = np.zeros(sum(LENGTHS), bool)
    last[np.cumsum(LENGTHS)[:-1] - 1] = True  # the last episode is not ended
    timeouts = last.copy()
    timeouts[LENGTHS[0] - 1] = False
    with h5py.File(path, "w") as file:
        file["observations"] = columns["state"]
        file["images"] = columns["pixels"].transpose(0, 3, 1, 2)
        file["actions"], file["rewards"] = columns["action"], columns["reward"]
        file["terminals"], file["timeouts"] = last & ~timeouts, timeouts
    return path


def write_robomimic(path: Path, *, masks: bool = False) -> Path:
    with h5py.File(path, "w") as file:
        for episode in range(4):
            columns = columns_of([episode])
            group = file.create_group(f"data/demo_{episode}")
            group.attrs["num_samples"] = LENGTHS[episode]
            group["actions"], group["states"] = columns["action"], columns["state"]
            group["rewards"], group["dones"] = columns["reward"], np.arange(LENGTHS[episode]) == LENGTHS[episode] - 1
            group["obs/agentview_image"] = columns["pixels"]
            group["obs/robot0_eye_in_hand_image"] = 255 - columns["pixels"]
            group["obs/robot0_eef_pos"] = columns["state"]
            group["next_obs/agentview_image"] = np.roll(columns["pixels"], -1, axis=0)
        if masks:
            file["mask/train"] = np.array([b"demo_0", b"demo_3"])
            file["mask/valid"] = np.array([b"demo_2"])
    return path


def write_npz(path: Path, *, compressed: bool = True) -> Path:
    columns = columns_of()
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    save(path, **{"frames": columns.pop("pixels"), **columns, "episode_ends": np.cumsum(LENGTHS)})
    return path


def write_image_folders(root: Path) -> Path:
    rows = []
    for episode in range(4):
        folder = root / f"clip_{episode}"
        folder.mkdir(parents=True)
        for frame, picture in enumerate(painted(episode)):
            Image.fromarray(picture).save(folder / f"{frame:03d}.png")
        labels = {name: values.tolist() for name, values in columns_of([episode]).items() if name != "pixels"}
        labels["reward"] = [[number] for number in labels["reward"]]
        rows.append({"file_name": folder.name, **labels, "number": episode})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write_animations(root: Path, kind: str) -> Path:
    root.mkdir(parents=True)
    for episode in range(4):
        first, *others = [Image.fromarray(frame) for frame in painted(episode)]
        options: dict[str, Any] = {"lossless": True, "quality": 0} if kind == "webp" else {}
        first.save(root / f"clip_{episode}.{kind}", save_all=True, append_images=others, duration=40, loop=0, **options)
    return root


def write_lance(path: Path) -> Path:
    lance = pytest.importorskip("lance")
    pyarrow = pytest.importorskip("pyarrow")

    columns = columns_of()
    steps = np.concatenate([np.arange(length) for length in LENGTHS])
    table = {
        "episode_idx": columns["number"].astype(np.int32),
        "step_idx": steps.astype(np.int32),
        "pixels": pyarrow.array([encoded(frame) for frame in columns["pixels"]], pyarrow.binary()),
        "action": _fixed_lists(columns["action"]),
        "state": _fixed_lists(columns["state"].astype(np.float32)),
        "reward": columns["reward"],
    }
    lance.write_dataset(pyarrow.table(table), str(path))
    return path


def _fixed_lists(values: NDArray[Any]) -> Any:
    import pyarrow

    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])


def encoded(frame: Frames, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind)
    return file.getvalue()


def write_lerobot(root: Path, write_video: Any, *, pictures: bool = False, version: str = "v2.1") -> Path:
    import pyarrow
    from pyarrow import parquet

    info = {
        "codebase_version": version, "fps": 20, "total_episodes": 4, "chunks_size": 2, "splits": {"train": "0:4"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            CAMERA: {"dtype": "image" if pictures else "video", "shape": [*SIZE, 3]},
            "action": {"dtype": "float32", "shape": [2]}, "state": {"dtype": "float32", "shape": [3]},
            "reward": {"dtype": "float32", "shape": [1]}, "language": {"dtype": "string", "shape": [1]},
            **{key: {"dtype": "int64"} for key in ("frame_index", "episode_index", "index", "task_index")},
        },
    }  # fmt: skip
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    first = 0
    for episode, length in enumerate(LENGTHS):
        columns = columns_of([episode])
        table: dict[str, Any] = {
            "action": columns["action"].tolist(), "state": columns["state"].tolist(), "reward": columns["reward"],
            "language": ["x"] * length, "frame_index": np.arange(length), "episode_index": columns["number"],
            "index": np.arange(first, first + length), "task_index": columns["number"] % 2,
        }  # fmt: skip
        if pictures:
            table[CAMERA] = [{"bytes": encoded(frame), "path": None} for frame in columns["pixels"]]
        else:
            place = root / "videos" / f"chunk-{episode // 2:03d}" / CAMERA / f"episode_{episode:06d}.mp4"
            write_video(place, video=episode, num_frames=length, size=SIZE, fps=20)
        path = root / "data" / f"chunk-{episode // 2:03d}" / f"episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(table), path)
        first += length
    return root


WRITERS: dict[str, Callable[[Path, Any], Path]] = {
    "stable-worldmodel": lambda root, _: write_stable_worldmodel(root / "pusht.h5"),
    "d4rl": lambda root, _: write_d4rl(root / "antmaze.hdf5"),
    "robomimic": lambda root, _: write_robomimic(root / "image.hdf5"),
    "npz": lambda root, _: write_npz(root / "demos.npz"),
    "image folders": lambda root, _: write_image_folders(root / "images"),
    "gif": lambda root, _: write_animations(root / "gifs", "gif"),
    "webp": lambda root, _: write_animations(root / "webps", "webp"),
    "lance": lambda root, _: write_lance(root / "pusht.lance"),
    "lerobot": lambda root, write_video: write_lerobot(root / "lerobot", write_video),
    "lerobot images": lambda root, write_video: write_lerobot(root / "lerobot", write_video, pictures=True),
}
LOSSLESS = [
    name for name in WRITERS if name not in ("lerobot", "gif")
]  # those sources whose frames are the painted ones


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> Callable[[str], Path]:
    """A function from the name of a layout to a source of it; do not change it."""
    sources: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in sources:
            sources[name] = WRITERS[name](tmp_path_factory.mktemp("source"), write_video)
        return sources[name]

    return source
