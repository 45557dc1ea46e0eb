"""Arrays for the report survive their file, also if parts are missing; those of a damaged file are refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import UserError
from tests.worldmodel.report.samples import make_decoded, make_episodes, make_illustrations
from worldmodel.evaluation.illustrations import NO_ILLUSTRATIONS, Illustrations
from worldmodel.evaluation.records import load_records, save_records
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


def test_a_field_that_is_newer_than_a_file_is_none(tmp_path: Path) -> None:
    (episode,) = make_episodes(1, size_px=16)
    fields = {key: value for key, value in vars(episode).items() if key != "plans"}
    save_records(tmp_path / "drawn", [dataclasses.make_dataclass("Older", fields)(**fields)])
    (loaded,) = load_records(tmp_path / "drawn", PlannedEpisode)
    assert loaded.plans is None
    assert_same(loaded, episode)


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


# ------------------------------------------------------------------------------------------------------- damaged files


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every field of a record that is no record, with the names that lead to it."""
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if dataclasses.is_dataclass(part):
            yield from leaves(part, (*path, field.name))
        else:
            yield (*path, field.name), part


def put(record: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return the record with one field replaced, unchecked as in a file."""
    part = record
    for name in path[:-1]:
        part = getattr(part, name)
    object.__setattr__(part, path[-1], value)
    return record


def damages(value: Any) -> list[Any]:
    if not isinstance(value, np.ndarray):
        others: tuple[Any, ...] = ("3", 1.5, [1], {})
        return [wrong for wrong in others if type(wrong) is not type(value) and type(value) is not tuple]
    other_kind = value.astype(np.float32 if value.dtype.kind != "f" else np.int64)
    rows = [value[1:], np.concatenate([value, value[:1]])] if len(value) and value.shape != (2,) else []
    return [value[..., None], value[0] if value.ndim > 1 and len(value) else np.array(value.sum()), other_kind, *rows]


def make_illustrations_with_all() -> Illustrations:
    """Make illustrations in which no single number is left out."""
    illustrations = make_illustrations(queries=3, num_steps=2, size_px=8)
    assert illustrations.timeline is not None
    return dataclasses.replace(illustrations, timeline=dataclasses.replace(illustrations.timeline, threshold=2.5))


RECORDS = [
    make_illustrations_with_all,
    lambda: make_episodes(1, size_px=16)[0],
    lambda: make_decoded(clips=2),
]


@pytest.mark.parametrize(
    ("make", "path", "number"),
    [
        pytest.param(make, path, number, id=f"{'.'.join(path)}-{number}")
        for make in RECORDS
        for path, value in leaves(make())
        for number in range(len(damages(value)))
    ],
)
def test_a_value_that_is_not_what_its_field_says_is_one_line(
    tmp_path: Path, make: Any, path: tuple[str, ...], number: int
) -> None:
    record, kind = make(), type(make())
    wrong = damages(dict(leaves(record))[path])[number]
    save_records(tmp_path / "drawn", [put(record, path, wrong)])
    with pytest.raises(UserError, match="drawn is damaged"):
        load_records(tmp_path / "drawn", kind)
