"""Labels of videos: metadata files, and the tables of LeRobot data sets."""

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.kinds import Case, Kind, require
from benchmarks.fuzz.media import CODECS, FPS, write_video
from benchmarks.fuzz.mutate import damage_bytes, dumps, mutate_json, mutate_text, odd_value
from data_pipelines.clip_decoder import clips_of
from data_pipelines.clips import ClipSpec, epoch_order
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex

SPEC = ClipSpec(num_segments=2, num_frames=2)
LENGTHS = {"a.mp4": 9, "sub/b.mp4": 12, "sub/c.mp4": 9}  # frames of each video
PATH_TRICKS = ("../{}", "/{}", "./{}", "x/../{}", "{}/", "{}\0", "{} ", "//{}", "C:{}", "sub\\{}", "{}\n")


def check_index(index: VideoIndex) -> None:
    """Check that the labels of an index fit its rows.

    Raises:
        WrongError: they do not. UserError: the index holds no clip.
    """
    for name, values in {**index.labels, **index.frame_labels}.items():
        require(isinstance(name, str), f"a label is called {name!r}")
        require(values.dtype in (torch.int64, torch.float32), f"label {name!r} is {values.dtype}")
    for name, values in index.labels.items():
        require(len(values) == len(index.videos), f"label {name!r} has {len(values)} rows of {len(index.videos)}")
    table = clips_of(index, SPEC)
    require(0 < table.num_clips <= sum(video.num_frames for video in index.videos), f"{table.num_clips} clips")
    epoch_order(table.first_clip_of_group, seed=0, epoch=0, shuffle=True, batch_size=1, num_lanes=1, pool_clips=16)
    clips_of(index, replace(SPEC, fps=10))
    for row, (start, stop) in enumerate(index.frame_ranges):
        require(0 <= start <= stop <= index.videos[row].num_frames, f"row {row} has the frames {start} to {stop}")
        if index.frame_labels and index.frame_label_offsets is not None and stop > start:
            offset = int(index.frame_label_offsets[row])
            count = min(len(values) for values in index.frame_labels.values())
            require(offset + start >= 0 and offset + stop <= count, f"labels of row {row} are out of range")


# ------------------------------------------------------------------------------------------------------ metadata


def prepare_folder(seeds: Path) -> None:
    """Write a folder of three videos, indexed."""
    (seeds / "sub").mkdir()
    for name, length in LENGTHS.items():
        write_video(seeds / name, CODECS[0], length)
    load_videos(seeds, num_workers=0, progress=False)


def copy_folder(seeds: Path, folder: Path) -> None:
    """Copy files with their times, so that an index fits the copies."""
    shutil.copytree(seeds, folder, dirs_exist_ok=True)


def make_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Return valid labels of each video: numbers, lists, lists for each frame, texts."""
    return [
        {
            "file_name": name,
            "label": rng.randrange(10),
            "speed": rng.uniform(-1, 1),
            "pose": [rng.uniform(-1, 1) for _ in range(3)],
            "state": [[rng.uniform(-1, 1), float(frame)] for frame in range(length)],
            "text": rng.choice(("left", 'right, "quoted"', "é")),
        }
        for name, length in LENGTHS.items()
    ]


def _mutate_rows(rng: random.Random, rows: list[dict[str, Any]]) -> Any:
    """Remove, double or misname rows, make lists too long or too short by one, insert odd values."""
    what = rng.randrange(8)
    row = rng.choice(rows)
    if what == 0:
        rows.remove(row)
    elif what == 1:
        rows.append(rng.choice((row, {**row, "label": -1})))
    elif what == 2:
        row["file_name"] = rng.choice(PATH_TRICKS).format(row["file_name"])
    elif what == 3:
        row["state"] = row["state"][:-1] if rng.random() < 0.5 else [*row["state"], row["state"][0]]
    elif what == 4:
        rng.choice(row["state"])[rng.randrange(2)] = odd_value(rng)
    elif what == 5:
        row[rng.choice(("label", "speed", "pose", "state"))] = odd_value(rng)
    else:
        return mutate_json(rng, rows)
    return rows


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, list)}


def _csv(rows: Any) -> str:
    """Return a CSV of arbitrary cells."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in _cells(row)))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([row.get(name, "") for name in names] for row in rows)
    return out.getvalue()


def _parquet(rows: Any) -> bytes:
    """Write a Parquet table of the rows; unsupported columns become text."""
    import pyarrow
    from pyarrow import parquet

    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        name = name.encode("utf-8", "replace").decode()
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            columns[name] = pyarrow.array([repr(value)[:100] for value in values])
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def build_metadata(rng: random.Random, seeds: Path, folder: Path) -> Case:
    copy_folder(seeds, folder)
    rows = make_rows(rng)
    suffix = rng.choice((".jsonl", ".jsonl", ".csv", ".parquet"))
    is_good = rng.random() < 0.125
    wanted = json.loads(json.dumps(rows))
    changed = rows if is_good or rng.random() < 0.2 else _mutate_rows(rng, rows)
    lines = changed if isinstance(changed, list) else [changed]
    if suffix == ".parquet":
        content = _parquet(changed)
        content = damage_bytes(rng, content) if not is_good and rng.random() < 0.4 else content
    else:
        escaped = rng.random() < 0.7
        text = _csv(changed) if suffix == ".csv" else "".join(_line(rng, row, escaped) for row in lines)
        intact = is_good or rng.random() < 0.4
        content = text.encode("utf-8", "surrogatepass") if intact else mutate_text(rng, text)
    path = folder / f"metadata{suffix}"
    path.write_bytes(content)
    if not is_good and rng.random() < 0.1:
        _odd_file(rng, folder, path)
    return Case(partial(attempt_metadata, folder, wanted if is_good else None, suffix == ".csv"), is_good)


def _line(rng: random.Random, row: Any, escaped: bool) -> str:
    return dumps(rng, row, ensure_ascii=escaped) + "\n"


def _odd_file(rng: random.Random, folder: Path, path: Path) -> None:
    """Write a second metadata file, or something that is not a regular file in its place."""
    what = rng.randrange(5)
    if what == 0:
        shutil.copyfile(path, folder / "sub" / path.name)
    elif what == 1:
        shutil.copyfile(path, folder / rng.choice(("metadata.csv", "metadata.jsonl", "Metadata.jsonl")))
    else:
        path.unlink()
        if what == 2:
            path.mkdir()
        elif what == 3:
            os.mkfifo(path)
        else:
            path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "missing", path.name)))


def attempt_metadata(folder: Path, rows: Sequence[Mapping[str, Any]] | None, are_cells: bool) -> str:
    index = load_videos(folder, num_workers=0, progress=False)
    check_index(index)
    if rows is not None:
        names = ["label", "speed"] if are_cells else ["label", "speed", "pose"]
        for name in names:
            values = torch.tensor([row[name] for row in rows])
            require(torch.equal(index.labels[name], values), f"label {name} is {index.labels[name]}, not {values}")
        if not are_cells:
            frames = torch.tensor([frame for row in rows for frame in row["state"]])
            require(torch.equal(index.frame_labels["state"], frames), "labels of frames differ")
    return ""


# ------------------------------------------------------------------------------------------------------- LeRobot

CAMERA = "observation.images.top"
EPISODES = ((0, 0, 16), (0, 16, 20), (1, 0, 24))  # file, first and last frame of each


def prepare_lerobot(seeds: Path) -> None:
    videos = seeds / "videos" / CAMERA / "chunk-000"
    for folder in (videos, seeds / "data" / "chunk-000", seeds / "meta" / "episodes" / "chunk-000"):
        folder.mkdir(parents=True)
    for file in (0, 1):
        write_video(videos / f"file-{file:03d}.mp4", CODECS[0], 24)
    info, episodes, data = lerobot_tables()
    (seeds / "meta" / "info.json").write_text(json.dumps(info))
    (seeds / "meta" / "episodes" / "chunk-000" / "file-000.parquet").write_bytes(_table(episodes))
    (seeds / "data" / "chunk-000" / "file-000.parquet").write_bytes(_table(data))
    load_videos(seeds, num_workers=0, progress=False)


def lerobot_tables() -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, list[Any]]]:
    """Return meta/info.json and the columns of meta/episodes and of data."""
    types = {"action": "float32", "observation.state": "float32", "timestamp": "float32", "frame_index": "int64"}
    types |= {"episode_index": "int64", "index": "int64", "task_index": "int64", CAMERA: "video"}
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": {name: {"dtype": dtype, "shape": [1]} for name, dtype in types.items()},
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    }
    episodes: dict[str, list[Any]] = {name: [] for name in ("episode_index", "dataset_from_index", "dataset_to_index")}
    keys = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    episodes |= {f"videos/{CAMERA}/{key}": [] for key in keys}
    data: dict[str, list[Any]] = {name: [] for name in types if name != CAMERA}
    row = 0
    for number, (file, start, stop) in enumerate(EPISODES):
        length = stop - start
        values = (number, row, row + length, 0, file, start / FPS, stop / FPS)
        for name, value in zip(episodes, values, strict=True):
            episodes[name].append(value)
        for frame in range(length):
            entry: tuple[Any, ...] = ([row / 10, -row], [float(row)], frame / FPS, frame, number, row, number % 2)
            for column, cell in zip(data.values(), entry, strict=True):
                column.append(cell)
            row += 1
    return info, episodes, data


def _table(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Write columns as Parquet; unsupported ones become text."""
    import pyarrow
    from pyarrow import parquet

    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            arrays[name] = pyarrow.array([repr(value)[:100] for value in values])
    rows = min(map(len, arrays.values()), default=0)
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({name: array[:rows] for name, array in arrays.items()}), out)
    return out.getvalue()


def _mutate_columns(rng: random.Random, columns: dict[str, list[Any]]) -> None:
    """Change cells, types, rows and names of a table."""
    name = rng.choice(list(columns))
    values = columns[name]
    at = rng.randrange(len(values))
    what = rng.randrange(10)
    if what == 0:
        del columns[name]
    elif what == 1:
        columns[rng.choice((name + "x", "", "episode_index"))] = columns.pop(name)
    elif what == 2:
        values[at] = None
    elif what == 3:
        values[at] = odd_value(rng)
    elif what == 4:
        columns[name] = [str(value) for value in values]
    elif what == 5:
        columns[name] = [[value] for value in values]
    elif what == 6 and isinstance(values[at], int | float):
        change = rng.choice((-1, 1, 1000, -1000, 2**40, 0.5, 1e-3, 0.02, float("nan"), float("inf"), -1e30))
        columns[name] = [value + change if row >= at else value for row, value in enumerate(values)]
    elif what == 7:
        for column in columns.values():
            del column[at]
    elif what == 8:
        for column in columns.values():
            column.append(column[at])
    else:
        other = rng.randrange(len(values))
        for column in columns.values():
            column[at], column[other] = column[other], column[at]


def build_lerobot(rng: random.Random, seeds: Path, folder: Path) -> Case:
    copy_folder(seeds, folder)
    is_good = rng.random() < 0.125
    info, episodes, data = lerobot_tables()
    camera = None if is_good else rng.choice((None, None, None, CAMERA, "x", "../x"))
    paths = {
        "info": folder / "meta" / "info.json",
        "episodes": folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet",
        "data": folder / "data" / "chunk-000" / "file-000.parquet",
    }
    if not is_good:
        target = rng.choice(sorted(paths))
        if rng.random() < 0.2:
            paths[target].write_bytes(damage_bytes(rng, paths[target].read_bytes()))
        elif target == "info":
            text = dumps(rng, mutate_json(rng, info))
            paths[target].write_bytes(mutate_text(rng, text) if rng.random() < 0.2 else text.encode())
        else:
            columns = episodes if target == "episodes" else data
            for _ in range(rng.choice((1, 1, 2, 3))):
                if columns and min(map(len, columns.values())):
                    _mutate_columns(rng, columns)
            paths[target].write_bytes(_table(columns))
            if rng.random() < 0.1:  # a second file, of the table as it was or of another one
                other = lerobot_tables()[rng.choice((1, 2))]
                paths[target].with_name("file-001.parquet").write_bytes(_table(other))
    return Case(partial(attempt_lerobot, folder, camera, is_good), is_good)


def attempt_lerobot(folder: Path, camera: str | None, is_good: bool) -> str:
    index = load_videos(folder, camera=camera, num_workers=0, progress=False)
    check_index(index)
    if is_good:
        require(list(index.episodes or ()) == [(start, stop) for _, start, stop in EPISODES], f"{index.episodes}")
        offsets = index.frame_label_offsets
        assert offsets is not None, "episodes have labels of frames"
        for row, (_, start, stop) in enumerate(EPISODES):
            rows = torch.arange(int(offsets[row]) + start, int(offsets[row]) + stop)
            values = index.frame_labels["observation.state"][rows][:, 0]
            require(torch.equal(values, rows.float()), f"labels of episode {row}: {values}")
    return ""


KINDS = (
    Kind("metadata", prepare_folder, build_metadata),
    Kind("lerobot", prepare_lerobot, build_lerobot),
)
