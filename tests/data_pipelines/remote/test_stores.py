"""URLs that are not opened, and servers that do not mean well."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import UserError
from data_pipelines.facts import Shard
from data_pipelines.formats.registry import load_videos
from data_pipelines.remote import http_bodies, stores
from data_pipelines.remote.http_bodies import is_public
from data_pipelines.remote.stores import MAX_INDEX_BYTES, MIN_BYTES_PER_S, SCHEMES, Store, check_url, host_of
from data_pipelines.shards.index_file import SHARDS_NAME
from data_pipelines.split_folders import load_split
from tests.conftest import REPO, run_here
from tests.data_pipelines.shard_server import ShardServer

TEXT = b'{"format": "worldmodel-shards", "version": 1}\n' * 10

Handler = BaseHTTPRequestHandler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    (folder / "moved").mkdir(parents=True)
    for place in (folder, folder / "moved"):
        (place / SHARDS_NAME).write_bytes(TEXT)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder) as server:
        yield server


@pytest.fixture
def store(server: ShardServer, slept: list[float]) -> Store:
    return Store(server.url, sleep=slept.append, stall_s=0.3)


# ----------------------------------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "FILE:///etc",
        "local:///etc",
        "memory://bucket",
        "ftp://host/a",
        "sftp://host/a",
        "github://owner:name@main/a",
        "reference://::file:///tmp/a.json",
        "simplecache::http://host/a",
        "filecache::s3://bucket/a",
        "dir::file:///etc",
        "zip://a::http://host/b.zip",
        "http://host/a::file:///etc",
        "s3://bucket/a::simplecache://",
        " http://host/a",
        "http\n://host/a",
        "https://host/a\x1b[2J",
        "HTTP://host/a",
        "data://text",
        "nonsense://host",
        "://host",
    ],
)
def test_other_schemes_and_chains_are_refused_in_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not opened") as raised:
        load_videos(url, cache_dir=tmp_path / "cache", progress=False)
    assert str(raised.value).isprintable() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("rest", ["?key=secret", "/?key=secret", "#secret", "?a=1&b=secret#c"])
def test_a_url_with_a_query_is_refused_before_it_is_requested(server: ShardServer, rest: str, tmp_path: Path) -> None:
    """Its files are not below it: the server would give the page of the folder for each of them."""
    url = f"{server.url.replace('//', '//me:secret@')}/moved{rest}"
    with pytest.raises(UserError, match=r"'http://[\d.:]+/moved/?' is not opened with a '\?' or '#'") as raised:
        load_split(url, "train", cache_dir=tmp_path / "cache")
    assert not server.requests and "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["ftp://me:secret@host/a", "http://me:secret@host/a::b", "file://me:secret@host"])
def test_a_refused_url_is_shown_without_its_password(url: str) -> None:
    with pytest.raises(UserError, match=r"host.* is not opened") as raised:
        check_url(url)
    assert "secret" not in str(raised.value)


def test_the_schemes_that_are_documented_are_accepted() -> None:
    for scheme in SCHEMES:
        check_url(f"{scheme}://some-host:8080/a folder/b")
    page = (REPO / "docs" / "streaming.md").read_text(encoding="utf-8")
    assert all(f"`{scheme}`" in page for scheme in SCHEMES)


def test_a_script_refuses_another_scheme_with_exit_code_2(tiny_overrides: list[str]) -> None:
    config = str(REPO / "configs" / "objectives.yaml")
    done = run_here("train.py", "--config", config, *tiny_overrides, "data.root=reference://::file:///tmp/a")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: 'reference://::file:///tmp/a/train' is not opened" in done.stderr


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://me:secret@host:8080/a?b", "https://host:8080"),
        ("s3://bucket/a/b", "s3://bucket"),
        ("http://host#a@b", "http://host"),
    ],
)
def test_the_host_is_reported_without_a_password(url: str, host: str) -> None:
    assert host_of(url) == host


# ------------------------------------------------------------------------------------------------------------ bounds


def _begin(handler: Handler, *headers: tuple[str, str]) -> None:
    handler.send_response(200)
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()


def _endless(
    chunk: bytes, *headers: tuple[str, str], first: bytes = b"", pause_s: float = 0
) -> Callable[[Handler], None]:
    """Answer with `first`, then with `chunk` again and again until the client leaves, or for 20 seconds."""

    def answer(handler: Handler) -> None:
        _begin(handler, *headers)
        begin_s = time.monotonic()
        with suppress(OSError):
            handler.wfile.write(first)
            while time.monotonic() < begin_s + 20:
                handler.wfile.write(chunk)
                time.sleep(pause_s)

    return answer


def _bomb() -> Callable[[Handler], None]:
    """Answer with a gzip stream that has no end; a mebibyte in it takes about a kibibyte."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(b" " * 2**20) + deflate.flush(zlib.Z_FULL_FLUSH)
    header = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"
    return _endless(block * 64, ("Content-Encoding", "gzip"), first=header)


READ = """
import json, resource, sys
from data_pipelines.errors import UserError
from data_pipelines.remote.stores import Store

url, limit = json.loads(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Store(url, max_index_bytes=limit).read("shards.jsonl")
except UserError as error:
    print(json.dumps([str(error), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.parametrize("kind", ["endless", "gzip bomb"])
def test_an_index_without_end_takes_no_more_memory_than_its_bound(server: ShardServer, kind: str) -> None:
    """It is read once: 64 MiB here, 1 GiB unless a test says otherwise."""
    answer = _bomb() if kind == "gzip bomb" else _endless(b" " * 2**20)
    server.faults[SHARDS_NAME] = [answer] * 9
    command = [sys.executable, "-c", READ, json.dumps([server.url, 2**26])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=60, check=True)
    message, peak_kib = json.loads(done.stdout)
    assert "is longer than 67,108,864 bytes" in message and "\n" not in message
    assert peak_kib < 2 * 65_536 + 60_000, f"{peak_kib} KiB for 64 MiB"
    assert server.requests == [SHARDS_NAME] and Store(server.url).max_index_bytes == MAX_INDEX_BYTES == 2**30


def test_compression_is_not_asked_for_and_understood(server: ShardServer, store: Store) -> None:
    body = gzip.compress(TEXT)

    def answer(handler: Handler) -> None:
        _begin(handler, ("Content-Encoding", "gzip"), ("Content-Length", str(len(body))))
        handler.wfile.write(body)

    server.faults[SHARDS_NAME] = [answer]
    assert store.read(SHARDS_NAME) == TEXT == store.read(SHARDS_NAME)
    assert [headers["Accept-Encoding"] for headers in server.headers] == ["identity"] * 2


def _slow_headers(handler: Handler) -> None:
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(200):
            handler.wfile.write(f"X-{number}: x\r\n".encode())
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (_endless(b" ", pause_s=0.02), f"fewer than {MIN_BYTES_PER_S:,} bytes a second"),
        (_slow_headers, "no answer within 0.6 s"),
    ],
    ids=["body", "headers"],
)
def test_a_byte_now_and_then_is_not_waited_for(
    server: ShardServer,
    store: Store,
    slept: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    message: str,
) -> None:
    monkeypatch.setattr(stores, "TRIES", 2)
    server.faults = {name: [answer] * 20 for name in (SHARDS_NAME, "a.tar")}
    with pytest.raises(UserError, match=f"tried 2 times: .*{message}"):
        store.read(SHARDS_NAME)
    assert len(slept) == 1
    if message.startswith("fewer"):
        with (tmp_path / "out").open("wb", buffering=0) as out, pytest.raises(UserError, match=message):
            store.fetch(Shard("a.tar", 2**30, "0" * 64), out)


def test_a_shard_without_end_is_left_at_the_length_that_its_index_states(
    server: ShardServer, store: Store, tmp_path: Path
) -> None:
    server.faults["a.tar"] = [_bomb()] * 8
    with (tmp_path / "out").open("wb", buffering=0) as out:
        with pytest.raises(UserError, match="it sends more than 1,000 bytes"):
            store.fetch(Shard("a.tar", 1000, "0" * 64), out)
        assert out.tell() <= 1000


@pytest.mark.parametrize("status", [404, 403])
def test_a_file_that_is_missing_or_forbidden_is_not_held(
    server: ShardServer, store: Store, slept: list[float], status: int
) -> None:
    """A bucket that may not be listed answers 403 for what it does not have."""
    server.faults["train/shards.jsonl"] = [status]
    assert store.holds(SHARDS_NAME) and not store.holds("train/shards.jsonl")
    assert len(server.requests) == 2 and not slept


def test_a_store_may_also_raise_a_permission_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As s3fs does."""

    def refuse(*_: Any) -> Any:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(Store, "_open", refuse)
    assert not store.holds(SHARDS_NAME)


@pytest.mark.parametrize(("status", "tries"), [(500, "8 times"), (503, "8 times"), (401, "once"), (400, "once")])
def test_other_answers_do_not_say_whether_a_file_is_held(
    server: ShardServer, store: Store, status: int, tries: str
) -> None:
    server.faults[SHARDS_NAME] = [status] * 8
    with pytest.raises(UserError, match=rf"could not be fetched, tried {tries}: {status}"):
        store.holds(SHARDS_NAME)


def test_what_is_not_there_is_called_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard("shard-0.tar", 4, "0" * 64)
    with pytest.raises(UserError, match=r"shard-0\.tar' could not be fetched, tried once: there is no such file: noth"):
        store.fetch(shard, FileIO(os.devnull, "w"))

    def no_bucket(*_: Any) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(Store, "_open", no_bucket)
    with pytest.raises(UserError, match="tried once: The specified bucket does not exist: noth"):
        store.fetch(shard, FileIO(os.devnull, "w"))


@pytest.mark.parametrize("faults", [[404], [403], [503] * 8, ["corrupt"] * 8, ["reset"] * 8])
def test_messages_show_no_password(
    server: ShardServer,
    folder: Path,
    faults: list[int | str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    slept: list[float],
) -> None:
    caplog.set_level("INFO")
    url = server.url.replace("//", "//me:secret@")
    (folder / "a.tar").write_bytes(b"text")
    (folder / SHARDS_NAME).write_bytes(b"damaged\n")
    store = Store(url, sleep=slept.append, stall_s=0.3)
    errors = []
    with pytest.raises(UserError) as raised:
        load_videos(url, store=store, cache_dir=tmp_path / "cache", progress=False)
    errors.append(raised.value)
    (folder / SHARDS_NAME).unlink()
    with pytest.raises(UserError) as raised:
        load_videos(url, store=store, cache_dir=tmp_path / "cache", progress=False)
    errors.append(raised.value)
    server.faults["a.tar"] = list(faults)
    with pytest.raises(UserError) as raised:
        store.fetch(Shard("a.tar", 4, "0" * 64), FileIO(os.devnull, "w"))
    errors.append(raised.value)
    assert all(server.url in str(error) for error in errors)
    assert "secret" not in "".join([*map(str, errors), caplog.text])


def test_the_container_of_abfs_is_no_password() -> None:
    assert Store("abfs://videos@account.dfs.core.windows.net/a").shown == "abfs://videos@account.dfs.core.windows.net/a"


def test_a_lack_of_memory_is_not_tried_again(store: Store, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Store, "_chunks", fail)
    with pytest.raises(UserError, match="tried once: MemoryError"):
        store.read(SHARDS_NAME)
    assert not slept


# --------------------------------------------------------------------------------------------------------- redirects


def _redirect(place: str, status: int = 302) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Location", place)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_host_is_followed(server: ShardServer, store: Store, status: int) -> None:
    server.faults[SHARDS_NAME] = [_redirect(f"/moved/{SHARDS_NAME}", status)]
    assert store.read(SHARDS_NAME) == TEXT and server.requests[-1] == f"moved/{SHARDS_NAME}"
    server.faults[SHARDS_NAME] = [_redirect(f"{server.url}/moved/{SHARDS_NAME}", status)]
    assert store.read(SHARDS_NAME) == TEXT


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.1:{port}/x",
        "http://127.0.0.2:{port}/x",
        "http://localhost:{port}/x",
        "http://2130706433:{port}/x",
        "http://0x7f.1:{port}/x",
        "http://127.1:{port}/x",
        "http://0.0.0.0:{port}/x",
        "http://[::1]:{port}/x",
        "http://[::ffff:127.0.0.1]:{port}/x",
        "//127.0.0.2:{port}/x",
        "http://user:secret@127.0.0.1:{port}/x",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/x",
        "file:///etc/passwd",
        "ftp://host/x",
        "javascript:1",
        "http://[",
        "",
    ],
)
def test_a_redirect_to_a_place_that_is_not_public_is_refused_at_once(
    server: ShardServer, store: Store, slept: list[float], folder: Path, place: str
) -> None:
    with ShardServer(folder) as other:
        server.faults[SHARDS_NAME] = [_redirect(place.format(port=other.server_port))]
        with pytest.raises(UserError, match="tried once: it redirects to") as raised:
            store.read(SHARDS_NAME)
        assert not other.requests and not slept and "\n" not in str(raised.value)


def test_redirects_in_a_circle_end(server: ShardServer, store: Store, slept: list[float]) -> None:
    server.faults[SHARDS_NAME] = [_redirect(f"/{SHARDS_NAME}")] * 50
    with pytest.raises(UserError, match="tried once: it redirects more than 5 times"):
        store.read(SHARDS_NAME)
    assert not slept and len(server.requests) == 6


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_to_a_public_host_is_followed_without_the_password(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(http_bodies, "is_public", lambda _: True)
    with ShardServer(folder) as other:
        server.faults[SHARDS_NAME] = [_redirect(f"http://{host}:{other.server_port}/{SHARDS_NAME}")]
        store = Store(server.url.replace("//", "//me:secret@"))
        assert store.read(SHARDS_NAME) == TEXT
        assert "Authorization" in server.headers[0] and other.requests == [SHARDS_NAME]
        assert "Authorization" not in other.headers[0]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("127.1", False),
        ("0x7f000001", False),
        ("name", False),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(address) == expected


def test_no_release_of_fsspec_that_runs_code_is_allowed() -> None:
    """Up to 2026.4 its reference file system rendered templates outside of Jinja's sandbox."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = dict(re.findall(r"([\w[\]]+)>=([\d.]+)", " ".join(project["optional-dependencies"]["remote"])))
    for name in ("fsspec[http]", "s3fs"):
        assert tuple(map(int, floors[name].split("."))) >= (2026, 6)
