"""Files are replaced as a whole, and never through a link."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipelines.files import MAX_TEXT_BYTES, check_writable, read_text, remove, replacing, write_text


@pytest.mark.parametrize("name", [".metrics.json.partial", "metrics.json"])
def test_links_are_replaced_and_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "bashrc"
    victim.write_text("mine")
    (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "metrics.json", "{}")
    assert victim.read_text() == "mine"
    assert (tmp_path / "metrics.json").read_text() == "{}" and not (tmp_path / "metrics.json").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bashrc", "metrics.json"]


@pytest.mark.parametrize("name", [".metrics.json.partial", "metrics.json"])
def test_a_fifo_does_not_hang_the_writer(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    write_text(tmp_path / "metrics.json", "{}")
    assert read_text(tmp_path / "metrics.json") == "{}"


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "metrics.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_reading_is_bounded_and_takes_regular_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_text(path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        read_text(tmp_path / "large", 100)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(tmp_path / "marked") == "{}"


def test_removing_a_link_keeps_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "absent")
    assert (tmp_path / "folder" / "file").exists() and not (tmp_path / "link").is_symlink()
    remove(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_written_is_found_out(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError):
        check_writable(Path("/proc"))


def test_processes_that_write_one_file_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    with replacing(path, is_shared=True) as first, replacing(path, is_shared=True) as second:
        first.write(b"one")
        second.write(b"two")
    assert path.read_bytes() == b"one"  # the first block ends last
    assert [file.name for file in tmp_path.iterdir()] == ["index.jsonl"]


@pytest.mark.parametrize("is_shared", [False, True])
def test_an_exception_keeps_the_old_content(tmp_path: Path, is_shared: bool) -> None:
    path = tmp_path / "index.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path, is_shared=is_shared) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["index.jsonl"]


def test_several_processes_check_a_folder_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_writable, [tmp_path] * 200))  # raises the first exception
    assert not list(tmp_path.iterdir())
