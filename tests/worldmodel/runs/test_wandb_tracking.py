"""wandb without a network, a key, a home: a run begins soon, and ends for no fault of wandb."""

import http.server
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from data_pipelines.errors import UserError
from tests.conftest import REPO, run_here
from worldmodel.runs import wandb_tracking
from worldmodel.runs.tracking import Tracker, read_history
from worldmodel.runs.wandb_tracking import WandbRun, start_wandb, wandb_mode

KEY = "0123456789" * 4
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "http_proxy", "HTTP_PROXY", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb_tracking, "START_S", 5.0)


@pytest.fixture
def server() -> Iterator[Callable[[int], str]]:
    """The URL of a server that answers with a status, or with 0 never does."""
    servers, over = [], threading.Event()

    def begin(status: int) -> str:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not status:
                    over.wait(60)
                    return
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield begin
    over.set()
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize(
    ("given", "config_mode", "mode"),
    [
        (None, "offline", "offline"),
        ("", "offline", "offline"),
        (" ", "disabled", "disabled"),
        ("", "online", "online"),
        ("offline", "online", "offline"),
        ("dryrun", "online", "offline"),
        ("run", "offline", "online"),
        ("ONLINE", "disabled", "online"),
        ("disabled", "online", "disabled"),
    ],
)
def test_the_environment_is_before_the_config(
    monkeypatch: pytest.MonkeyPatch, given: str | None, config_mode: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if given is not None:
        monkeypatch.setenv("WANDB_MODE", given)
    assert wandb_mode(config_mode) == mode


@pytest.mark.parametrize("given", ["garbage", "shared", "on\x1bline", "0"])
def test_another_mode_is_one_line(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("WANDB_MODE", given)
    with pytest.raises(UserError, match=r"WANDB_MODE='.*' is not a mode of wandb: use offline, online or disabled"):
        wandb_mode("offline")


def test_a_mistake_is_told_before_there_is_a_run_folder(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "garbage")
    done = run_here("train.py", "--config", str(REPO / "configs" / "objectives.yaml"), *tiny_overrides)
    assert done.returncode == 2 and "error: WANDB_MODE='garbage'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "status", "tells"),
    [
        (KEY, None, f"{NOWHERE} cannot be reached"),
        (KEY, 0, "cannot be reached (timed out)"),
        (KEY, 401, "wandb cannot be online"),
        ("short", 200, "API key"),
        ("with\ttab " + KEY, 200, "wandb cannot be online"),
    ],
    ids=["nobody", "silent", "refused", "short key", "odd key"],
)
def test_without_a_way_to_the_server_wandb_is_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    server: Callable[[int], str],
    key: str,
    status: int | None,
    tells: str,
) -> None:
    monkeypatch.setattr(wandb_tracking, "REACH_S", 0.5 if status == 0 else 10)  # a busy machine answers late, too
    monkeypatch.setenv("WANDB_API_KEY", key)
    if status is not None:
        monkeypatch.setenv("WANDB_BASE_URL", server(status))
    wandb.teardown()  # it reads its settings once in a process
    started_s = time.monotonic()
    tracker = Tracker(tmp_path, start_step=0)
    tracker.wandb = start_wandb(tmp_path, "online", "worldmodel", {})
    tracker.log("train", 1, {"loss": 0.5})
    tracker.close()
    assert time.monotonic() - started_s < 45
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and tells in warnings[0] and "wandb sync" in warnings[0]
    assert list((tmp_path / "wandb").glob("offline-run-*")) and read_history(tmp_path)[0]["loss"] == 0.5


@pytest.mark.parametrize("url", ["", "nonsense", "http://", "http://[", "ftp://127.0.0.1:9", "http://127.0.0.1:99999"])
def test_a_server_s_address_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_tracking, "_reach", lambda: (_ for _ in ()).throw(OSError("no way")))
    monkeypatch.setenv("WANDB_BASE_URL", url)
    run = start_wandb(tmp_path, "online", "worldmodel", {})
    if run is not None:
        run.finish()


@pytest.mark.parametrize("name", ["HOME", "no HOME", "WANDB_DIR", "TMPDIR", "WANDB_CONFIG_DIR"])
def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wandb.teardown()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if name == "no HOME":
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv(name, "/dev/null/x")
    run = start_wandb(tmp_path, "offline", "worldmodel", {"seed": 0})
    assert run is not None
    run.log({"loss": 1.0}, 1)
    run.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*")) and [path.name for path in tmp_path.iterdir()] == ["wandb"]


def test_a_project_that_wandb_refuses_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert start_wandb(tmp_path, "offline", "a/b", {}) is None
    assert "metrics go to metrics.jsonl alone: Invalid project name" in caplog.text


class Fails:
    """A run of wandb that fails, or that ends no sooner than it is told to."""

    def __init__(self, over: threading.Event | None = None) -> None:
        self.over, self.calls = over, 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls += 1
        raise BrokenPipeError("the service\x1b[2J\nis gone")

    def finish(self) -> None:
        if self.over is None:
            raise RuntimeError("no service")
        self.over.wait(60)


def test_a_run_continues_when_wandb_fails(caplog: pytest.LogCaptureFixture) -> None:
    failing = Fails()
    run = WandbRun(failing)
    for step in range(3):
        run.log({"loss": 1.0}, step)
    run.finish()
    assert failing.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        r"wandb failed, the run continues without it: the service\x1b[2J is gone"
    ]
    caplog.clear()
    WandbRun(Fails()).finish()
    assert "wandb did not finish: no service; `wandb sync`" in caplog.text


def test_the_end_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(wandb_tracking, "FINISH_S", 0.1)
    over = threading.Event()
    try:
        WandbRun(Fails(over)).finish()
    finally:
        over.set()
    assert "no answer within 0.1 s" in caplog.text
