"""Arguments that the commands reject: one line, before the work begins."""

import argparse
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import worldmodel
from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY, run_here, videos_of
from worldmodel.commands import compare, grid, jobs, main
from worldmodel.commands.exits import named_refusals
from worldmodel.config import Config, load_config, to_yaml
from worldmodel.config.shipped import command_for_data, shipped_configs

Call = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process and return its one line on standard error, without "error: "."""

    def call(name: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main.main([name, *map(str, arguments)])
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO ")]
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return call


def parsed(*arguments: str) -> argparse.Namespace:
    """Parse the arguments of `worldmodel compare`."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    compare.split_lists(args)
    return args


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the work was begun")


def test_a_shipped_config_names_the_command_that_writes_its_data(
    refused: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = 0
    for path in shipped_configs().values():
        root = getattr(load_config(path).data, "root", "data/videos")
        if root != "data/videos":  # that of a user's own
            command = command_for_data(path)
            assert command and command.split()[command.split().index("--out") + 1] == root
            named += 1
    assert named > 10
    written_by = "`worldmodel videos moving-mnist --out data/moving_mnist` writes it"
    assert refused("train", "--config", "demo") == f"data root 'data/moving_mnist' does not exist: {written_by}"
    assert refused("train", "--config", "demo", "data.root=mine").startswith("data root 'mine' is not a folder")


def test_outputs_of_surprise_and_rollout(
    refused: Call, trained_run: Path, long_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    given = ["--run", trained_run, "--video", long_video]
    monkeypatch.setattr("worldmodel.runs.trained_run.TrainedRun.surprise", never)
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none", "x" * 300):
        assert f"cannot write to --out {out}" in refused("surprise", *given, "--out", out)
    monkeypatch.setattr("worldmodel.commands.rollout.read_clip", never)
    for out in (tmp_path, tmp_path / "file" / "below.npz", "/dev/null", "/proc/none/f.npz"):
        assert f"cannot write to --out {out}" in refused("rollout", *given, "--out", out)
    for name in ("futures", "futures.npy", "new/f.npz.gz", ".npz"):
        assert f"/{name}: the name must end in .npz" in refused("rollout", *given, "--out", tmp_path / name)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_videos_that_are_no_files(refused: Call, trained_run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nothing")
    for name in ("surprise", "rollout"):
        given = ["--run", trained_run, "--out", tmp_path / "out"]
        for video in ("fifo.mp4", "folder.mp4"):
            assert "it is not a regular file" in refused(name, *given, "--video", tmp_path / video)
        for video in ("link.mp4", "no.mp4", "take:1.mp4", "http://host/a.mp4"):
            assert "there is no such file" in refused(name, *given, "--video", tmp_path / video)
    assert not (tmp_path / "out").exists()


def test_devices_and_numbers(refused: Call, trained_run: Path, long_video: Path, tmp_path: Path) -> None:
    given = ["--run", trained_run, "--video", long_video]
    for name in ("surprise", "rollout"):
        assert "--device warp cannot be used here" in refused(name, *given, "--out", tmp_path, "--device", "warp")
    npz = ["--out", tmp_path / "f.npz"]
    assert "--num-samples times --horizon" in refused("rollout", *given, *npz, "--num-samples", 10**6, "--horizon", 99)
    assert "--horizon must be at most" in refused("rollout", *given, *npz, "--horizon", 10**18)
    assert "has no recalibration: set evaluation.recalibrate" in refused("rollout", *given, *npz, "--recalibrate")
    assert "--seed must be from 0" in refused("rollout", *given, *npz, "--seed", -1)
    assert "it has 36 frames" in refused("rollout", *given, *npz, "--start-frame", -5)
    assert "it has 36 frames" in refused("rollout", *given, *npz, "--start-frame", 10**30)
    assert "--peaks must be at most" in refused("surprise", *given, "--out", tmp_path, "--peaks", 10**9)


def test_videos_and_environments_that_cannot_be_made(refused: Call, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert "--seed must be from 0" in refused("videos", "moving-mnist", *out, "--seed", 10**20)
    assert "leave out --num-processes" in refused("videos", "digits", *out, "--num-processes", 2)
    lake = ["--env", "FrozenLake-v1", "--env-kwargs", "map_name=9x9"]
    assert refused("record", *lake, *out) == "environment 'FrozenLake-v1' cannot be made: KeyError: '9x9'"
    assert not (tmp_path / "out").exists()


def test_a_causal_run_is_not_rolled_out_over_a_video(
    refused: Call, long_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, "data.source=causal", "data.batch_size=32", "train.steps=1", f"run_dir={tmp_path / 'run'}"]
    run = worldmodel.train(load_config(REPO / "configs" / "causal" / "heteroscedastic.yaml", overrides))
    capsys.readouterr()
    given = ["--run", run, "--video", long_video, "--out", tmp_path / "f.npz"]
    assert "rollout needs a run on videos" in refused("rollout", *given)


def test_a_video_whose_name_looks_like_a_formula(trained_run: Path, long_video: Path, tmp_path: Path) -> None:
    video = tmp_path / "a$\\frac{$ \x1b[2J 日:1.mp4"
    shutil.copy(long_video, video)
    out = tmp_path / "cost $\\x$"
    done = run_here("surprise.py", "--run", str(trained_run), "--video", str(video), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert (out / "surprise.png").read_bytes().startswith(b"\x89PNG") and (out / "surprise.webp").is_file()
    assert "\x1b[2J" not in done.stdout + done.stderr and "missing from" not in done.stderr


def test_plans_are_not_begun_when_their_report_cannot_be_written(
    refused: Call, trained_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    given = ["--run", run, "--env", "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"]
    (run / "metrics.json").write_text('{"horizon": 1000000000}')
    assert "metrics.json is damaged" in refused("plan", *given)
    (run / "metrics.json").unlink()
    assert "only planning.KEY=VALUE" in refused("plan", *given, "run_dir=#3")
    assert len(refused("plan", *given, "planning." + "x" * 10_000 + "=1")) < 2_000
    assert "--first-seed must be from 0" in refused("plan", *given, "--first-seed", -1)


def evaluated(folder: Path, config: Config) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    scores = {"energy_score": [0.5, 1.0], "ratio_to_oracle": [1.25, 1.5]}
    (folder / "metrics.json").write_text(json.dumps({"forecasts": {"model": scores}}))
    return folder


def test_runs_with_odd_names_are_compared(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    names = [
        "cost $\\x$",
        "_under",
        "bar|\x1b[2J",
        "two\nlines",
        "日本",
        os.fsdecode(b"caf\xe9"),
        "<script>alert(1)</script>",
    ]
    runs = [evaluated(tmp_path / name.replace("/", ""), tiny_config()) for name in names]
    out = tmp_path / os.fsdecode(b"out \xe9 $")
    done = run_here("compare.py", "--runs", *map(str, runs), "--out", str(out))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "missing from" not in done.stderr and "\x1b" not in done.stdout
    table = (out / "comparison.md").read_text()
    assert len(table.split("\n\n")[0].splitlines()) == 2 + len(names) and "cost $\\x$" in table
    content = json.loads((out / "comparison.json").read_text())
    assert [row["folder"] for row in content["runs"]] == [os.path.relpath(run, out) for run in runs]
    assert "<script>alert" not in (out / "compare.html").read_text()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def grid_arguments(out: Path | str, *more: str) -> list[str]:
    config = str(REPO / "configs" / "objectives.yaml")
    names = ["--objectives", "byol", "--latents", "none", "--seeds", "0"]
    return ["--config", config, "--out", str(out), *names, *more]


def test_outputs_of_comparisons(
    refused: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., Config]
) -> None:
    monkeypatch.setattr(jobs, "start", never)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        assert f"cannot write to --out {out}" in refused("compare", *grid_arguments(out))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "file")
    assert ".lock: " in refused("compare", *grid_arguments(tmp_path / "out"))
    run = evaluated(tmp_path / "run", tiny_config())
    (tmp_path / "blocked" / "comparison.json").mkdir(parents=True)
    assert "cannot write to --out" in refused("compare", "--runs", run, "--out", tmp_path / "blocked")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_table_needs_finished_runs(refused: Call, tmp_path: Path) -> None:
    only = refused("compare", *grid_arguments(tmp_path / "out", "--table-only"))
    assert only == f"{tmp_path / 'out'} holds no finished run of this grid: leave out --table-only to train them"


def test_logs_are_not_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "byol-none").mkdir()
    (tmp_path / "byol-none" / "seed_0.log.txt").symlink_to(tmp_path / "mine")
    (run,), _ = grid.make_grid(parsed(*grid_arguments(tmp_path)))
    with pytest.raises(UserError, match=r"cannot write to .*seed_0\.log\.txt"):
        jobs.start(run, "", 0)
    assert (tmp_path / "mine").read_text() == "mine"


def test_arguments_of_a_grid(refused: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--launch 'a \"b' cannot be split into words" in refused(
        "compare", *grid_arguments(tmp_path, "--launch", 'a "b')
    )
    assert "seed=-1" in refused("compare", *grid_arguments(tmp_path, "--seeds", "-1"))
    monkeypatch.chdir(tmp_path)
    settings = ["data.root=#3 a: b ", "--set", "byol:data.camera=007", "--launch", "X=1"]
    args = parsed(*grid_arguments("out=#3", *settings))
    (run,), _ = grid.make_grid(args)
    assert args.out == Path("out=#3") and args.launch == "X=1"
    assert (run.config.run_dir, videos_of(run.config).root) == ("out=#3/byol-none/seed_0", "#3 a: b ")
    assert videos_of(run.config).camera == "007"


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--run", LONG),
        ("rollout", "--run", LONG, "--video", "v.mp4", "--out", "f.npz"),
        ("plan", "--run", LONG, "--env", "e"),
        ("export", LONG, "out"),
        ("push", LONG, "owner/name"),
        ("compare", "--runs", LONG, "--out", "out"),
        ("videos", "digits", "--out", LONG),
        ("videos", "digits", "--out", "out", "--mnist-dir", LONG),
        ("reproduce", "--out", LONG),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_the_system_refuses(
    refused: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(*arguments)
    assert LONG in line and line.endswith(": File name too long"), line


def test_folders_of_a_loaded_run_that_the_system_refuses(refused: Call, trained_run: Path, tmp_path: Path) -> None:
    run = ["--run", trained_run]
    assert refused("embed", LONG, tmp_path / "out", *run).endswith(": File name too long")
    assert refused("evaluate", *run, "--compare", LONG).endswith(": File name too long")
    assert refused("export", trained_run, LONG).endswith(": File name too long")
    assert "a part of a name has at most 255 bytes" in refused("decode", *run, "--data-root", LONG)
    assert "data.root is empty" in refused("decode", *run, "--data-root", "")


def test_only_what_the_system_refuses_is_a_mistake_of_the_user() -> None:
    for error in (PermissionError(errno.EACCES, "Permission denied", "/f"), OSError(errno.ENOSPC, "No space", b"/f")):
        with pytest.raises(UserError, match=r"^'/f': (Permission denied|No space)$"), named_refusals():
            raise error
    with pytest.raises(UserError, match=r"^a file cannot be written: No space$"), named_refusals():
        raise OSError(errno.ENOSPC, "No space")
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "/f"), PermissionError(errno.EPERM, "no", 3)):
        with pytest.raises(type(error)), named_refusals():
            raise error
