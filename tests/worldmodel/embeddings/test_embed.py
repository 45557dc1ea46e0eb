"""Embeddings of collections: the rows, exactly once after kills, and one line for a user's mistake."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.transforms import to_float
from data_pipelines.worlds.written import encode_h264
from tests.conftest import REPO, script_environment
from worldmodel.commands import embed as command
from worldmodel.commands.main import main
from worldmodel.embeddings import embed, engines, parts
from worldmodel.embeddings.embed import EmbedOptions, embed_collection
from worldmodel.embeddings.parts import RunPlace, weights_of
from worldmodel.runs.trained_run import TrainedRun, load

pyarrow = pytest.importorskip("pyarrow")
PER_PART = 7
OPTIONS = EmbedOptions(num_processes=1, videos_per_part=PER_PART, progress=False)
Rows = list[tuple[str, int, float | None, bytes]]


@pytest.fixture(scope="module")
def run(trained_run: Path) -> TrainedRun:
    return load(trained_run)


@pytest.fixture(scope="module")
def videos(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 videos of nine frames at ten a second, 14 of them in a subfolder."""
    root = tmp_path_factory.mktemp("collection")
    (root / "sub").mkdir()
    for number, path in enumerate(sorted((world / "test").glob("*.mp4"))):
        shutil.copy(path, root / ("sub" if number < 14 else "") / path.name)
    return root


@pytest.fixture
def make(run: TrainedRun, tmp_path: Path) -> Callable[..., embed.Embedded]:
    """A function that embeds a folder of videos into tmp_path / NAME."""

    def made(root: Path, name: str = "out", *, overrides: tuple[str, ...] = (), **options: Any) -> embed.Embedded:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        place = RunPlace(run.folder, "latest", "cpu", False, options.pop("weights", weights_of(run)))
        data = command.data_of(run.config, str(root), overrides, trust_code=False)
        return embed_collection(place, run.state["step"], data, out, dataclasses.replace(OPTIONS, **options))

    return made


@pytest.fixture(scope="module")
def expected(run: TrainedRun, videos: Path) -> Rows:
    """The rows by a loop of its own: the segments of the videos of each part in one batch, read frame by frame."""
    names = sorted(path.relative_to(videos).as_posix() for path in videos.rglob("*.mp4"))
    rows: Rows = []
    for first in range(0, len(names), PER_PART):
        places = [(name, start) for name in names[first : first + PER_PART] for start in (0, 3, 6)]
        clips = [
            np.stack(list(read_frames(videos / name, start, start + 3, channels=1, size_px=64)))
            for name, start in places
        ]
        with torch.no_grad():
            embeddings = run.model.embedder(to_float(torch.from_numpy(np.stack(clips)))).numpy()
        for (name, start), embedding in zip(places, embeddings, strict=True):
            rows.append((name, start, start / 10, embedding.tobytes()))
    return rows


def rows_of(out: Path) -> Rows:
    """Return the rows of a folder as any reader of Parquet finds them."""
    from pyarrow import parquet

    table = parquet.read_table(out)
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 16)
    columns = (table[name].to_pylist() for name in ("file_name", "first_frame", "time_s"))
    embeddings = [np.array(values, dtype=np.float32).tobytes() for values in table["embedding"].to_pylist()]
    return list(zip(*columns, embeddings, strict=True))


def in_child(work: Callable[[], object]) -> int:
    """Run a function in a forked process; return its exit code, or the negative number of the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------ rows


def test_rows_are_those_of_a_loop(make: Callable[..., Any], videos: Path, tmp_path: Path, expected: Rows) -> None:
    result = make(videos)
    assert result == (24, 4, 4, 72, 0)
    assert rows_of(tmp_path / "out") == expected
    assert [path.name for path in sorted(tmp_path.glob("out/*.parquet"))] == [
        f"part-0000{number}-of-00004.parquet" for number in range(4)
    ]


def test_hosts_make_disjoint_parts_that_are_all(
    make: Callable[..., Any], videos: Path, tmp_path: Path, expected: Rows
) -> None:
    before: set[Path] = set()
    for host in range(3):
        make(videos, num_hosts=3, host_index=host)
        after = set(tmp_path.glob("out/*.parquet"))
        assert before < after
        before = after
    assert rows_of(tmp_path / "out") == expected


def test_segments_may_overlap_and_be_resampled(make: Callable[..., Any], videos: Path, tmp_path: Path) -> None:
    make(videos, "dense", overrides=("data.clip_step=1",))
    assert [row[:2] for row in rows_of(tmp_path / "dense")][:7] == [("000014.mp4", start) for start in range(7)]
    make(videos, "slow", overrides=("data.fps=5",))  # every second frame: 0 2 4 6 8
    assert [row[1:3] for row in rows_of(tmp_path / "slow")] == [(0, 0.0)] * 24


def test_shards_have_the_rows_of_their_videos(
    make: Callable[..., Any], videos: Path, tmp_path: Path, expected: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", str(videos), str(tmp_path / "shards")]) == 0
    make(tmp_path / "shards")
    rows = sorted(rows_of(tmp_path / "out"))  # shards have another order, and so other batches: the last bits differ
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose(np.frombuffer(row[3], "f4"), np.frombuffer(other[3], "f4"), atol=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_same_rows(
    make: Callable[..., Any], videos: Path, tmp_path: Path, expected: Rows
) -> None:
    make(videos, num_processes=2)
    assert rows_of(tmp_path / "out") == expected


# ----------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("num_parts", [0, 2])
def test_killed_between_parts_and_continued(
    make: Callable[..., Any],
    videos: Path,
    tmp_path: Path,
    expected: Rows,
    num_parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter(range(num_parts))

    def dying(*arguments: Any) -> Any:
        if next(left, None) is None:
            kill_self()
        return parts.embed_part(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "embed_part", dying)
        assert in_child(lambda: make(videos)) == -signal.SIGKILL
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.parquet")}
    assert len(stamps) == num_parts
    make(videos)
    assert rows_of(tmp_path / "out") == expected
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "finished parts are skipped"


def test_killed_within_a_part_and_continued(
    make: Callable[..., Any], videos: Path, tmp_path: Path, expected: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = parts.in_groups

    def dying(tables: Any) -> Any:
        yield from groups(tables)
        if list(tmp_path.glob("out/*.parquet")):
            kill_self()

    with monkeypatch.context() as patch:
        patch.setattr(parts, "in_groups", dying)
        assert in_child(lambda: make(videos)) == -signal.SIGKILL
    assert len(list(tmp_path.glob("out/*.parquet"))) == 1
    assert len(list(tmp_path.glob("out/.part-00001-*.partial"))) == 1
    make(videos)
    assert rows_of(tmp_path / "out") == expected
    assert not list(tmp_path.glob("out/.part-*"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_a_killed_command_leaves_no_process_and_continues(
    videos: Path, trained_run: Path, tmp_path: Path, expected: Rows, engine: str
) -> None:
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    out = tmp_path / "out"
    arguments = [str(videos), str(out), "--run", str(trained_run), "--num-processes", "2", "--engine", engine]
    arguments += ["--videos-per-part", str(PER_PART)]
    whole = [sys.executable, "-m", "worldmodel", "embed", *arguments]
    options: Any = {"cwd": REPO, "env": script_environment(), "start_new_session": True}
    killed = subprocess.Popen(whole, **options)
    deadline_s = time.monotonic() + 300
    while not list(out.glob("*.parquet")) and killed.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    if engine == "processes":
        deadline_s = time.monotonic() + 10
        while _of_session(killed.pid) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not _of_session(killed.pid)
    assert subprocess.run(whole, **options, timeout=300).returncode == 0
    assert rows_of(out) == expected


def _of_session(session: int) -> list[str]:
    """Return the living processes of a session, without the tracker of resources, which ends by itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((path.parent / "cmdline").read_text(errors="replace"))
        except OSError:
            continue
    return [line for line in found if "resource_tracker" not in line]


# -------------------------------------------------------------------------------------------------------- bad videos


def test_bad_videos_are_recorded_and_lose_no_others(
    make: Callable[..., Any], videos: Path, tmp_path: Path, expected: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    (root / "zz.mp4").write_bytes(b"no video")
    load_index = embed.load_index

    def changed_meanwhile(*arguments: Any) -> Any:
        index = load_index(*arguments)
        shutil.copy(root / "000014.mp4", root / "sub" / "000003.mp4")
        return index

    monkeypatch.setattr(embed, "load_index", changed_meanwhile)
    assert make(root) == (24, 4, 4, 69, 2)
    rows = rows_of(tmp_path / "out")
    assert [row[:3] for row in rows] == [row[:3] for row in expected if row[0] != "sub/000003.mp4"]
    bad = [json.loads(line) for line in (tmp_path / "out" / "_bad.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["part"]) for row in bad] == [
        ("zz.mp4", None),
        ("sub/000003.mp4", "part-00001-of-00004.parquet"),
    ]
    assert "has changed since it was indexed" in bad[1]["reason"]


def test_short_videos_are_recorded(make: Callable[..., Any], videos: Path, long_video: Path, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    shutil.copy(long_video, root / "long.mp4")
    assert make(root, overrides=("data.frame_stride=5",)) == (25, 4, 4, 2, 24)
    assert [row[:2] for row in rows_of(tmp_path / "out")] == [("long.mp4", 0), ("long.mp4", 15)]
    assert "is shorter than a segment, which takes 11 frames" in (tmp_path / "out" / "_bad.jsonl").read_text()


def test_too_many_bad_videos_end_it(
    make: Callable[..., Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    load_index = embed.load_index

    def lost_meanwhile(*arguments: Any) -> Any:
        index = load_index(*arguments)
        for path in (root / "sub").iterdir():
            path.unlink()
        return index

    monkeypatch.setattr(embed, "load_index", lost_meanwhile)
    with pytest.raises(UserError, match=r"of 24 videos do not decode .* more than data.max_bad_fraction=0.1 allows"):
        make(root)
    assert (tmp_path / "out" / "_bad.jsonl").stat().st_size


def test_the_videos_that_failed_before_count_when_it_continues(make: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "noisy"
    root.mkdir()
    for number in range(6):
        frames = np.random.default_rng(number).integers(0, 255, (30, 64, 64), dtype=np.uint8)
        encode_h264(root / f"{number}.mp4", frames)
        if number % 2:
            damage_frames(root / f"{number}.mp4")
    for _ in range(2):
        with pytest.raises(UserError, match=r"of 6 videos do not decode .* more than data.max_bad_fraction=0.2 allows"):
            make(root, overrides=("data.max_bad_fraction=0.2",), videos_per_part=1)
    embedded = make(root, overrides=("data.max_bad_fraction=0.6",), videos_per_part=1)
    assert embedded.num_bad == 3


def damage_frames(path: Path) -> None:
    """Overwrite half of the coded frames of an .mp4 file, from a third on, by zeros."""
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    size = int.from_bytes(content[start - 8 : start - 4], "big")
    content[start + size // 3 : start + size // 3 + size // 2] = bytes(size // 2)
    path.write_bytes(content)


# --------------------------------------------------------------------------------------------------------- mistakes


def test_another_run_settings_or_videos_are_refused(make: Callable[..., Any], videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    make(root)
    with pytest.raises(UserError, match=r"was begun with step 6 of the run .* \(weights \w+\), not with step 6 of"):
        make(root, weights="0" * 16)
    with pytest.raises(UserError, match=r"was begun with data.clip_step=3, not 2: take the same value"):
        make(root, overrides=("data.clip_step=2",))
    with pytest.raises(UserError, match=r"was begun with videos_per_part=7, not 8"):
        make(root, videos_per_part=8)
    (root / "000020.mp4").unlink()
    with pytest.raises(UserError, match=r"have changed since .* was begun: '000020.mp4' is gone"):
        make(root)


def test_a_run_that_trains_on_is_refused(run: TrainedRun) -> None:
    with pytest.raises(UserError, match=r"the latest checkpoint of .* has changed since this command was started"):
        parts.load_same(RunPlace(run.folder, "latest", "cpu", False, "0" * 16))


def test_damaged_and_foreign_folders_are_refused(make: Callable[..., Any], videos: Path, tmp_path: Path) -> None:
    make(videos)
    path = tmp_path / "out" / "part-00002-of-00004.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"part-00002-of-00004.parquet is damaged .*: delete it, and start again"):
        make(videos)
    (tmp_path / "out" / "_manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"_manifest.json is damaged"):
        make(videos)
    (tmp_path / "out" / "_manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds part-.*, but no embeddings: name another folder"):
        make(videos)


def test_parts_that_another_process_writes_are_refused(
    make: Callable[..., Any], videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        with pytest.raises(UserError, match=r"another process writes parts from 0 to 3 of"):
            make(videos)
        os._exit(0)

    def meanwhile(*arguments: Any) -> Any:
        assert in_child(refused) == 0
        return parts.embed_part(*arguments)

    monkeypatch.setattr(engines, "embed_part", meanwhile)
    make(videos)


def test_the_command_and_its_mistakes(
    videos: Path,
    trained_run: Path,
    tmp_path: Path,
    expected: Rows,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "out")
    arguments = ["embed", str(videos), out, "--run", str(trained_run), "--videos-per-part", "7", "--num-processes", "1"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}: 72 embeddings [16] in 4 of 4 parts\n"
    assert rows_of(tmp_path / "out") == expected

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert refused("--host-index", "2", "--num-hosts", "2") == (
        "error: --host-index 2 must be from 0 to 1, for --num-hosts 2"
    )
    assert "--host-index and --num-hosts belong together" in refused("--host-index", "0")
    assert "data.KEY=VALUE can differ from the run's config" in refused("train.lr=1")
    assert "data.KEY=VALUE can differ from the run's config" in refused("data.root=elsewhere")
    assert "--videos-per-part must be at least 1" in refused("--videos-per-part", "0")
    assert "was begun with data.size_px=64, not 32" in refused("data.size_px=32")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command.share_of_host(None, None) == (1, 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    for path in tmp_path.glob("out/*.parquet"):
        path.unlink()
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "engine=ray needs ray, which is not installed: pip install 'worldmodel[ray]'" in refused("--engine", "ray")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'worldmodel[embed]'" in refused()
