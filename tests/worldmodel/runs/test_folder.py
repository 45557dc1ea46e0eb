"""Names in a run folder: every path belongs to the run, and a folder that cannot be written is one line."""

from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from worldmodel.runs.folder import RunFolder


def test_every_path_at_the_top_level_is_a_file_or_a_folder_of_a_run() -> None:
    folder = RunFolder("runs/demo")
    paths = {path for path in vars(folder).values() if path.parent == folder.path}
    assert paths == folder.files | folder.folders | {folder.lock}
    assert not folder.files & folder.folders and folder.checkpoint_index.parent == folder.checkpoints
    assert len({path.name for path in paths}) == len(paths)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    RunFolder(tmp_path).check_writable()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"cannot write into .*gone"):
        RunFolder(tmp_path / "gone").check_writable()
