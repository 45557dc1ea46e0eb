"""Videos packed into tars: what others can read, what we read from others, and what is refused."""

import errno
import io
import json
import math
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines import files
from data_pipelines.containers import video_url
from data_pipelines.decoders import open_video
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.index import VideoIndex
from data_pipelines.shards import packing
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.shards.packing import pack_videos
from data_pipelines.shards.scan import index_shards
from data_pipelines.split_folders import load_split
from data_pipelines.splits import SPLITS
from tests.conftest import run_here
from tests.data_pipelines.conftest import DECODERS
from worldmodel.commands.main import main

NUM_VIDEOS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> Path:
    """Videos with labels, in a folder with odd characters, two of them with names that are sanitised to the same."""
    root = tmp_path_factory.mktemp("source") / "o,dd ,,: földer#?%"
    names = [f"a/{video:02d}.mp4" for video in range(NUM_VIDEOS - 3)] + ["b c.mp4", "b_c.mp4", "v.1.MKV"]
    lines = []
    for video, name in enumerate(names):
        write_video(root / name, video=video)
        lines.append({"file_name": name, "number": video, "pair": [video / 3, 1.0]})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    out = tmp_path_factory.mktemp("packed") / "o,dd ,,: földer#?%"
    return pack_videos(source, out, shard_mb=0.008, progress=False)


def test_splits_that_share_a_folder_share_its_shards(
    tmp_path: Path, write_video: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that no video is in two splits."""
    for name in [*(f"train/{number}" for number in range(12)), *(f"test/{number}" for number in range(3))]:
        write_video(tmp_path / "in" / f"{name}.mp4", num_frames=12, video=int(name.rpartition("/")[2]))
    assert main(["shards", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]
    assert "15 videos" not in capsys.readouterr().out
    for split in SPLITS:
        before, after = (load_split(str(tmp_path / root), split) for root in ("in", "out"))
        assert len(before.videos) == len(after.videos) > 0
    held_out = {video.path for video in load_split(str(tmp_path / "out"), "selection").videos}
    assert not held_out & {video.path for video in load_split(str(tmp_path / "out"), "train").videos}
    for arguments in (["--seed", "1"], ["--shard-mb", "9"]):
        with pytest.raises(SystemExit):
            main(["shards", "--index", str(tmp_path / "out" / "train"), *arguments])
        assert "leave out --shard-mb and --seed" in capsys.readouterr().err


def _numbers(index: VideoIndex, row: int, read_numbers: Any, decoder: str = "pyav") -> set[tuple[int, int]]:
    video = index.videos[row]
    reader = open_video(video_url(index.root, video), video, channels=1, size_px=None, decoder=decoder)
    shown = {read_numbers(reader.read(frame)) for frame in range(video.num_frames)}
    reader.close()
    return shown


def test_packed_videos_keep_facts_labels_and_pixels(source: Path, packed: VideoIndex, read_numbers: Any) -> None:
    plain = load_videos(source, progress=False)
    assert packed.videos != plain.videos and packed.remote is None
    assert len({video.shard for video in packed.videos}) >= 3
    rows = {video.path: row for row, video in enumerate(plain.videos)}
    order = [rows[video.path] for video in packed.videos]
    assert sorted(order) == list(range(NUM_VIDEOS)) != order
    for name, values in plain.labels.items():
        assert torch.equal(packed.labels[name], values[order]) and packed.labels[name].dtype == values.dtype
    for row, number in enumerate(packed.labels["number"].tolist()):
        assert _numbers(packed, row, read_numbers) == {(number, frame) for frame in range(9)}
    assert packed.content_hash != plain.content_hash
    moved = [replace(video, shard="one.tar") for video in packed.videos]
    assert packed.content_hash != VideoIndex(packed.root, moved).content_hash


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_reads_within_a_shard(packed: VideoIndex, read_numbers: Any, decoder: str) -> None:
    number = int(packed.labels["number"][3])
    assert _numbers(packed, 3, read_numbers, decoder) == {(number, frame) for frame in range(9)}


def test_a_video_within_a_shard_is_opened_the_fast_way(packed: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    opened = []
    av_open = av.open

    def recorded(*arguments: Any, **more: Any) -> Any:
        opened.append(more.get("format"))
        return av_open(*arguments, **more)

    monkeypatch.setattr(av, "open", recorded)
    video = next(video for video in packed.videos if video.path.endswith(".mp4"))
    open_video(video_url(packed.root, video), video, channels=1, size_px=None, decoder="pyav").close()
    assert opened == ["mov"]


def test_shards_have_the_layout_of_webdataset(source: Path, packed: VideoIndex) -> None:
    plain = {video.path: (source / video.path).read_bytes() for video in packed.videos}
    members: dict[str, bytes] = {}
    for path in sorted(packed.root.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and member.name not in members
                members[member.name] = file.read()
    assert len(members) == 2 * NUM_VIDEOS
    names = list(members)
    for video_name, labels_name in zip(names[::2], names[1::2], strict=True):  # a sample's files are neighbours
        key, _, suffix = video_name.partition(".")
        assert labels_name == f"{key}.json" and suffix in ("mp4", "mkv")
        assert key.replace("_", "").replace("-", "").isalnum() and key.isascii()
        labels = json.loads(members[labels_name])
        assert members[video_name] == plain.pop(labels["file_name"])
        assert labels["pair"] == pytest.approx([labels["number"] / 3, 1.0])
    assert not plain


def test_equal_sources_and_seeds_make_equal_shards(source: Path, packed: VideoIndex, tmp_path: Path) -> None:
    again = pack_videos(source, tmp_path / "again", shard_mb=0.008, progress=False)
    other = pack_videos(source, tmp_path / "other", shard_mb=0.008, seed=1, progress=False)
    assert again.videos == packed.videos
    names = sorted(path.name for path in packed.root.iterdir())
    assert names == sorted(path.name for path in again.root.iterdir()) and names[-1] == SHARDS_NAME
    assert all((packed.root / name).read_bytes() == (again.root / name).read_bytes() for name in names)
    assert [video.path for video in other.videos] != [video.path for video in packed.videos]


def test_a_pack_that_is_interrupted_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = packing._add_sample

    def stop_at_the_third(tar: Any, shard: str, index: VideoIndex, row: int) -> Any:
        if len(tar.getnames()) == 4:
            raise KeyboardInterrupt
        return add(tar, shard, index, row)

    monkeypatch.setattr(packing, "_add_sample", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack_videos(source, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_pack_left_is_removed_and_nothing_else(source: Path, tmp_path: Path) -> None:
    aside = tmp_path / ".out.packing"
    aside.mkdir()
    (aside / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"\.out\.packing' holds files other than shards: move it away"):
        pack_videos(source, tmp_path / "out", progress=False)
    assert (aside / "notes.txt").read_text(encoding="utf-8") == "mine"
    aside.rename(tmp_path / "elsewhere")
    aside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"\.out\.packing' cannot be made \(File exists\)"):
        pack_videos(source, tmp_path / "out", progress=False)
    aside.unlink()
    aside.mkdir()
    (aside / "shard-000000.tar").write_bytes(b"half")
    (aside / f".{SHARDS_NAME}.0123.partial").write_bytes(b"half")
    assert len(pack_videos(source, tmp_path / "out", progress=False).videos) == NUM_VIDEOS
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def _add(tar: tarfile.TarFile, name: str, content: bytes, **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in changes.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def test_shards_of_others_are_indexed_and_what_is_unsafe_in_them_is_refused(
    source: Path, tmp_path: Path, read_numbers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    videos = [(source / f"a/{video:02d}.mp4").read_bytes() for video in range(8)]
    for shard in range(2):  # the same keys in both
        with tarfile.open(tmp_path / f"part{shard}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for key in range(4):
                _add(tar, f"./dir/{key}ü.json", json.dumps({"number": 4 * shard + key, "text": "x"}).encode())
                _add(tar, f"./dir/{key}ü.left.mp4", videos[4 * shard + key])
                _add(tar, f"./dir/{key}ü.txt", b"no video")
    with tarfile.open(tmp_path / "part1.tar", "a") as tar:
        _add(tar, "../out.mp4", videos[0])
        _add(tar, "/etc/abs.mp4", videos[0])
        _add(tar, "a/../../b.mp4", videos[0])
        _add(tar, "link.mp4", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        _add(tar, "noise.mp4", b"noise" * 100)
    index = load_videos(tmp_path, max_bad_fraction=0.5, progress=False)
    assert [video.path for video in index.videos] == [
        f"part{s}.tar/./dir/{k}ü.left.mp4" for s in (0, 1) for k in range(4)
    ]
    assert index.labels["number"].tolist() == list(range(8)) and set(index.labels) == {"number"}
    for row in range(8):
        assert _numbers(index, row, read_numbers) == {(row, frame) for frame in range(9)}
    reasons = {entry.path.partition("/")[2]: entry.reason for entry in index.bad}
    for name in ("../out.mp4", "/etc/abs.mp4", "a/../../b.mp4"):
        assert reasons.pop(name) == "its name leads out of the archive"
    assert "link" in reasons.pop("link.mp4") and "nvalid data" in reasons.pop("noise.mp4")
    assert not reasons and "5 of 13 video files are bad" in caplog.text
    assert (tmp_path / SHARDS_NAME).is_file()  # ready to be put behind a URL
    assert load_videos(tmp_path, max_bad_fraction=0.5, progress=False).videos == index.videos


@pytest.mark.parametrize("damage", ["header", "cut", "no tar"])
def test_a_damaged_shard_is_named_and_what_comes_before_the_damage_kept(
    source: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    video = (source / "a/00.mp4").read_bytes()
    for name in ("a.tar", "b.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for key in range(6):
                _add(tar, f"{key}.mp4", video)
    with tarfile.open(tmp_path / "b.tar") as tar:
        fourth = tar.getmembers()[4]
    content = bytearray((tmp_path / "b.tar").read_bytes())
    if damage == "header":
        content[fourth.offset + 20] ^= 255
    elif damage == "cut":
        del content[fourth.offset_data + fourth.size // 2 :]
    else:
        content[:] = b"<html>" * 100
    (tmp_path / "b.tar").write_bytes(content)
    index = load_videos(tmp_path, max_bad_fraction=0.5, progress=False)
    assert len(index.videos) == (6 if damage == "no tar" else 10)
    assert "'b.tar' (" in caplog.text and any(entry.path == "b.tar" for entry in index.bad)
    with pytest.raises(UserError, match=r"video files are bad, more than max_bad_fraction=0.05.*b\.tar"):
        load_videos(tmp_path, max_bad_fraction=0.05, progress=False)


def _change_line(path: Path, number: int, **changes: Any) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (0, {"version": 2}, r"line 1 \(it should be"),
        (1, {"name": "../shard.tar"}, r"line 2 .*'../shard.tar'"),
        (1, {"name": "/etc/shard.tar"}, "line 2 "),
        (-1, {"shard": "other.tar"}, "damaged in line"),
        (-1, {"offset_bytes": 10**9}, "outside its shard"),
        (-1, {"offset_bytes": -1}, "outside its shard"),
        (-1, {"size_bytes": 0}, "outside its shard"),
        (-1, {"surprise": 1}, "surprise"),
    ],
)
def test_a_damaged_index_is_named_by_its_line(
    packed: VideoIndex, tmp_path: Path, number: int, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(packed.root, tmp_path / "copy")
    _change_line(tmp_path / "copy" / SHARDS_NAME, number, **changes)
    with pytest.raises(UserError, match=message) as raised:
        load_videos(tmp_path / "copy", progress=False)
    assert "\n" not in str(raised.value) and "index the shards again" in str(raised.value)


def test_shards_that_do_not_fit_their_index_are_named(packed: VideoIndex, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(packed.root, root)
    first = root / "shard-000000.tar"
    size_bytes = first.stat().st_size
    with open(first, "ab") as tar:
        tar.write(b"x")
    with pytest.raises(
        UserError, match=rf"shard-000000.tar' has {size_bytes + 1:,} bytes, but .* {size_bytes:,} bytes"
    ):
        load_videos(root)
    first.unlink()
    with pytest.raises(UserError, match=r"shard-000000.tar' has no file, but"):
        load_videos(root)


def test_mistakes_are_named(source: Path, packed: VideoIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an empty folder"):
        pack_videos(source, packed.root, progress=False)
    with pytest.raises(UserError, match="shard_mb=0 must be more than 0"):
        pack_videos(source, tmp_path / "out", shard_mb=0, progress=False)
    with pytest.raises(UserError, match="shard_mb=inf must be more than 0, and finite"):
        pack_videos(source, tmp_path / "out", shard_mb=math.inf, progress=False)
    with pytest.raises(UserError, match="seed=-1 must be at least 0"):
        pack_videos(source, tmp_path / "out", seed=-1, progress=False)
    with pytest.raises(UserError, match=r"holds no shards \(\*.tar\)"):
        index_shards(tmp_path)
    (tmp_path / "a b.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"'.*a b.tar': rename it"):
        index_shards(tmp_path)
    with pytest.raises(UserError, match=r"camera='top': .* is a folder of shards, which has no cameras"):
        load_videos(packed.root, camera="top")


def test_labels_too_large_for_the_index_are_named_before_there_are_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third takes more characters as a double, 0.3333333432674408, than in most metadata."""
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 150)
    monkeypatch.setattr(packing, "MAX_LABELS_BYTES", 40, raising=False)
    with pytest.raises(UserError, match=r"the labels of '.*' take \d\d bytes in an index of shards: at most 40"):
        pack_videos(source, tmp_path / "out", progress=False)
    assert not any(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_remains_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert len(pack_videos(source, tmp_path / "out", progress=False).videos) == NUM_VIDEOS
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / SHARDS_NAME).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


@pytest.mark.parametrize("kind", ["current", "current by its path", "mount point"])
def test_a_folder_that_cannot_be_replaced_is_named_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path.resolve())
    else:
        monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packing, "_fill_shards", pytest.fail)
    with pytest.raises(UserError, match="must not be the current one or a mount point: name another"):
        pack_videos(source, Path(".") if kind == "current" else tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["tar", "index"])
def test_shards_that_cannot_be_written_are_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "tar":
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    else:
        monkeypatch.setattr(packing, "write_shards", full)
    with pytest.raises(UserError, match=r"^cannot write shards to '.*out': No space left on device"):
        pack_videos(source, tmp_path / "out", progress=False)
    assert not any(tmp_path.iterdir())


def test_the_script_packs_splits_and_indexes(source: Path, tmp_path: Path) -> None:
    for split in ("train", "selection", "test"):
        shutil.copytree(source, tmp_path / "in" / split)
    done = run_here("make_shards.py", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-mb", "0.01")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 and "12 videos in" in done.stdout
    written = (tmp_path / "out" / "test" / SHARDS_NAME).read_bytes()
    assert len(load_videos(tmp_path / "out" / "test", progress=False).videos) == NUM_VIDEOS
    (tmp_path / "out" / "test" / SHARDS_NAME).unlink()
    done = run_here("make_shards.py", "--index", str(tmp_path / "out" / "test"))
    assert done.returncode == 0 and done.stdout.startswith("12 videos in"), done.stderr
    assert written != (tmp_path / "out" / "test" / SHARDS_NAME).read_bytes()  # keys instead of the files' names
