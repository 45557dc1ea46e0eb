"""A tiny written world and small configs that many tests share."""

import gc
import io
import multiprocessing
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipelines.worlds import kicked_mnist, occlusion
from data_pipelines.worlds.digits import load_sprites
from data_pipelines.worlds.kicked_mnist import render_digits, sample_videos
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from data_pipelines.worlds.written import encode_h264
from tests import forked
from worldmodel.config import Config, VideosConfig, load_config
from worldmodel.report.drawing import CHART_DPI
from worldmodel.training.loop import train

torch.set_num_threads(1)  # the tests are small: threads would only wait for each other

REPO = Path(__file__).resolve().parents[1]

TINY = (
    "seed=3",
    "data.batch_size=16",
    "data.num_lanes=4",
    "data.num_workers=0",
    "model.encoder.width=0.125",
    "model.hidden_dim=32",
    "model.embedding_dim=16",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.precision=fp32",
    "train.num_threads=1",
    "train.log_every=1",
    "train.eval_every=6",
    "train.checkpoint_every=2",
    "evaluation.queries=24",
    "evaluation.num_samples=8",
    "evaluation.law_samples=8",
    "evaluation.fit_clips=64",
    "evaluation.selection_clips=32",
    "tracking.wandb=disabled",
)


def pytest_collection() -> None:
    """Import the tests without garbage collection, which would visit all that they have imported repeatedly."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection while tests run, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


LONG_FILES = {"test_cached_videos.py", "test_combinations.py", "test_forecast.py", "test_run_page.py"}
"""Files that start no processes, and nevertheless take more than ten seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files first that take the longest, as those do that start processes: workers should finish together."""
    starters = {"run_processes", "run_python", "run_script", "subprocess"}

    def is_short(item: pytest.Item) -> bool:
        return item.path.name not in LONG_FILES and starters.isdisjoint(vars(getattr(item, "module")))  # noqa: B009

    items.sort(key=is_short)


@pytest.fixture(scope="session", autouse=True)
def forked_pools() -> Iterator[None]:
    """Fork the workers of `data_pipelines.processes.spawned_pool` on Linux: a spawned one imports torch for 2 s.

    The pools of programs that tests run (`run_python`) are spawned.
    """

    def context(method: str) -> Any:
        return multiprocessing.get_context("fork" if sys.platform == "linux" else method)

    with patch("data_pipelines.processes.get_context", context):
        yield


@pytest.fixture(scope="module", autouse=True)
def small_charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw the charts of reports with a sixteenth of their pixels, except for browsers."""
    of_browser = request.path.stem == "test_report_browser"
    with nullcontext() if of_browser else patch("worldmodel.report.drawing.CHART_DPI", CHART_DPI // 4):
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training, 32 selection and 24 test videos of nine frames, with labels."""
    root = tmp_path_factory.mktemp("world") / "moving_mnist"
    write_moving_mnist(root, {"train": 64, "selection": 32, "test": 24}, num_processes=1)
    return root


@pytest.fixture(scope="session")
def kicked_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training, 4 selection and 4 test videos of 24 frames with a kick every three, with labels."""
    root = tmp_path_factory.mktemp("world") / "kicked_mnist"
    kicked_mnist.write_kicked_mnist(root, {"train": 8, "selection": 4, "test": 4}, num_frames=24, num_processes=1)
    return root


@pytest.fixture(scope="session")
def occlusion_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training, 4 selection and 4 test videos of 24 frames with a screen, with labels."""
    root = tmp_path_factory.mktemp("world") / "occlusion"
    occlusion.write_occlusion(root, {"train": 8, "selection": 4, "test": 4}, num_frames=24, num_processes=1)
    return root


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Accelerate refuses another precision within one process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny_overrides(world: Path, tmp_path: Path) -> list[str]:
    """Overrides that make configs/objectives.yaml a matter of seconds, on the tiny world, into tmp_path/run."""
    return [*TINY, f"data.root={world}", f"run_dir={tmp_path / 'run'}"]


@pytest.fixture
def tiny_config(tiny_overrides: list[str]) -> Callable[..., Config]:
    """A function from further overrides to the tiny config."""
    return lambda *overrides: load_config(REPO / "configs" / "objectives.yaml", [*tiny_overrides, *overrides])


@pytest.fixture(scope="session")
def trained_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six updates on the tiny world, its prior a mixture. Copy it before changing it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path_factory.mktemp("trained") / "run"
    return train(load_config(REPO / "configs" / "objectives.yaml", [*TINY, f"data.root={world}", f"run_dir={run}"]))


@pytest.fixture(scope="session")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kicked digit, 36 frames at ten a second."""
    sprites = load_sprites("test")
    videos = sample_videos(sprites, 1, 1, 36, "bounce", torch.Generator().manual_seed(0))
    frames = render_digits(sprites.images[videos.sprite], videos.motion.centre)[0, :, 0]
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    encode_h264(path, (frames * 255).round().byte().numpy())
    return path


def videos_of(config: Config) -> VideosConfig:
    """The section `data` of a config of videos."""
    assert isinstance(config.data, VideosConfig)
    return config.data


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_script(name: str, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME, or a path below the repository, in a new process."""
    script = REPO / name if "/" in name else REPO / "scripts" / name
    return run_python(str(script), *arguments, timeout_s=timeout_s)


def run_python(
    *arguments: str, cwd: Path = REPO, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run -m and a module, -c and code, or a script, in a new process. environment: further variables.

    Our modules are imported afresh; other packages are loaded already (`tests.forked`).
    """
    return forked.run(arguments, cwd=cwd, environment=script_environment() | environment, timeout_s=timeout_s)


def run_here(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script as `run_script` does, but in this process, which has imported torch. Log messages are not captured.

    Use it to test the output and the files of a command: a new process would import all our modules again.
    """
    script = str(REPO / name if "/" in name else REPO / "scripts" / name)
    out, errors, num_threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    code: str | int | None = 0
    with (
        redirect_stdout(out),
        redirect_stderr(errors),
        patch.object(sys, "argv", [script, *arguments]),
        patch("worldmodel.commands.process.keep_freed_memory"),  # would be for all tests to come
        patch("worldmodel.commands.evaluate.keep_freed_memory"),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(num_threads)
    assert isinstance(code, int) or code is None
    return subprocess.CompletedProcess([script, *arguments], code or 0, out.getvalue(), errors.getvalue())


def run_processes(
    count: int, *arguments: str, timeout_s: float = 300, environment: Mapping[str, str] | None = None
) -> str:
    """Run -m and a module, or a script, in so many processes of one training. Return what they print.

    They are forks (`tests.forked`) with the variables that torchrun would set. test_launch.py tests the launchers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), **(environment or {})}
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [
            forked.start(
                arguments,
                output,
                output,
                cwd=REPO,
                environment=script_environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        deadline_s = time.monotonic() + timeout_s
        try:
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                assert time.monotonic() < deadline_s, f"{arguments} takes more than {timeout_s} s"
                time.sleep(forked.POLL_S)
        finally:
            for process in processes:
                process.kill()
                process.wait(timeout_s)
        text = output.read()
    assert not any(codes), text[-9000:]
    return text


def script_environment() -> dict[str, str]:
    """Return the variables of the programs that tests run."""
    return {**forked.ENVIRONMENT, "PYTHONPATH": str(REPO)}
