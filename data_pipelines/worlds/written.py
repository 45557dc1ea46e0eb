"""Worlds written as video files: H.264, a metadata.jsonl per split, and a world.json that identifies the world."""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import read_text, remove, write_bytes, write_errors, write_text
from data_pipelines.labels import METADATA_NAME
from data_pipelines.processes import ending, spawned_pool
from data_pipelines.splits import SPLITS, Split
from data_pipelines.worlds.digits import Sprites, load_sprites

WORLD_NAME = "world.json"
SPRITES_NAME = "sprites.safetensors"
RECORDED = "recorded"  # a recorded environment in world.json; it has neither sprites nor a law
MAX_PENDING_CHUNKS = 16
ROWS_NAME = ".rows"  # folder of the labels of recorded episodes, while others are missing
EPISODES_PER_JOB = 8


@dataclass(frozen=True)
class WorldSplit:
    """The content of a split: a row of labels for each video, and its pixels on demand.

    render: positions of videos -> uint8 [n, T, H, W].
    """

    sprites: Sprites
    labels: Sequence[Mapping[str, Any]]
    render: Callable[[list[int]], np.ndarray]


DrawnVideos = tuple[Sequence[Mapping[str, Any]], Callable[[list[int]], Tensor]]
"""A row of labels for each video of a split, and its pixels on demand: rows -> float [n, T, 1, H, W] in [0, 1]."""


def write_digits(
    out: Path,
    facts: Mapping[str, Any],
    counts: Mapping[Split, int],
    sample: Callable[[Sprites, int, torch.Generator], DrawnVideos],
    *,
    mnist_dir: Path | None,
    seed: int,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Write the videos of a world of digits, with labels, as H.264 files in out/train and so on.

    facts: the name of the world and its parameters, for world.json.
    counts: videos per split.
    sample: draws that many videos of a split from its sprites.

    Raises:
        UserError: as write_videos; the files of MNIST cannot be read.
    """

    def draw_split(split: Split) -> WorldSplit:
        sprites = load_sprites(split, mnist_dir)
        generator = torch.Generator().manual_seed(1000 * seed + SPLITS.index(split))
        labels, draw = sample(sprites, counts[split], generator)

        def render(rows: list[int]) -> np.ndarray:
            return (draw(rows) * 255).round().byte()[:, :, 0].numpy()

        return WorldSplit(sprites, [{**row, "seed": seed} for row in labels], render)

    world = {
        **facts,
        "seed": seed,
        "digits": "mnist" if mnist_dir else "scikit-learn",
        "counts": {split: counts[split] for split in SPLITS},
    }
    write_videos(out, world, draw_split, num_processes=num_processes, overwrite=overwrite)


def write_videos(
    out: Path,
    world: Mapping[str, Any],
    draw_split: Callable[[Split], WorldSplit],
    *,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Write the videos of all splits. `world` is the content of world.json and identifies the world.

    An interrupted world is continued. A complete one is left unchanged.

    Raises:
        UserError: `out` holds a world of other parameters, or something else, and `overwrite` is not given; it cannot
            be written; num_processes is below 1.
    """
    check_processes(num_processes)
    unfinished = start_world(out, world, overwrite=overwrite)
    if not unfinished:
        return
    with ending(spawned_pool(num_processes)) as pool:
        for split in unfinished:
            _write_split(out / split, draw_split(split), pool)


def start_world(out: Path, world: Mapping[str, Any], *, overwrite: bool) -> list[Split]:
    """Write world.json, or find the same world in the folder. Return the splits that are not complete.

    Raises:
        UserError: `out` holds a world of other parameters, or something else, and `overwrite` is not given; it cannot
            be written.
    """
    marker = out / WORLD_NAME
    if marker.is_file() and not overwrite and read_world(out) != world:
        raise UserError(f"{out} holds a world of other parameters: choose another folder, or overwrite it")
    if not marker.is_file() and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise UserError(f"{out} is not empty and does not hold a world: choose another folder")
    with write_errors(out):
        if overwrite and marker.is_file():
            for split in SPLITS:
                if (out / split).is_dir() and not (out / split).is_symlink():
                    (out / split / METADATA_NAME).unlink(missing_ok=True)  # first: the split is no longer complete
                remove(out / split)
        out.mkdir(parents=True, exist_ok=True)
        write_text(marker, json.dumps(world, indent=1) + "\n")
    return [split for split in SPLITS if not (out / split / METADATA_NAME).is_file()]


def read_world(root: Path) -> dict[str, Any] | None:
    """Return the content of a folder's world.json; None if there is none. Raises UserError: it is damaged."""
    marker = root / WORLD_NAME
    if not marker.is_file():
        return None
    try:
        world = json.loads(read_text(marker))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{marker}' is damaged ({one_line(error)}): overwrite the world") from None
    if not isinstance(world, dict) or not isinstance(world.get("world"), str):
        raise UserError(f"'{marker}' does not name a world: overwrite it")
    return world


def read_sprites(folder: Path) -> Sprites:
    """Return the sprites of a written split."""
    stored = load_file(folder / SPRITES_NAME)
    return Sprites(stored["images"].float() / 255, stored["digits"])


def _write_split(folder: Path, split: WorldSplit, pool: Executor) -> None:
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
    names = video_names(len(split.labels))
    missing = [row for row, name in enumerate(names) if not (folder / name).is_file()]

    def start(rows: list[int]) -> Future[None]:
        return pool.submit(_encode_chunk, [folder / names[row] for row in rows], split.render(rows))

    run_chunks(start, missing, len(names), folder.name, chunk_size=64)
    images = (split.sprites.images * 255).round().byte()
    with write_errors(folder):
        write_bytes(folder / SPRITES_NAME, save({"images": images, "digits": split.sprites.digits}))
    finish_split(folder, names, split.labels)


class Episodes(Protocol):
    """Episodes that are recorded by worker processes, to which it is sent by pickle. An episode is one video."""

    @property
    def fps(self) -> int:
        """Frames per second of the videos."""

    def play(self, split: Split, episode: int) -> tuple[np.ndarray, Mapping[str, Any]]:
        """Return the frames of an episode as encode_h264 takes them, and its row of labels."""


def write_episodes(
    out: Path,
    world: Mapping[str, Any],
    counts: Mapping[Split, int],
    episodes: Episodes,
    *,
    num_processes: int,
    overwrite: bool = False,
) -> None:
    """Record episodes into out/train, out/selection and out/test, each with its metadata.jsonl.

    `world` is the content of world.json. An interrupted recording is continued. A complete one is left unchanged.

    Raises:
        UserError: a number is below 1; `out` holds other files, or another recording and `overwrite` is not given.
    """
    check_counts(counts, num_processes)
    unfinished = start_world(out, world, overwrite=overwrite)
    if unfinished:
        with ending(spawned_pool(num_processes)) as pool:
            for split in unfinished:
                folder, names = out / split, video_names(counts[split])
                with write_errors(folder):
                    (folder / ROWS_NAME).mkdir(parents=True, exist_ok=True)

                def start(numbers: list[int], folder: Path = folder, split: Split = split) -> Future[None]:
                    return pool.submit(_record_chunk, episodes, folder, split, numbers)

                missing = [
                    episode
                    for episode, name in enumerate(names)
                    if not ((folder / name).is_file() and _row_path(folder, episode).is_file())
                ]
                run_chunks(start, missing, len(names), split, chunk_size=EPISODES_PER_JOB)
                rows = (json.loads(_row_path(folder, episode).read_text()) for episode in range(len(names)))
                finish_split(folder, names, rows)
    for split in SPLITS:
        shutil.rmtree(out / split / ROWS_NAME, ignore_errors=True)


def check_counts(counts: Mapping[Split, int], num_processes: int) -> None:
    """Raise UserError if a split has no episodes, or there are no processes."""
    for split in SPLITS:
        if counts[split] < 1:
            raise UserError(f"{counts[split]} {split} episodes: there must be at least one")
    check_processes(num_processes)


def check_processes(num_processes: int) -> None:
    """Raise UserError if there are no processes."""
    if num_processes < 1:
        raise UserError(f"num_processes={num_processes} must be at least 1")


def _record_chunk(episodes: Episodes, folder: Path, split: Split, numbers: Sequence[int]) -> None:
    torch.set_num_threads(1)
    names = video_names(max(numbers) + 1)
    for episode in numbers:
        frames, row = episodes.play(split, episode)
        path = _row_path(folder, episode)
        with write_errors(folder):
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(row), encoding="utf-8")
            aside.replace(path)
        write_whole(folder / names[episode], frames, episodes.fps)


def _row_path(folder: Path, episode: int) -> Path:
    return folder / ROWS_NAME / f"{episode:06d}.json"


def video_names(count: int) -> list[str]:
    """Return the file names of a split's videos."""
    return [f"{row:06d}.mp4" for row in range(count)]


def finish_split(folder: Path, names: Sequence[str], labels: Iterable[Mapping[str, Any]]) -> None:
    """Write the labels, last and atomically: a split with this file is complete."""
    with write_errors(folder):
        aside = folder / ".metadata.partial"
        with open(aside, "w", encoding="utf-8") as out:
            out.writelines(json.dumps({"file_name": n, **row}) + "\n" for n, row in zip(names, labels, strict=True))
        aside.replace(folder / METADATA_NAME)


def run_chunks(
    start: Callable[[list[int]], Future[None]], rows: Sequence[int], num_videos: int, split: str, *, chunk_size: int
) -> None:
    """Start a job for each chunk of the remaining rows of a split, and wait for all, with a progress bar.

    Few jobs are pending at a time, as rendered frames are large. The first error of a job is raised.
    """
    done = num_videos - len(rows)
    pending: deque[tuple[Future[None], int]] = deque()
    with tqdm(total=num_videos, initial=done, desc=f"{split} videos", unit="file") as bar:

        def wait(leave: int) -> None:
            while len(pending) > leave:
                job, count = pending.popleft()
                job.result()
                bar.update(count)

        try:
            for first in range(0, len(rows), chunk_size):
                chunk = list(rows[first : first + chunk_size])
                pending.append((start(chunk), len(chunk)))
                wait(leave=MAX_PENDING_CHUNKS)
            wait(leave=0)
        except BrokenProcessPool:
            raise UserError(
                "a process that writes videos has died: a message above may say why; if memory ran out, start again "
                "with fewer processes (what is written is kept); a script needs `if __name__ == '__main__':`"
            ) from None


def _encode_chunk(paths: list[Path], frames: np.ndarray) -> None:
    for path, video in zip(paths, frames, strict=True):
        write_whole(path, video)


def write_whole(path: Path, frames: np.ndarray, fps: int = 10) -> None:
    """Write a file as encode_h264 does. It appears complete or not at all. Raises UserError: it cannot be written."""
    aside = path.with_suffix(".partial")
    with write_errors(path.parent):
        encode_h264(aside, frames, fps)
        aside.replace(path)


def encode_h264(path: Path, frames: np.ndarray, fps: int = 10) -> None:
    """Write uint8 frames as a lossless H.264 .mp4 file: gray [T, H, W] with even sides, or RGB [T, H, W, 3].

    Only the conversion to YUV rounds, by a gray level or two, in the same way in every frame. Lossy files of these
    small, plain frames are less than half as large, but some embeddings then represent nothing but the artefacts
    (docs/experiments.md). RGB keeps its colours at full resolution (4:4:4).
    """
    import av

    gray = frames.ndim == 3
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "0", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p" if gray else "yuv444p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray" if gray else "rgb24")))
        container.mux(stream.encode(None))
