"""Damage many video files at random and account for every file and clip of the index and the stream.

Good files of several codecs and containers and damaged copies: flipped bytes, zeroed ranges, cut ends. Half are damaged
before they are indexed, half afterwards. All are then streamed by two workers. Clips of damaged files that were
delivered are compared with the undamaged ones: where a container has no checksums, damage inside a picture can decode
to other pixels without an error.
"""

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from data_pipelines.clip_decoder import clips_of
from data_pipelines.clips import ClipSpec, ClipTable
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.stream import StreamSettings, VideoStream

SPEC = ClipSpec(num_segments=3, num_frames=3)
NUM_FRAMES = 45  # five clips a file
DAMAGES = ("flipped", "zeroed", "cut")
LANES = 8


@dataclass(frozen=True)
class Format:
    """A kind of video file."""

    suffix: str
    codec: str
    pix_fmt: str
    options: tuple[tuple[str, str], ...] = ()


FORMATS = (
    Format(".mp4", "libx264", "yuv420p", (("g", "12"), ("bf", "2"))),
    Format(".mkv", "libx264", "yuv420p", (("g", "250"),)),
    Format(".avi", "mpeg4", "yuv420p"),
    Format(".webm", "libvpx-vp9", "yuv420p", (("deadline", "realtime"), ("cpu-used", "8"))),
    Format(".mov", "mjpeg", "yuvj420p"),
    Format(".ts", "mpeg2video", "yuv420p"),
)


def account(num_files: int, seed: int, decoder: str) -> int:
    """Damage num_files files and stream them. Return the exit code: 1 if a file or a clip is lost or comes twice.

    Raises UserError: fewer files than formats.
    """
    if num_files < len(FORMATS):
        raise UserError(f"--files {num_files} must be at least {len(FORMATS)}, one of each kind")
    logging.disable(logging.WARNING)  # which would name a thousand files
    with tempfile.TemporaryDirectory(prefix="fuzz_videos_") as folder:
        return _account(Path(folder), num_files, seed, decoder)


def _account(folder: Path, num_files: int, seed: int, decoder: str) -> int:
    rng = np.random.default_rng(seed)
    pristine, damaged = folder / "pristine", folder / "damaged"
    damage_of = write_files(pristine, num_files, rng)
    shutil.copytree(pristine, damaged)
    names = sorted(damage_of)
    for name in names[::2]:
        spoil(damaged / name, damage_of[name], rng)
    index = load_videos(damaged, max_bad_fraction=1.0)
    for name in names[1::2]:
        spoil(damaged / name, damage_of[name], rng)
    index = with_present_stamps(index)

    counts = Counter({"files": len(list(pristine.iterdir())), "refused by the index": len(index.bad)})
    table = clips_of(index, SPEC)
    clips = deliver(index, decoder)
    truth = frames_of(load_videos(pristine, progress=False), decoder)
    wrong = [clip for clip, video in clips if differs(video, clip, index, table, truth)]
    counts.update(tally(index, table, [clip for clip, _ in clips]))
    for name, number in counts.items():
        print(f"{number:>7,} {name}")
    report_wrong(wrong, [clip for clip, _ in clips], index, table, damage_of)

    problems = find_problems(counts, wrong, index, table, damage_of)
    for problem in problems:
        print(f"WRONG: {problem}")
    print("every file and every clip is accounted for" if not problems else f"{len(problems)} problems")
    return int(bool(problems))


# --------------------------------------------------------------------------------------------------------- files


def write_files(folder: Path, num_damaged: int, rng: np.random.Generator) -> dict[str, str]:
    """Write good files that differ in content only, and return the damage for those that will be damaged."""
    folder.mkdir(parents=True)
    originals = [list(write_originals(folder, kind)) for kind in FORMATS]
    damage_of = {}
    for number in range(num_damaged + num_damaged // 5):
        kind = number % len(FORMATS)
        source = originals[kind][number % len(originals[kind])]
        damage = DAMAGES[number // len(FORMATS) % len(DAMAGES)] if number < num_damaged else "good"
        path = folder / f"{damage}_{number:05d}{source.suffix}"
        shutil.copyfile(source, path)
        if damage != "good":
            damage_of[path.name] = damage
    for path in (path for paths in originals for path in paths):
        path.unlink()
    return damage_of


def write_originals(folder: Path, kind: Format) -> Iterator[Path]:
    """Write three videos of a bright block on a textured background."""
    import av

    for number in range(3):
        rng = np.random.default_rng(number)
        ground = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        path = folder / f"original_{number}{kind.suffix}"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(kind.codec, rate=10, options=dict(kind.options))
            stream.height, stream.width, stream.pix_fmt = 64, 64, kind.pix_fmt
            if kind.pix_fmt == "yuvj420p":
                stream.codec_context.color_range = 2
            for frame in range(NUM_FRAMES):
                image = ground.copy()
                image[20:40, frame : frame + 16] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        yield path


def spoil(path: Path, damage: str, rng: np.random.Generator) -> None:
    """Flip one to five bytes, zero up to a tenth of the file, or cut it anywhere."""
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        for position in rng.integers(0, len(data), rng.integers(1, 6)):
            data[position] ^= int(rng.integers(1, 256))
    elif damage == "zeroed":
        length = int(rng.integers(1, max(2, len(data) // 10)))
        start = int(rng.integers(0, len(data) - length))
        data[start : start + length] = bytes(length)
    else:
        del data[int(rng.integers(0, len(data))) :]
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------- streams


def with_present_stamps(index: VideoIndex) -> VideoIndex:
    """Return the index with the present sizes and times of its files, so that all files are decoded."""
    stats = [(index.root / video.path).stat() for video in index.videos]
    videos = [
        replace(video, size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
        for video, stat in zip(index.videos, stats, strict=True)
    ]
    return replace(index, videos=videos)


def deliver(index: VideoIndex, decoder: str) -> list[tuple[int, torch.Tensor]]:
    """Yield (clip id, frames [T, C, H, W]) of all clips of one epoch by two workers."""
    stream = VideoStream(
        index,
        SPEC,
        StreamSettings(
            size_px=64,
            channels=1,
            batch_size=LANES,
            num_lanes=LANES,
            pool_clips=256,
            seed=0,
            num_workers=2,
            decoder=decoder,
            max_bad_fraction=1.0,
        ),
    )
    batches = stream.batches()
    clips = []
    for batch in tqdm(islice(batches, stream.batches_per_epoch), total=stream.batches_per_epoch, unit="batch"):
        clips += [(int(clip), video.clone()) for clip, video in zip(batch["clip_id"], batch["video"], strict=True)]
    batches.close()
    return clips


def frames_of(index: VideoIndex, decoder: str) -> dict[str, torch.Tensor]:
    """Return all frames of each pristine file in clips, [clips, T, C, H, W]. Files with equal bytes share them."""
    table = clips_of(index, SPEC)
    clips = dict(deliver(index, decoder))
    found = {}
    for row, video in enumerate(index.videos):
        ids = range(int(table.first_clip[row]), int(table.first_clip[row + 1]))
        if all(clip in clips for clip in ids):
            found[video.path] = torch.stack([clips[clip] for clip in ids])
    return found


def differs(
    video: torch.Tensor, clip: int, index: VideoIndex, table: ClipTable, truth: dict[str, torch.Tensor]
) -> bool:
    """Return whether a delivered clip differs from the undamaged file at the same place."""
    [row] = table.videos_of(np.array([clip]))
    number = clip - int(table.first_clip[row])
    expected = truth.get(index.videos[row].path)
    return expected is not None and (number >= len(expected) or not torch.equal(video, expected[number]))


# -------------------------------------------------------------------------------------------------------- counts


def tally(index: VideoIndex, table: ClipTable, delivered: Sequence[int]) -> Counter[str]:
    tail = table.num_clips % LANES
    return Counter(
        {
            "videos in the index": len(index.videos),
            "clips in the index": table.num_clips,
            "delivered": len(delivered),
            "left to the next epoch": tail,
            "dropped, as they do not decode": table.num_clips - tail - len(delivered),
            "delivered twice": len(delivered) - len(set(delivered)),
        }
    )


def report_wrong(
    wrong: Sequence[int],
    delivered: Sequence[int],
    index: VideoIndex,
    table: ClipTable,
    damage_of: dict[str, str],
) -> None:
    """Print how many of the clips from damaged files differ from the undamaged ones."""
    print("\nclips delivered from damaged files, and those of them that decode to other pixels without an error:")
    names = {
        clip: index.videos[row].path for clip, row in zip(delivered, table.videos_of(np.array(delivered)), strict=True)
    }
    for suffix in (kind.suffix for kind in FORMATS):
        for damage in DAMAGES:
            mine = [clip for clip in delivered if names[clip].endswith(suffix) and damage_of.get(names[clip]) == damage]
            bad = len(set(mine) & set(wrong))
            print(f"{suffix:<6} {damage:<8} {len(mine):>6,} {bad:>6,}")


def find_problems(
    counts: Counter[str], wrong: Sequence[int], index: VideoIndex, table: ClipTable, damage_of: dict[str, str]
) -> list[str]:
    problems = []
    if counts["files"] != counts["refused by the index"] + counts["videos in the index"]:
        problems.append("files are missing from the index")
    if counts["delivered twice"]:
        problems.append("clips came twice")
    if counts["dropped, as they do not decode"] < 0:
        problems.append("more clips came than there are")
    good = [video.path for video in index.videos if video.path not in damage_of]
    if len(good) != counts["files"] - len(damage_of):
        problems.append("the index refused undamaged files")
    undamaged = [
        clip for clip in wrong if index.videos[int(table.videos_of(np.array([clip]))[0])].path not in damage_of
    ]
    if undamaged:
        problems.append(f"{len(undamaged)} clips of undamaged files have other pixels")
    return problems
