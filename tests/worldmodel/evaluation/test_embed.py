"""Tests of embedding clips of a split."""

from collections.abc import Iterator

import pytest
import torch

from data_pipelines.batches import Batch
from worldmodel.evaluation.embed import counted


def batches(*sizes: int) -> Iterator[Batch]:
    for size in sizes:
        ids = torch.arange(size)
        yield {"video": torch.zeros(size, 1, 1, 1, 1), "clip_id": ids, "row": ids, "labels": {}}


@pytest.mark.parametrize(("sizes", "shown"), [((4, 4, 2), "10/10 ["), ((4, 1), "5/5 ["), ((), "0clip [")])
def test_the_bar_counts_clips_and_ends_full_also_with_fewer_clips(
    sizes: tuple[int, ...], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [len(batch["clip_id"]) for batch in counted(batches(*sizes), 10, "encoding")] == list(sizes)
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert last.startswith("encoding: ") and shown in last


def test_a_bar_that_is_not_wanted_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(counted(batches(4, 1), 10, "encoding", progress=False))) == 2
    assert capsys.readouterr().err == ""
