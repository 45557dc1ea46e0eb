"""The `worldmodel` command: its overview, the help of every command, names of configs, and the launchers."""

import argparse
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from data_pipelines.splits import SPLITS
from tests.conftest import REPO, TINY, run_processes, script_environment
from worldmodel.commands import main, record, videos
from worldmodel.config.shipped import find_config, shipped_configs

HELP_OF_ALL = """
import contextlib, io, sys
from worldmodel.commands.main import COMMANDS, main
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([name, "--help"])
    text = printed.getvalue()
    assert f"usage: worldmodel {name} " in text and f"  worldmodel {name}" in text.partition("example")[2], text
    assert "torch" not in sys.modules, name
"""


def test_the_overview_fits_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == main.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    overview = lines[: len(lines) // 2]
    assert lines == overview * 2 and len(overview) <= 24 and max(map(len, overview)) <= 80
    assert all(any(line.split()[:1] == [name] for line in overview) for name in main.COMMANDS)


def test_help_shows_an_example_and_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, cwd=REPO, env=script_environment()
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, hint in (("trian", " (did you mean train?)"), ("xyz", "")):
        with pytest.raises(SystemExit) as ended:
            main.main([name])
        assert ended.value.code == 2
        assert (
            capsys.readouterr().err
            == f"error: {name!r} is not a command{hint}: `worldmodel --help` lists the commands\n"
        )


def test_the_reference_of_a_section_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "planning"]) == 0
    assert "planning.horizon" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main(["config", "plannin"])
    assert capsys.readouterr().err.startswith("error: there is no key 'plannin' of the config (did you mean planning?)")


def test_each_file_in_scripts_launches_a_command() -> None:
    for path in sorted((REPO / "scripts").glob("*.py")):
        done = subprocess.run(
            [sys.executable, str(path), "--help"], capture_output=True, text=True, env=script_environment()
        )
        name = path.stem.removesuffix("_env").removesuffix("_videos").removeprefix("make_")
        expected = "videos" if name == "moving_mnist" else name
        assert done.returncode == 0 and done.stdout.startswith(f"usage: worldmodel {expected} "), done.stderr
        assert len(path.read_text().splitlines()) < 20


def test_python_m_and_several_processes(tiny_overrides: list[str], tmp_path: Path) -> None:
    arguments = ["train", "--config", "objectives", *tiny_overrides, "train.steps=1", "train.eval_every=1"]
    run_processes(2, "-m", "worldmodel", *arguments)
    assert (tmp_path / "run" / "checkpoints" / "index.json").is_file()


def test_names_of_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = shipped_configs()
    assert set(shipped) >= {"demo", "causal/isotropic"} and not any(name.startswith("accelerate") for name in shipped)
    assert find_config("demo").read_bytes() == (REPO / "configs" / "demo.yaml").read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_config("demo") == shipped["demo"]
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("seed: 1\n")
    assert find_config("demo") == Path("demo")  # a file wins over a name
    assert find_config("missing.yaml") == Path("missing.yaml")  # the reader's message names the path
    meant = r" \(did you mean demo\?\)"
    for name, hint in (("demoo", meant), ("../configs/demo", ".*"), ("x" * 300, ""), ("a\0b", "")):
        with pytest.raises(
            UserError, match=rf"is neither a file nor a shipped config{hint}: .*causal/isotropic.* demo, "
        ):
            find_config(name)


def test_the_constants_that_help_shows_are_those_of_the_library() -> None:
    assert record.SPLITS == SPLITS
    assert all(tuple(counts) == SPLITS for counts in videos.COUNTS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moving-mnist", "--num-frames", "30"], "--num-frames 30 is not an option of moving-mnist"),
        (["kicked-mnist", "--setting", "B"], "--setting B is not an option of kicked-mnist"),
        (["kicked-mnist", "--num-frames", "31"], "--num-frames 31 must be a multiple of 3, at least 6"),
        (["two-rooms", "--env-kwargs", "slip=2"], "slip=2"),
        (["two-rooms", "--num-processes", "0"], "num_processes=0 must be at least 1"),
        (["moving-mnist", "--num-processes", "0"], "num_processes=0 must be at least 1"),
        (["digits", "--test", "0"], "--test must be at least 1, not 0"),
    ],
)
def test_options_of_worlds(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["videos", *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_rooms_are_recorded(tmp_path: Path) -> None:
    counts = ["--train", "2", "--selection", "1", "--test", "1", "--num-processes", "1"]
    assert main.main(["videos", "two-rooms", "--out", str(tmp_path / "rooms"), *counts]) == 0
    assert len(list((tmp_path / "rooms" / "train").glob("*.mp4"))) == 2


@pytest.mark.slow
def test_an_installed_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Build the wheel, install it into an empty environment, and use it in an empty folder."""

    def call(*command: str | Path, timeout_s: float = 900) -> str:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=timeout_s, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    environment = {name: value for name, value in script_environment().items() if name != "PYTHONPATH"}
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "dist", REPO)
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    [wheel] = (tmp_path / "dist").glob("*.whl")
    python, command = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "worldmodel"
    call(python, "-m", "pip", "install", "--quiet", "-c", REPO / "constraints.txt", "torch", wheel)
    call(command, "videos", "moving-mnist", "--out", "v", "--train", "512", "--selection", "64", "--test", "64")
    reduced = [override for override in TINY if override.startswith(("evaluation.", "tracking.", "train.num_threads"))]
    call(command, "train", "--config", "demo", "data.root=v", "train.steps=20", "train.refine_steps=20", *reduced)
    call(command, "evaluate", "--run", "runs/demo")
    call(
        *(command, "rollout", "--run", "runs/demo", "--video", "v/test/000000.mp4", "--out", "futures.npz"),
        *("--num-samples", "2"),
    )
    assert (tmp_path / "futures.npz").is_file() and (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert "files     512, " in call(command, "inspect", "v")
    typed = "import worldmodel, pathlib; print(pathlib.Path(worldmodel.__file__).with_name('py.typed').is_file())"
    assert call(python, "-c", typed) == "True\n"


@pytest.mark.parametrize(("environment", "seconds"), [({}, 10.0), ({"TQDM_MININTERVAL": "2"}, 2.0)])
def test_progress_bars_write_few_lines_into_a_file(environment: dict[str, str], seconds: float) -> None:
    code = """
from worldmodel.commands import main
main.leave = lambda code: None
main.run_command("--version")
from tqdm.auto import tqdm
print(tqdm([]).mininterval)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=script_environment() | environment, timeout=60
    )
    assert done.stdout.splitlines()[-1] == str(seconds), done.stderr


def test_a_reader_that_leaves_ends_the_command_silently() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "worldmodel", "config"]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=REPO, env=script_environment(), timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("inspect", ["--", "-x"], {"path": Path("-x")}),
        ("inspect", ["--sheet", "s.png", "--", "-x"], {"path": Path("-x"), "sheet": Path("s.png")}),
        ("convert", ["--", "-x", "--out"], {"source": Path("-x"), "out": Path("--out")}),
        ("shards", ["--", "-x", "-y"], {"source": Path("-x"), "out": Path("-y")}),
        ("embed", ["--run", "r", "--", "-x", "-y", "data.fps=1"], {"root": "-x", "overrides": ["data.fps=1"]}),
        ("embed", ["x", "--run", "r", "y", "data.fps=1"], {"root": "x", "overrides": ["data.fps=1"]}),
    ],
)
def test_names_that_begin_with_a_dash(name: str, arguments: list[str], found: dict[str, object]) -> None:
    parser = argparse.ArgumentParser()
    import_module(f"worldmodel.commands.{name}").add_arguments(parser)
    args = vars(main.parsed(parser, arguments))
    assert {key: args[key] for key in found} == found
