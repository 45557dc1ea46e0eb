"""Loaders of video clips: ours and those of other libraries, all with the same output. benchmarks/loaders.py runs them.

python benchmarks/peer_loaders.py JOB.json

This file runs in any environment that has torch: a library is imported only by its own loader. A loader is one function
of a Job that returns a fresh iterable. It yields every clip once, shuffled, in batches of clip numbers [B] and frames
[B, T, 3, H, W]; ours continues with further epochs. To add a loader, write such a function and enter it in LOADERS.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

OPEN_FILES = 32  # decoders that a worker keeps open
SPDL_AHEAD = 2  # batches
RESUMED_AT = 3  # batches


@dataclass(frozen=True)
class Job:
    """One measurement. The N clips are numbered as in our index.

    loader: name in LOADERS. what: "speed", "first_batch" or "resume".
    root: the folder that is a LeRobot data set and one of stable-worldmodel. videos: what our stream opens.
    paths: .npy of the files' paths. clips: .npy [N, 3] of file, first frame, and row in the tables of the LeRobot set.
    scaled: (height, width) to which frames are resized, before they are cropped to size_px in the centre.
    frames: .npz for the first batch. result: JSON file to write.
    """

    loader: str
    what: str
    root: str
    videos: str
    paths: str
    clips: str
    num_frames: int
    fps: int
    scaled: tuple[int, int]
    size_px: int
    batch_size: int
    pool_clips: int
    workers: int
    seconds: float
    frames: str
    result: str

    @property
    def rows(self) -> np.ndarray:
        """Files, first frames and table rows of the clips: int64 [N, 3]."""
        return np.load(self.clips)

    @property
    def path_of(self) -> np.ndarray:
        return np.load(self.paths)


class Clips(Dataset[tuple[int, Tensor]]):
    """The clips in the form that a DataLoader takes. fetch: a clip's number -> frames [T, 3, H, W]."""

    def __init__(self, num_clips: int, fetch: Callable[[int], Tensor]) -> None:
        self._num_clips, self._fetch = num_clips, fetch

    def __len__(self) -> int:
        return self._num_clips

    def __getitem__(self, clip: int) -> tuple[int, Tensor]:
        return clip, self._fetch(clip)


def data_loader(job: Job, fetch: Callable[[int], Tensor]) -> "DataLoader[tuple[int, Tensor]]":
    return DataLoader(
        Clips(len(job.rows), fetch),
        job.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=job.workers,
        generator=torch.Generator().manual_seed(0),
    )


def resized(job: Job, frames: Tensor) -> Tensor:
    """Resize and crop [T, 3, H, W] of libraries that deliver frames at full size."""
    if frames.shape[-2:] != tuple(job.scaled):
        frames = interpolate(frames, job.scaled, mode="bilinear", antialias=True)
    return cropped(job, frames)


def cropped(job: Job, frames: Tensor) -> Tensor:
    """Crop [..., H, W] in the centre."""
    top, left = ((side - job.size_px) // 2 for side in job.scaled)
    return frames[..., top : top + job.size_px, left : left + job.size_px].contiguous()


# ------------------------------------------------------------------------------------------------------------ loaders


class OurStream:
    """Our stream, epoch after epoch, with its state_dict."""

    def __init__(self, job: Job) -> None:
        from data_pipelines.clips import ClipSpec
        from data_pipelines.formats.registry import load_videos
        from data_pipelines.stream import StreamSettings, VideoStream

        settings = StreamSettings(
            job.batch_size,
            job.size_px,
            num_lanes=job.batch_size,
            pool_clips=job.pool_clips,
            num_workers=job.workers,
        )
        index = load_videos(job.videos, progress=False)
        self._stream = VideoStream(index, ClipSpec(1, job.num_frames), settings)
        self.state_dict, self.load_state_dict = self._stream.state_dict, self._stream.load_state_dict

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._stream:
            yield batch["clip_id"], batch["video"]


def torchcodec(job: Job) -> Iterable[Any]:
    """A clip sampler of torchcodec, whose range is one first frame, in a DataLoader. FFmpeg resizes and crops."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.samplers import clips_at_random_indices
    from torchcodec.transforms import CenterCrop, Resize

    rows, path_of = job.rows, job.path_of

    @lru_cache(OPEN_FILES)
    def decoder(file: int) -> Any:
        path = str(path_of[file])
        return VideoDecoder(path, transforms=[Resize(job.scaled), CenterCrop((job.size_px, job.size_px))])

    def fetch(clip: int) -> Tensor:
        file, start, _ = rows[clip].tolist()
        found = clips_at_random_indices(
            decoder(file),
            num_clips=1,
            num_frames_per_clip=job.num_frames,
            sampling_range_start=start,
            sampling_range_end=start + 1,
        )
        return found.data[0]

    return data_loader(job, fetch)


def datasets(job: Job) -> Iterable[Any]:
    """Rows of Hugging Face datasets with the feature Video, which opens a decoder of torchcodec, in a DataLoader."""
    from datasets import Dataset as Rows
    from datasets import Video

    rows, path_of = job.rows, job.path_of
    columns = {"video": path_of[rows[:, 0]].tolist(), "start": rows[:, 1].tolist()}
    table = Rows.from_dict(columns).cast_column("video", Video())

    def fetch(clip: int) -> Tensor:
        row = table[clip]
        return resized(job, row["video"].get_frames_in_range(row["start"], row["start"] + job.num_frames).data)

    return data_loader(job, fetch)


def decord(job: Job) -> Iterable[Any]:
    """VideoReader.get_batch of decord, which resizes while it decodes, in a DataLoader."""
    from decord import VideoReader, cpu

    rows, path_of = job.rows, job.path_of
    height, width = job.scaled

    @lru_cache(OPEN_FILES)
    def reader(file: int) -> Any:
        return VideoReader(str(path_of[file]), ctx=cpu(0), num_threads=1, width=width, height=height)

    def fetch(clip: int) -> Tensor:
        file, start, _ = rows[clip].tolist()
        found = reader(file).get_batch(range(start, start + job.num_frames)).asnumpy()
        return cropped(job, torch.from_numpy(found).permute(0, 3, 1, 2))

    return data_loader(job, fetch)


def lerobot(job: Job) -> Iterable[Any]:
    """LeRobotDataset with delta_timestamps for the frames of a clip, in a DataLoader."""
    import_torchvision()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    times_s = [step / job.fps for step in range(job.num_frames)]
    dataset = LeRobotDataset(
        "local/videos", root=job.root, delta_timestamps={"video": times_s}, image_transforms=partial(resized, job)
    )
    table_rows = job.rows[:, 2].tolist()
    return data_loader(job, lambda clip: dataset[table_rows[clip]]["video"])


def stable_worldmodel(job: Job) -> Iterable[Any]:
    """VideoDataset of stable-worldmodel, which reads with decord, in a DataLoader."""
    import_torchvision()
    from stable_worldmodel.data import VideoDataset

    def transform(steps: dict[str, Any]) -> dict[str, Any]:
        return {"video": resized(job, steps["video"])}

    dataset = VideoDataset(
        path=job.root, video_keys=["video"], keys_to_load=["video"], num_steps=job.num_frames, transform=transform
    )
    first_item = np.cumsum([0, *np.maximum(0, np.asarray(dataset.lengths) - job.num_frames + 1)])
    rows = job.rows
    items = (first_item[rows[:, 0]] + rows[:, 1]).tolist()
    return data_loader(job, lambda clip: dataset[items[clip]]["video"])


class Spdl:
    """A pipeline of SPDL: threads that demux, decode and convert single clips, then batches."""

    def __init__(self, job: Job) -> None:
        import spdl.io
        from spdl.pipeline import PipelineBuilder

        self._job, self._io, self._builder = job, spdl.io, PipelineBuilder
        self._rows, self._path_of = job.rows, job.path_of

    def _fetch(self, clip: int) -> tuple[int, Tensor]:
        job, io = self._job, self._io
        file, start, _ = self._rows[clip].tolist()
        window = ((start - 0.5) / job.fps, (start + job.num_frames - 0.5) / job.fps)
        height, width = job.scaled
        wanted = io.get_video_filter_desc(
            timestamp=window, scale_width=width, scale_height=height, scale_algo="area", scale_mode=None
        )
        buffer = io.load_video(str(self._path_of[file]), timestamp=window, filter_desc=wanted)
        frames = io.to_torch(buffer)[: job.num_frames]
        return clip, cropped(job, frames.permute(0, 3, 1, 2))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        job = self._job
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(0)).tolist()
        builder = self._builder().add_source(order).pipe(self._fetch, concurrency=job.workers)
        pipeline = builder.aggregate(job.batch_size, drop_last=True).add_sink(SPDL_AHEAD).build(num_threads=job.workers)
        with pipeline.auto_stop():
            for clips in pipeline:
                numbers, frames = zip(*clips, strict=True)
                yield torch.tensor(numbers), torch.stack(frames)


def import_torchvision() -> None:
    """Import torchvision, also where it was built for another torch and its compiled operators do not load.

    The transforms of torchcodec and the data sets of LeRobot and stable-worldmodel import it, and use none of these
    operators.
    """
    register = torch.library.register_fake

    def register_other(name: Any, *args: Any, **options: Any) -> Any:
        if str(name).startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **options)

    try:
        torch.library.register_fake = register_other
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


@dataclass(frozen=True)
class Loader:
    """A library. module: imported before the clock starts. packages: of which the first installed gives the version."""

    open: Callable[[Job], Iterable[Any]]
    module: str
    packages: tuple[str, ...]
    needs_torchvision: bool = False


LOADERS = {
    "worldmodel": Loader(OurStream, "data_pipelines.stream", ("worldmodel",)),
    "torchcodec": Loader(torchcodec, "torchcodec.samplers", ("torchcodec",), needs_torchvision=True),
    "datasets": Loader(datasets, "datasets", ("datasets",)),
    "decord": Loader(decord, "decord", ("decord2", "decord")),
    "lerobot": Loader(lerobot, "lerobot.datasets.lerobot_dataset", ("lerobot",), needs_torchvision=True),
    "stable-worldmodel": Loader(
        stable_worldmodel, "stable_worldmodel.data", ("stable-worldmodel",), needs_torchvision=True
    ),
    "spdl": Loader(Spdl, "spdl.io", ("spdl-io",)),
}

# ------------------------------------------------------------------------------------------------------------ measuring


def main() -> int:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    loader = LOADERS[job.loader]
    try:
        if loader.needs_torchvision:
            import_torchvision()
        importlib.import_module(loader.module)
    except (ImportError, OSError, RuntimeError) as error:  # the latter two: a library of another build
        result: dict[str, Any] = {"missing": f"{type(error).__name__}: {error}".splitlines()[0]}
    else:
        result = {"version": version_of(loader)}
        result |= {"resumes": resumes(loader, job)} if job.what == "resume" else timed(loader, job)
    Path(job.result).write_text(json.dumps(result), encoding="utf-8")
    return 0


def version_of(loader: Loader) -> str:
    for package in loader.packages:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return loader.packages[0]


def timed(loader: Loader, job: Job) -> dict[str, float]:
    """Return clips per second and the time to the first batch, in seconds from opening.

    Our stream decodes ahead, so it is timed from its opening to the end of an epoch, the first one after job.seconds.
    The others are timed for job.seconds, from when each worker has delivered a batch until all have delivered equally
    many, so their start does not count.
    """
    is_ours = job.loader == "worldmodel"
    batches_per_epoch = len(job.rows) // job.batch_size
    num_clips = counted = 0
    started_s = marked_s = ended_s = time.perf_counter()
    first_batch_s = None
    for num_batches, (numbers, frames) in enumerate(loader.open(job), start=1):
        now_s = time.perf_counter()
        if first_batch_s is None:
            first_batch_s = now_s - started_s
            save_frames(job, numbers, frames)
            if job.what == "first_batch":
                break
        elif is_ours or num_batches > job.workers:
            num_clips += len(numbers)
        if is_ours:
            ended_s = now_s
            if num_batches % batches_per_epoch == 0 and now_s - started_s >= job.seconds:
                break
        elif num_batches % job.workers == 0:
            if num_batches == job.workers:
                marked_s = now_s
            counted, ended_s = num_clips, now_s
            if now_s - marked_s > job.seconds and num_clips:
                break
    if first_batch_s is None:
        raise ValueError("the loader delivered no batch")
    if is_ours:
        counted = num_clips + job.batch_size  # the first batch counts, too
    speed = counted / (ended_s - marked_s) if job.what == "speed" else 0.0
    return {"first_batch_s": first_batch_s, "clips_per_s": speed}


def save_frames(job: Job, numbers: Tensor, frames: Tensor) -> None:
    """Save a batch as uint8, to be compared with ours."""
    if frames.is_floating_point():
        frames = (frames * 255).round().clamp(0, 255).to(torch.uint8)
    np.savez(job.frames, clips=numbers.numpy(), video=frames.numpy())


def resumes(loader: Loader, job: Job) -> bool:
    """Return whether a fresh loader that takes the state of another one delivers the same next batch, bit for bit."""
    first: Any = loader.open(job)
    if not (hasattr(first, "state_dict") and hasattr(first, "load_state_dict")):
        return False
    batches = iter(first)
    for _ in islice(batches, RESUMED_AT):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    expected = next(batches)
    second: Any = loader.open(job)
    second.load_state_dict(state)
    found = next(iter(second))
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


if __name__ == "__main__":
    sys.exit(main())
