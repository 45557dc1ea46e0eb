"""Arrays for the report survive their file, also if parts are missing."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import UserError
from tests.worldmodel.report.samples import make_episodes, make_illustrations
from worldmodel.evaluation.illustrations import NO_ILLUSTRATIONS, Illustrations, load_records, save_records
from worldmodel.planning.planned_episodes import PlannedEpisode


def assert_same(value: Any, other: Any) -> None:
    assert type(value) is type(other)
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            assert_same(getattr(value, field.name), getattr(other, field.name))
    elif isinstance(value, np.ndarray):
        assert value.dtype == other.dtype
        np.testing.assert_array_equal(value, other)
    else:
        assert value == other


@pytest.mark.parametrize(
    "illustrations",
    [
        make_illustrations(queries=1, num_steps=2, size_px=8),
        make_illustrations(queries=0, labels=False),
        dataclasses.replace(make_illustrations(queries=1, num_steps=2, size_px=8), latents=None, timeline=None),
        NO_ILLUSTRATIONS,
    ],
)
def test_illustrations_come_back_as_they_were(tmp_path: Path, illustrations: Illustrations) -> None:
    save_records(tmp_path / "drawn", [illustrations])
    (loaded,) = load_records(tmp_path / "drawn", Illustrations)
    assert_same(loaded, illustrations)


def test_so_do_several_episodes_in_their_order(tmp_path: Path) -> None:
    episodes = [*make_episodes(11, size_px=16, num_steps=2), *make_episodes(1, size_px=16, positions=False)]
    save_records(tmp_path / "drawn", episodes)
    loaded = load_records(tmp_path / "drawn", PlannedEpisode)
    assert len(loaded) == 12
    for episode, other in zip(episodes, loaded, strict=True):
        assert_same(episode, other)


def test_none_are_none_and_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "drawn"
    assert load_records(path, PlannedEpisode) == []
    save_records(path, [])
    assert load_records(path, PlannedEpisode) == []
    save_records(path, make_episodes(1, size_px=16))
    with pytest.raises(UserError, match="drawn is damaged"):
        load_records(path, Illustrations)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="drawn is damaged"):
        load_records(path, PlannedEpisode)
