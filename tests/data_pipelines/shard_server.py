"""An HTTP server on the loopback that hands out a folder of shards, and misbehaves when told to."""

import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STALL_S = 20.0  # at most; it ends with the server


Fault = int | str | Callable[[BaseHTTPRequestHandler], None]


class ShardServer(ThreadingHTTPServer):
    """requests: names in the order in which they were asked for.

    faults: for a name, what to do instead of answering its next requests: an HTTP status, "reset" (half the bytes, then
    the connection), "stall" (half, then nothing), "short" (half as if it were all), "long", "corrupt", "slow" (1 s), or
    a function that answers with the handler, after which the connection is closed.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []  # of these requests
        self.faults: dict[str, list[Fault]] = {}
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "ShardServer":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ShardServer

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests.append(name)
        self.server.headers.append(dict(self.headers))
        faults = self.server.faults.get(name)
        if not faults:
            super().do_GET()
            return
        fault = faults.pop(0)
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if callable(fault):
            self.close_connection = True
            fault(self)
            return
        if fault == "slow":
            time.sleep(1)
            super().do_GET()
            return
        whole = Path(self.translate_path(self.path)).read_bytes()
        half = whole[: len(whole) // 2]
        body = {"short": half, "long": whole + b"x", "corrupt": half + bytes(len(whole) - len(half))}.get(fault, half)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if fault in ("short", "long", "corrupt") else len(whole)))
        self.end_headers()
        self.wfile.write(body)
        if fault == "stall":
            self.server.closing.wait(STALL_S)
        self.close_connection = fault in ("reset", "stall")

    def log_message(self, *_: Any) -> None:
        pass
