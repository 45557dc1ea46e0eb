"""A run on two cameras of a LeRobot data set: training, evaluation, decoder and pictures; one line for a mistake."""

import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import worldmodel
from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY
from tests.data_pipelines.conftest import _read_numbers, _write_video
from tests.data_pipelines.formats.lerobot_sets import FRONT, WRIST, files_of, write_camera, write_cameras
from tests.worldmodel.training.test_loop import assert_same_weights
from worldmodel.commands.main import main
from worldmodel.config import Config, load_config
from worldmodel.evaluation.decoded import DecodedFutures
from worldmodel.evaluation.illustrations import Illustrations, side_by_side
from worldmodel.evaluation.records import load_records
from worldmodel.planning.imagination import LatentPolicy
from worldmodel.report.decoded_pictures import moving_images, still_image
from worldmodel.runs.checkpoint import VideosChangedError
from worldmodel.runs.folder import RunFolder
from worldmodel.sources import make_source
from worldmodel.training.loop import train
from worldmodel.training.session import Interrupted

pytest.importorskip("pyarrow")

SIZE_PX = 48
OVERRIDES = [
    *TINY,
    f"data.camera=[{WRIST}, {FRONT}]",
    "data.channels=3",
    f"data.size_px={SIZE_PX}",
    "data.clip_step=2",
    "train.steps=10",
    "train.refine_steps=0",
    "train.checkpoint_every=5",
    "evaluation.horizon=2",
]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cameras(tmp_path_factory.mktemp("data") / "v3.0", _write_video, "v3.0", sizes=((48, 64), (48, 96)))


@pytest.fixture(scope="module")
def run(data_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluated run of ten steps, with a decoder."""
    folder = tmp_path_factory.mktemp("run") / "run"
    overrides = [*OVERRIDES, f"data.root={data_set}", f"run_dir={folder}"]
    assert main(["train", "--config", str(REPO / "configs" / "objectives.yaml"), *overrides]) == 0
    assert main(["evaluate", "--run", str(folder)]) == 0
    assert main(["decode", "--run", str(folder), "--steps", "3", "--clips", "20"]) == 0
    return folder


def config_of(data_set: Path, run: Path, *overrides: str) -> Config:
    return load_config(
        REPO / "configs" / "objectives.yaml", [*OVERRIDES, f"data.root={data_set}", f"run_dir={run}", *overrides]
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line of a command that is refused with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    return line


def test_ten_steps_of_training_see_the_channels_of_both_cameras(run: Path) -> None:
    trained = worldmodel.load(run)
    assert trained.state["step"] == 10 and trained.frame_shape == (6, SIZE_PX, SIZE_PX)
    assert trained.config.data.camera == (WRIST, FRONT)  # type: ignore[union-attr]
    first = next(parameter for parameter in trained.model.embedder.parameters() if parameter.ndim == 5)
    assert first.shape[1] == 6
    clip = torch.rand(2, 3, 6, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    swapped = clip[:, :, [3, 4, 5, 0, 1, 2]]
    assert not torch.allclose(trained.encode(clip), trained.encode(swapped))
    assert trained.rollout(clip, 2, 3).shape == (2, 3, 2, 16)
    with pytest.raises(UserError, match=r"a clip of shape \[2, 3, 3, 48, 48\] does not fit"):
        trained.encode(clip[:, :, :3])
    assert trained.decode(clip, trained.rollout(clip, 2, 3)).shape == (2, 3, 2, 3, 6, SIZE_PX, SIZE_PX)
    assert len(trained.surprise(torch.cat([clip[0], clip[1], clip[0]])).surprise) > 0
    decoder: Any = SimpleNamespace(action_dim=2)
    with pytest.raises(UserError, match=r"sees 2 cameras \(data.camera\): planning needs 1"):
        LatentPolicy(trained, replace(trained.config.planning, num_samples=0), 0, decoder)


@pytest.mark.slow
def test_a_run_that_continues_has_the_weights_of_one_that_was_not_interrupted(
    run: Path, data_set: Path, tmp_path: Path
) -> None:
    steps = count(1)
    with pytest.raises(Interrupted):
        train(config_of(data_set, tmp_path / "run"), stop=lambda: signal.SIGTERM if next(steps) == 4 else 0)
    train(config_of(data_set, tmp_path / "run"), resume=True)
    assert_same_weights(run, tmp_path / "run")


def test_another_video_of_the_second_camera_is_noticed_when_a_run_continues(run: Path, tmp_path: Path) -> None:
    own = write_cameras(tmp_path / "v3.0", _write_video, "v3.0", sizes=((48, 64), (48, 96)))
    with pytest.raises(Interrupted):
        train(config_of(own, tmp_path / "run"), stop=lambda: signal.SIGTERM)
    path, rows = list(files_of("v3.0", FRONT).items())[-1]
    write_camera(own / path, _write_video, FRONT, [0] * len(rows))
    with pytest.raises(VideosChangedError, match=f"'{path}' has other content"):
        train(config_of(own, tmp_path / "run"), resume=True)


# ----------------------------------------------------------------------------------------------------------- pictures


def test_pictures_of_an_evaluation_show_the_cameras_side_by_side(run: Path) -> None:
    (shown,) = load_records(RunFolder(run).illustrations, Illustrations)
    assert shown.frames.shape[2:] == (3, SIZE_PX, 2 * SIZE_PX) == shown.neighbours.shape[4:]
    batch = next(iter(make_source(worldmodel.load(run).config).evaluation_batches("test", 24, 2)))
    clips = batch["video"][: len(shown.frames), : shown.frames.shape[1]].numpy()
    assert np.array_equal(shown.frames[..., :SIZE_PX], clips[:, :, :3])
    assert np.array_equal(shown.frames[..., SIZE_PX:], clips[:, :, 3:])
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("channels", "cameras", "shape"), [(3, 1, (3, 4)), (3, 3, (1, 12)), (6, 2, (3, 8)), (1, 1, (1, 4))]
)
def test_cameras_are_put_beside_each_other(channels: int, cameras: int, shape: tuple[int, int]) -> None:
    frames = torch.arange(2 * channels * 16, dtype=torch.uint8).view(2, channels, 4, 4)
    pictures = side_by_side(frames, cameras)
    assert pictures.shape == (2, shape[0], 4, shape[1])
    for camera, part in enumerate(frames.chunk(cameras, dim=1)):
        assert np.array_equal(pictures[..., 4 * camera : 4 * camera + 4], part)


def test_frames_that_are_neither_gray_nor_rgb_are_shown_as_gray_pictures() -> None:
    assert side_by_side(torch.zeros(2, 5, 4, 4), 1).shape == (2, 1, 4, 20)
    assert side_by_side(torch.zeros(2, 100, 4, 4), 1).shape == (2, 1, 4, 32)


def test_decoded_futures_show_the_cameras_side_by_side(run: Path) -> None:
    (futures,) = load_records(RunFolder(run).decoded, DecodedFutures)
    assert futures.samples.shape == (3, 6, 6, 3, SIZE_PX, 2 * SIZE_PX)
    left, right = futures.context[0, 0, ..., :SIZE_PX], futures.context[0, 0, ..., SIZE_PX:]
    assert not np.array_equal(left, right)
    images, _ = moving_images(futures, 0)
    assert all(image.size == images[0].size for image in images) and images[0].width > 1.9 * 3 * 112
    still = still_image(futures, 0)
    with Image.open(RunFolder(run).futures / "clip_1.png") as written:
        assert written.size == still.size
    assert "Futures as pictures" in (run / "report.html").read_text()
    with pytest.raises(ValueError, match=r"frames of shape \[3, 48, 50\], not squares side by side"):
        replace(futures, context=futures.context[..., :50])


def test_a_contact_sheet_shows_the_cameras_side_by_side(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sheet(*cameras: str) -> np.ndarray:
        path = tmp_path / "sheet.png"
        assert main(["inspect", str(data_set), "--sheet", str(path), "--camera", *cameras]) == 0
        return np.asarray(Image.open(path))

    both, front, wrist = sheet(FRONT, WRIST), sheet(FRONT), sheet(WRIST)
    assert "cameras   2, side by side" in capsys.readouterr().out
    assert both.shape[1] == 8 * (2 * 96 + 4)
    for column in range(8):
        for row in range(5):
            rows = slice(row * 114 + 14, row * 114 + 110)
            pair = both[rows, column * 196 : column * 196 + 192]
            one = slice(column * 100, column * 100 + 96)
            assert np.array_equal(pair, np.concatenate([front[rows, one], wrist[rows, one]], axis=1))


# --------------------------------------------------------------------------------------------------------- bad input


def test_mistakes_are_one_line_and_exit_code_2(
    run: Path, data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = data_set / next(iter(files_of("v3.0", FRONT)))
    one = f"video '{video}' shows one camera, and the run sees 2 (data.camera)"
    assert one in refused(capsys, "surprise", "--run", run, "--video", video, "--out", tmp_path / "s")
    assert one in refused(capsys, "rollout", "--run", run, "--video", video, "--out", tmp_path / "f.npz")
    begin = ["train", "--config", REPO / "configs" / "objectives.yaml", *OVERRIDES, f"run_dir={tmp_path / 'run'}"]
    for overrides, words in {
        (f"data.root={data_set}", "data.camera=[top]"): f"camera='top' is unknown: LeRobot data set '{data_set}' has",
        (f"data.root={data_set}", "data.camera=[a, b, a]"): "data.camera=['a', 'b', 'a'] has 'a' twice",
        (f"data.root={data_set.parent}",): f"camera='{WRIST}', '{FRONT}': '{data_set.parent}' is a folder of video",
        ("model.encoder=pretrained", "model.encoder.path=x"): "takes frames of 1 or 3 channels, not 2 cameras of 3",
    }.items():
        assert words in refused(capsys, *begin, *overrides)
    assert "has no cameras: it is a run" in refused(capsys, "inspect", run, "--camera", FRONT)
    assert "has no cameras: it is a file" in refused(capsys, "inspect", video, "--camera", FRONT)


def test_cameras_that_do_not_show_the_same_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_cameras(tmp_path / "v2.1", _write_video, "v2.1")
    path, rows = list(files_of("v2.1", WRIST).items())[3]
    write_camera(root / path, _write_video, WRIST, rows[:-1])
    begin = ["train", "--config", REPO / "configs" / "objectives.yaml", *OVERRIDES, f"run_dir={tmp_path / 'run'}"]
    line = refused(capsys, *begin, f"data.root={root}")
    assert f"the cameras {WRIST}, {FRONT} do not show the same frames of episode 3: '{path}' has 4 frames" in line


def test_convert_takes_one_camera(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_cameras(tmp_path / "v2.1", _write_video, "v2.1"), tmp_path / "out"
    both = f"{FRONT},{WRIST}"
    assert f"camera='{both}' is unknown" in refused(capsys, "convert", root, out, "--frames", both)
    assert main(["convert", str(root), str(out), "--frames", WRIST, "--num-processes", "1"]) == 0
    stream = worldmodel.open_videos(out, num_frames=5, batch_size=1, size_px=None, shuffle=False, num_workers=0)
    first = next(iter(stream))["video"][0]
    assert [_read_numbers(frame) for frame in first] == [(1, row) for row in range(5)]
