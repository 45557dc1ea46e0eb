"""Worlds written as video files: H.264, a metadata.jsonl a split, and a world.json that says which world it is."""

import json
import multiprocessing
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.sources.digits import SPLITS, Split, Sprites

WORLD_NAME = "world.json"
SPRITES_NAME = "sprites.safetensors"
MAX_PENDING_CHUNKS = 16


@dataclass(frozen=True)
class WorldSplit:
    """What a split is written from: a row of labels for each video, and its pixels on demand.

    render: positions of videos -> uint8 [n, T, H, W].
    """

    sprites: Sprites
    labels: Sequence[Mapping[str, Any]]
    render: Callable[[list[int]], np.ndarray]


def write_videos(
    out: Path,
    world: Mapping[str, Any],
    draw_split: Callable[[Split], WorldSplit],
    *,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Write the videos of all splits; `world` is what world.json holds and what tells one world from another.

    A world that was interrupted goes on where it stopped; one that is complete is left alone.

    Raises:
        UserError: `out` holds a world of other parameters, or something else, and `overwrite` is not given.
    """
    marker = out / WORLD_NAME
    if marker.is_file() and read_world(out) != world and not overwrite:
        raise UserError(f"{out} holds a world of other parameters: choose another folder, or pass --overwrite")
    if not marker.is_file() and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no world of this script: choose another folder")
    if overwrite and marker.is_file():
        for split in SPLITS:
            shutil.rmtree(out / split, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")
    unfinished = [split for split in SPLITS if not (out / split / "metadata.jsonl").is_file()]
    if not unfinished:
        return
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for split in unfinished:
            _write_split(out / split, draw_split(split), pool)


def read_world(root: Path) -> dict[str, Any] | None:
    """What the world.json of a folder says; None where there is none."""
    marker = root / WORLD_NAME
    return json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None


def read_sprites(folder: Path) -> Sprites:
    """The sprites of a written split."""
    stored = load_file(folder / SPRITES_NAME)
    return Sprites(stored["images"].float() / 255, stored["digits"])


def _write_split(folder: Path, split: WorldSplit, pool: ProcessPoolExecutor) -> None:
    folder.mkdir(exist_ok=True)
    names = [f"{row:06d}.mp4" for row in range(len(split.labels))]
    missing = [row for row, name in enumerate(names) if not (folder / name).is_file()]
    chunks = [missing[start : start + 64] for start in range(0, len(missing), 64)]
    done = len(names) - len(missing)
    with tqdm(total=len(names), initial=done, desc=f"{folder.name} videos", unit="file") as bar:
        pending: deque[tuple[Future[None], int]] = deque()
        for rows in chunks:
            paths = [folder / names[row] for row in rows]
            pending.append((pool.submit(_encode_chunk, paths, split.render(rows)), len(rows)))
            _finish(pending, bar, leave=MAX_PENDING_CHUNKS)
        _finish(pending, bar, leave=0)
    images = (split.sprites.images * 255).round().byte()
    save_file({"images": images, "digits": split.sprites.digits}, folder / SPRITES_NAME)
    rows_text = "".join(
        json.dumps({"file_name": name, **row}) + "\n" for name, row in zip(names, split.labels, strict=True)
    )
    # Written last and as a whole: a split with this file is complete.
    aside = folder / ".metadata.partial"
    aside.write_text(rows_text, encoding="utf-8")
    aside.replace(folder / "metadata.jsonl")


def _finish(pending: "deque[tuple[Future[None], int]]", bar: tqdm, leave: int) -> None:
    """Wait for the oldest jobs until `leave` are left: rendered frames are large."""
    while len(pending) > leave:
        job, count = pending.popleft()
        job.result()
        bar.update(count)


def _encode_chunk(paths: list[Path], frames: np.ndarray) -> None:
    for path, video in zip(paths, frames, strict=True):
        aside = path.with_suffix(".partial")
        encode_gray_h264(aside, video)
        aside.replace(path)


def encode_gray_h264(path: Path, frames: np.ndarray, fps: int = 10) -> None:
    """Write uint8 [T, H, W] as an H.264 .mp4 file (constant rate factor 18)."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))
