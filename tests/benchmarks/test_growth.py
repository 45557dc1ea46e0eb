"""The benchmark of growth: its files, its table and its picture; no test looks at a clock."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import growth
from data_pipelines.facts import Video
from data_pipelines.formats.registry import load_videos


def test_linked_files_need_no_indexing_and_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "DISTINCT_VIDEOS", 3)
    root = growth.linked_folder(100, tmp_path)
    assert growth.linked_folder(100, tmp_path) == root

    def index_files(_root: Path, paths: Sequence[str], **_: object) -> Iterator[Video]:
        assert not paths, "an entry of the written index does not hold"
        return iter(())

    monkeypatch.setattr("data_pipelines.indexing.folder.index_files", index_files)
    index = load_videos(root)
    assert len(index.videos) == 100 and not index.bad
    assert growth.first_batch_s(100, tmp_path) > 0
    monkeypatch.setattr(growth, "MEMORY_BATCHES", 3)  # more than an epoch has
    taken: list[object] = []
    monkeypatch.setattr(growth, "islice", lambda batches, count: map(taken.append, islice(batches, count)))
    assert growth.stream_mb(100, tmp_path) > 1 and len(taken) == 3


def test_the_table_and_the_picture_show_each_quantity(tmp_path: Path) -> None:
    result: dict[str, dict[str, list[float]]] = {
        name: {"sizes": list(part.sizes), "values": [1.5] * len(part.sizes)} for name, part in growth.QUANTITIES.items()
    }
    lines = growth.table(result).splitlines()
    assert [line.split(" by ")[0].strip() for line in lines] == [part.title for part in growth.QUANTITIES.values()]
    assert "1,000,000: 1.5 MiB" in lines[1]
    growth.draw(result, tmp_path / "growth.webp")
    with Image.open(tmp_path / "growth.webp") as picture:
        assert picture.width > picture.height > 300


def test_quantities_without_a_size_to_measure_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "value_of", lambda name, size, work: 1.5)
    given = ["growth.py", "--out", str(tmp_path / "out"), "--most"]
    monkeypatch.setattr(sys, "argv", [*given, "0"])
    with pytest.raises(SystemExit) as end:
        growth.main()
    assert end.value.code == 2 and not (tmp_path / "out").exists()
    assert "error: --most 0 leaves nothing to measure: the smallest size is 1\n" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*given, "2"])
    assert growth.main() == 0
    written = json.loads((tmp_path / "out" / "growth.json").read_text())
    assert set(written) == {"machine", "step"} and written["step"]["sizes"] == [1, 2]
