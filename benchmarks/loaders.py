"""Compare our stream with other libraries' loaders of video clips, on the same files, clips and cores.

python benchmarks/loaders.py --peers PEERS/bin/python --out loaders

The other libraries (benchmarks/peer_loaders.py) are installed in an environment of their own, of which --peers is the
interpreter; docs/benchmarks.md has the commands. One that does not import is named. Each measurement runs in a fresh
process. All loaders deliver shuffled batches of the same clips, uint8 or float [B, T, 3, H, W]. The first batch of each
is compared with our frames: it must be closer to them than to those one frame earlier or later, and differ by at most
MAX_DIFFERENCE levels on average, because resizing differs. A loader that fails this is not ranked.

Our stream is timed with its start over whole epochs, the others after each worker has delivered a batch, for --seconds.
Memory is the peak of the proportional set sizes (Pss) of all processes together, sampled once per second. The
time to the first batch is without imports. The videos are written to --out, and kept for the next run. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_pipelines.clip_decoder import clips_of, make_clip_set
from data_pipelines.clips import ClipSpec
from data_pipelines.decoders import scaled_size
from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.stream import ReadSettings, read_clips
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import make_out_folder, write_result
from worldmodel.training.machine import child_processes, machine_description, memory_mb

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import stream as stream_benchmark
from benchmarks.peer_loaders import LOADERS, Job
from benchmarks.scheduling import kept_scheduling

OURS = "worldmodel"
NUM_FRAMES = 9
SPEC = ClipSpec(1, NUM_FRAMES)
BATCH_SIZE = 16
FPS = 25
DISTINCT_VIDEOS = 3  # of the long ones; the others are links to them
MAX_DIFFERENCE = 6.0  # of 255
SAMPLE_S = 1.0
PATIENCE_S = 180.0
CAMERA = "video"  # the folder of the files, and the name of the camera in LeRobot's tables
AV1 = {"crf": "30", "preset": "12"}  # as LeRobot writes it, with keyint=2


@dataclass(frozen=True)
class Case:
    """Files of `frames_per_file` frames, with a keyframe every `keyint` frames, and how they are read.

    episodes: in each file. as_lerobot: our stream opens the LeRobot data set, not the folder of files.
    distinct: files that are written; the others are hard links to them. aim: speed that is wanted, times the best peer.
    """

    name: str
    title: str
    num_files: int
    frames_per_file: int
    keyint: int = 250
    codec: str = "libx264"
    size_px: int = 64
    pool_clips: int = 1024
    episodes: int = 1
    as_lerobot: bool = False
    distinct: int = DISTINCT_VIDEOS
    what: str = "speed"
    aim: float | None = None

    @property
    def is_tiny(self) -> bool:
        return self.frames_per_file == NUM_FRAMES

    @property
    def source_px(self) -> tuple[int, int]:
        """Height and width of the files."""
        return (64, 64) if self.is_tiny else (480, 640)


CASES = (
    Case("tiny", "files of nine 64x64 frames", 8000, NUM_FRAMES, distinct=8000, aim=1.5),
    Case("long_gop", "640x480 H.264, a keyframe every 250 frames, at 64 px", 18, 1500, aim=5.0),
    Case("av1", "640x480 AV1 as LeRobot writes it (a keyframe every 2 frames), at 64 px", 9, 1200, 2, "libsvtav1"),
    Case(
        "lerobot_v3", "a LeRobot v3 set: that AV1, four episodes per file, at 64 px", 9, 1200, 2, "libsvtav1",
        episodes=4, as_lerobot=True, aim=1.5,
    ),
    Case("px224", "640x480 H.264, a keyframe every 12 frames, at 224 px", 6, 1500, 12, size_px=224, pool_clips=256),
    Case(
        "files_100k", "time to the first batch of 100,000 indexed files, links to 500 of those of tiny", 100_000,
        NUM_FRAMES, distinct=500, what="first_batch",
    ),
)  # fmt: skip
MAX_FIRST_BATCH_S = 3.0  # for files_100k


@dataclass(frozen=True)
class Row:
    """One row of the result. difference: mean absolute difference from our frames, of 255."""

    case: str
    loader: str
    version: str
    clips_per_s: float
    first_batch_s: float
    peak_mb: float
    difference: float
    frames_equal: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loaders"), help="folder of the videos and of loaders.json")
    parser.add_argument("--peers", default=sys.executable, help="Python of the environment with the other libraries")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[c.name for c in CASES])
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), default=list(LOADERS))
    parser.add_argument("--workers", type=int, default=2, help="processes, or threads of SPDL (default: 2)")
    parser.add_argument("--repeats", type=int, default=1, help="of which the median is reported (default: 1)")
    parser.add_argument("--seconds", type=float, default=8.0, help="to time each loader (default: 8)")
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the videos to use (default: 1)")
    args = parser.parse_args()
    with report_errors():
        if args.workers < 1 or args.repeats < 1 or not 0 < args.fraction <= 1:
            raise UserError("--workers and --repeats must be at least 1, and --fraction above 0 and at most 1")
        cases = [shrunk(case, args.fraction) for case in CASES if case.name in args.cases]
        make_out_folder(args.out)
        outcome = compare(cases, args)
        write_result(args.out / "loaders.json", {"machine": machine_description(), **asdict(outcome)})
        lines = [table(outcome.rows, outcome.resumes), *verdicts(cases, outcome.rows)]
        lines += [f"{name}: not installed, or does not import: {why}" for name, why in outcome.missing.items()]
        lines += [f"{place}: failed: {why}" for place, why in outcome.failed.items()]
        print("\n".join([*lines, str(args.out / "loaders.json")]))
    return 0


def shrunk(case: Case, fraction: float) -> Case:
    num_files = max(2, round(case.num_files * fraction))
    return replace(case, num_files=num_files, distinct=min(case.distinct, num_files))


@dataclass
class Outcome:
    """All rows. missing: libraries that do not import, and why. failed: by case and loader. resumes: exactly or not."""

    rows: list[Row]
    missing: dict[str, str]
    failed: dict[str, str]
    resumes: dict[str, bool]


def compare(cases: Sequence[Case], args: argparse.Namespace) -> Outcome:
    found: dict[tuple[str, str], list[Row]] = {}
    outcome = Outcome([], {}, {}, {})
    indices = {case.name: write_case(case, args.out) for case in cases}
    with tqdm(total=len(args.loaders) * (len(cases) * args.repeats + 1), unit="run") as bar:
        for name in args.loaders:
            bar.set_postfix_str(f"resuming {name}")
            said = run_apart(cases[0], indices[cases[0].name], name, "resume", args)
            outcome.resumes[name] = said.get("resumes", False)
            if "missing" in said:
                outcome.missing[name] = said["missing"]
            bar.update()
        for _ in range(args.repeats):
            for case in cases:
                for name in args.loaders:
                    bar.set_postfix_str(f"{case.name} {name}")
                    if name not in outcome.missing:
                        said = run_apart(case, indices[case.name], name, case.what, args)
                        if "failed" in said:
                            outcome.failed[f"{case.name} {name}"] = said["failed"]
                        else:
                            found.setdefault((case.name, name), []).append(row_of(case, name, said))
                    bar.update()
    outcome.rows = [middle(rows) for rows in found.values()]
    return outcome


def middle(rows: Sequence[Row]) -> Row:
    """Return the medians of the repeats of one row."""
    return replace(
        rows[0],
        clips_per_s=median(row.clips_per_s for row in rows),
        first_batch_s=median(row.first_batch_s for row in rows),
        peak_mb=median(row.peak_mb for row in rows),
        frames_equal=all(row.frames_equal for row in rows),
    )


def row_of(case: Case, name: str, said: dict[str, Any]) -> Row:
    return Row(
        case.name,
        name,
        said["version"],
        round(said["clips_per_s"], 1),
        round(said["first_batch_s"], 2),
        round(said["peak_mb"]),
        round(said["difference"], 2),
        said["difference"] <= MAX_DIFFERENCE,
    )


def run_apart(case: Case, index: VideoIndex, name: str, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run benchmarks/peer_loaders.py on a job in a fresh process.

    Return its result, with "peak_mb", and "difference" (check_frames); or "failed" alone, the reason.
    """
    root = (args.out / case.name).resolve()
    with tempfile.TemporaryDirectory(prefix="loaders_") as folder:
        place = Path(folder)
        write_clips(case, index, place)
        job = Job(
            loader=name,
            what=what,
            root=str(root),
            videos=str(root if case.as_lerobot else root / CAMERA),
            paths=str(place / "paths.npy"),
            clips=str(place / "clips.npy"),
            num_frames=NUM_FRAMES,
            fps=FPS,
            scaled=scaled_size(case.source_px, case.size_px),
            size_px=case.size_px,
            batch_size=BATCH_SIZE,
            pool_clips=case.pool_clips,
            workers=args.workers,
            seconds=args.seconds,
            frames=str(place / "frames.npz"),
            result=str(place / "result.json"),
        )
        (place / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        python = sys.executable if name == OURS else args.peers
        script = Path(__file__).with_name("peer_loaders.py")
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
            "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / ".huggingface"),
        }  # fmt: skip
        with open(place / "errors.txt", "w+", encoding="utf-8", errors="replace") as errors:
            peak_mb, code = watched([python, str(script), str(place / "job.json")], environment, errors)
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["no message"]
        if code != 0 or not Path(job.result).is_file():
            return {"failed": f"takes more than {PATIENCE_S:.0f} s" if code is None else lines[-1]}
        said = json.loads(Path(job.result).read_text(encoding="utf-8"))
        if Path(job.frames).is_file():
            said["difference"] = check_frames(case, index, Path(job.frames))
        return {**said, "peak_mb": peak_mb}


def watched(command: Sequence[str], environment: dict[str, str], errors: Any) -> tuple[float, int | None]:
    """Run a command. Return the peak memory of it and its children in MiB, and its exit code; None: it was too slow."""
    peak_mb, started_s = 0.0, time.monotonic()
    try:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
    except OSError as error:
        raise UserError(f"--peers={command[0]} does not start: {error.strerror}") from None
    with child:
        while child.poll() is None:
            peak_mb = max(peak_mb, memory_of(child.pid))
            if time.monotonic() - started_s > PATIENCE_S:
                child.kill()
                return peak_mb, None
            time.sleep(SAMPLE_S)
    return peak_mb, child.returncode


def memory_of(pid: int) -> float:
    """Return the memory of a process and its children, in MiB, without those that have just ended."""
    total_mb = 0.0
    try:
        for each in (pid, *child_processes(pid)):
            total_mb += memory_mb(each, "Pss")
    except (OSError, StopIteration):
        pass
    return total_mb


def check_frames(case: Case, index: VideoIndex, path: Path) -> float:
    """Return the mean absolute difference of a loader's frames from ours; infinity if they are other frames."""
    with np.load(path) as saved:
        clips, video = saved["clips"], saved["video"].astype(np.float32)
    order = np.argsort(clips)
    settings = ReadSettings(batch_size=len(clips), size_px=case.size_px)
    clip_set = make_clip_set(index, SPEC, size_px=case.size_px, channels=3, decoder="auto")
    [batch] = read_clips(clip_set, clips[order], settings)
    return difference_from(batch["video"].numpy().astype(np.float32), video[order])


def difference_from(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the mean absolute difference of frames [B, T, C, H, W]; infinity if some clip has other frames.

    Other frames: another shape, or a clip that is closer to ours one frame earlier or later.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    for our_clip, their_clip in zip(ours, theirs, strict=True):
        inner = their_clip[1:-1]
        aligned, earlier, later = (
            float(np.abs(inner - our_clip[start : start + len(inner)]).mean()) for start in (1, 0, 2)
        )
        if aligned > min(earlier, later):
            return float("inf")
    return float(np.abs(ours - theirs).mean())


# -------------------------------------------------------------------------------------------------------------- videos


def write_case(case: Case, out: Path) -> VideoIndex:
    """Write the files of a case, except those that exist, and return our index of them.

    out/CASE is a LeRobot data set of version 3 and a data set of stable-worldmodel of the same files, video/ep_N.mp4.
    """
    root = out / case.name
    folder = root / CAMERA
    folder.mkdir(parents=True, exist_ok=True)
    sources = written_files(case, out)
    for number in tqdm(range(case.num_files), desc=f"{case.name} files", unit="file", leave=False):
        path = folder / f"ep_{number}.mp4"
        if not path.exists():
            path.hardlink_to(sources[number % len(sources)])
    for extra in range(case.num_files, len(os.listdir(folder))):  # of an earlier run with a larger fraction
        (folder / f"ep_{extra}.mp4").unlink(missing_ok=True)
    write_tables(case, root)
    return load_videos(str(root if case.as_lerobot else folder))


def written_files(case: Case, out: Path) -> list[Path]:
    """Return the distinct files of a case, and write those that are missing."""
    if case.is_tiny:
        world = out / f"tiny_world_{case.distinct}"
        counts: Any = {"train": case.distinct, "selection": 1, "test": 1}
        write_moving_mnist(world, counts, num_processes=os.cpu_count() or 1)
        return sorted((world / "train").glob("*.mp4"))
    folder = out / f"{case.codec}_{case.keyint}"
    folder.mkdir(parents=True, exist_ok=True)
    scene = stream_benchmark.Case(case.name, "", 3, *case.source_px, case.distinct, case.frames_per_file, case.keyint)
    paths = [folder / f"{number}_{case.frames_per_file}.mp4" for number in range(case.distinct)]
    for number, path in enumerate(tqdm(paths, desc=f"{case.name} videos", unit="file", leave=False)):
        if not path.exists():
            partial = path.with_suffix(".partial")
            with kept_scheduling():
                stream_benchmark.write_scene(partial, scene, number, case.codec, **(AV1 if "av1" in case.codec else {}))
            partial.replace(path)
    return paths


def write_tables(case: Case, root: Path) -> None:
    """Write the tables of the LeRobot data set, and those of stable-worldmodel, whose episodes are whole files."""
    length = case.frames_per_file // case.episodes
    num_episodes = case.num_files * case.episodes
    num_rows = num_episodes * length
    np.savez(root / "ep_len.npz", np.full(case.num_files, case.frames_per_file, dtype=np.int32))
    np.savez(root / "ep_offset.npz", np.arange(case.num_files, dtype=np.int64) * case.frames_per_file)
    numbers = ("frame_index", "episode_index", "index", "task_index")
    features: dict[str, Any] = {name: {"dtype": "int64", "shape": [1], "names": None} for name in numbers}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    features["action"] = {"dtype": "float32", "shape": [2], "names": None}
    features[CAMERA] = {
        "dtype": "video",
        "shape": [*case.source_px, 3],
        "names": ["height", "width", "channels"],
        "info": {"video.fps": FPS, "video.codec": case.codec},
    }
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": features,
        "total_episodes": num_episodes,
        "total_frames": num_rows,
        "total_tasks": 1,
        "chunks_size": 10**6,
        "splits": {"train": f"0:{num_episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "{video_key}/ep_{file_index}.mp4",
    }
    (root / "meta").mkdir(exist_ok=True)
    write_text(root / "meta" / "info.json", json.dumps(info))
    write_table(root / "meta" / "tasks.parquet", {"task": ["none"], "task_index": [0]})
    episodes, rows = np.arange(num_episodes), np.arange(num_rows)
    in_file = episodes % case.episodes
    zeros = np.zeros(num_episodes, dtype=np.int64)
    table = {
        "episode_index": episodes,
        "tasks": [["none"]] * num_episodes,
        "length": zeros + length,
        "dataset_from_index": episodes * length,
        "dataset_to_index": (episodes + 1) * length,
        "data/chunk_index": zeros,
        "data/file_index": zeros,
        f"videos/{CAMERA}/chunk_index": zeros,
        f"videos/{CAMERA}/file_index": episodes // case.episodes,
        f"videos/{CAMERA}/from_timestamp": in_file * length / FPS,
        f"videos/{CAMERA}/to_timestamp": (in_file + 1) * length / FPS,
    }
    write_table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet", table)
    frames = {
        "timestamp": (rows % length / FPS).astype(np.float32),
        "frame_index": rows % length,
        "episode_index": rows // length,
        "index": rows,
        "task_index": np.zeros(num_rows, dtype=np.int64),
        "action": list(np.zeros((num_rows, 2), dtype=np.float32)),
    }
    write_table(root / "data" / "chunk-000" / "file-000.parquet", frames)


def write_table(path: Path, columns: dict[str, Any]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("the LeRobot data set needs pyarrow: pip install 'worldmodel[lerobot]'") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def write_clips(case: Case, index: VideoIndex, folder: Path) -> None:
    """Write the clips of our index as Job describes them: paths.npy, clips.npy."""
    table = clips_of(index, SPEC)
    clips = np.arange(table.num_clips)
    file_of_row = np.array([int(Path(video.path).stem.removeprefix("ep_")) for video in index.videos])
    files, starts = file_of_row[table.videos_of(clips)], table.starts_of(clips)
    paths = [str((folder_of(index) / f"ep_{number}.mp4").resolve()) for number in range(case.num_files)]
    np.save(folder / "paths.npy", np.array(paths))
    np.save(folder / "clips.npy", np.stack([files, starts, files * case.frames_per_file + starts], axis=1))


def folder_of(index: VideoIndex) -> Path:
    return (index.root / index.videos[0].path).parent


# ------------------------------------------------------------------------------------------------------------- results


def table(rows: Sequence[Row], resumes: dict[str, bool]) -> str:
    lines = [
        f"{'case':<11} {'loader':<18} {'version':<24} {'clips/s':>9} {'first batch, s':>15} {'peak, MB':>9} "
        f"{'difference':>11} exact resume"
    ]
    for row in rows:
        speed = f"{row.clips_per_s:,.1f}" if row.clips_per_s else "-"
        difference = f"{row.difference:.2f}" if row.frames_equal else "other frames"
        lines.append(
            f"{row.case:<11} {row.loader:<18} {row.version:<24} {speed:>9} {row.first_batch_s:>15.2f} "
            f"{row.peak_mb:>9,.0f} {difference:>11} {'yes' if resumes[row.loader] else 'no'}"
        )
    return "\n".join(lines)


def verdicts(cases: Sequence[Case], rows: Sequence[Row]) -> list[str]:
    """Return one line per case: how many times faster than the best of the others our stream is."""
    lines = []
    for case in cases:
        ranked = {row.loader: row for row in rows if row.case == case.name and row.frames_equal}
        ours = ranked.pop(OURS, None)
        if ours is None:
            continue
        if case.what == "first_batch":
            is_met = ours.first_batch_s <= MAX_FIRST_BATCH_S
            outcome = "met" if is_met else "missed"
            lines.append(f"{case.name}: {ours.first_batch_s:.2f} s (at most {MAX_FIRST_BATCH_S:g} s: {outcome})")
        elif ranked:
            best = max(ranked.values(), key=lambda row: row.clips_per_s)
            ratio = ours.clips_per_s / best.clips_per_s
            aim = f" (at least {case.aim:g}: {'met' if ratio >= case.aim else 'missed'})" if case.aim else ""
            lines.append(f"{case.name}: {ratio:.2f} times the best other loader, {best.loader}{aim}")
            lines += [
                f"{case.name}: {row.loader} is faster" for row in ranked.values() if row.clips_per_s > ours.clips_per_s
            ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
