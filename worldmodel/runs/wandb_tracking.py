"""wandb alongside metrics.jsonl. A run neither waits long for it nor fails because of it."""

import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_pipelines.errors import UserError, one_line, one_line_logger, printable
from worldmodel.runs.folder import RunFolder

logger = one_line_logger(__name__)

# wandb's names of modes, and the mode that each of them means here.
MODES = {
    "offline": "offline",
    "dryrun": "offline",
    "online": "online",
    "run": "online",
    "disabled": "disabled",
}
REACH_S, START_S, FINISH_S = 4.0, 10.0, 60.0
OFFLINE = "metrics go to metrics.jsonl and to wandb's files in the run folder, which `wandb sync` uploads"


class WandbRun:
    """An open run of wandb. A failure is logged as a warning and ends the use of wandb only."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._run is not None:
            try:
                self._run.log(dict(values), step=step)
            except Exception as error:
                logger.warning("wandb failed, the run continues without it: %s", one_line(error))
                self._run = None

    def finish(self) -> None:
        """Wait for uploads, at most FINISH_S seconds."""
        if self._run is not None:
            try:
                _within(FINISH_S, self._run.finish)
            except Exception as error:
                logger.warning("wandb did not finish: %s; `wandb sync` uploads what it wrote", one_line(error))
            self._run = None


def wandb_mode(chosen: str) -> str:
    """Return "offline", "online" or "disabled": that of WANDB_MODE, or `chosen` if that is empty or unset.

    Args:
        chosen: the value of tracking.wandb.

    Raises:
        UserError: WANDB_MODE is not a mode of wandb, or the mode is online and nobody is logged in.
    """
    given = os.environ.get("WANDB_MODE", "").strip().lower()
    if given and given not in MODES:
        raise UserError(f"WANDB_MODE={given!r} is not a mode of wandb: use offline, online or disabled")
    mode = MODES[given or chosen]
    if mode == "online" and not _credentials():
        name = "WANDB_MODE" if given else "tracking.wandb"
        raise UserError(f"{name}=online but nobody is logged in: run `wandb login` or use {name}=offline")
    return mode


def start_wandb(run: Path, chosen: str, project: str, settings: Mapping[str, Any]) -> WandbRun | None:
    """Start wandb for a run folder. Return None if it is disabled, not installed or fails to start.

    wandb is offline if its server is not reached within 2 * REACH_S seconds, or does not start a run within START_S.
    It never prompts.

    Args:
        chosen: the mode, if the variable WANDB_MODE does not set another one.
        project: wandb's project.
        settings: the config of the run, as nested dicts.

    Raises:
        UserError: as `wandb_mode`.
    """
    mode = wandb_mode(chosen)
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        logger.warning("wandb is not installed: metrics go to metrics.jsonl alone")
        return None
    _give_it_a_cache(run)

    def init(mode: Literal["online", "offline"]) -> WandbRun:
        quiet = wandb.Settings(silent=True, console="off", init_timeout=START_S)
        name, folder, values = printable(run.name), str(run), dict(settings)
        with _variable("WANDB_MODE", mode):  # wandb rejects an empty variable, whatever its argument
            return WandbRun(
                wandb.init(project=project, name=name, dir=folder, mode=mode, config=values, settings=quiet)
            )

    if mode == "online":
        try:
            _within(2 * REACH_S, _reach)  # looking up the server's name has no timeout
            return init("online")
        except Exception as error:
            logger.warning("wandb cannot be online: %s; %s", one_line(error), OFFLINE)
    try:
        return init("offline")
    except Exception as error:
        logger.warning("wandb does not start, metrics go to metrics.jsonl alone: %s", one_line(error))
        return None


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _reach() -> None:
    """Send any request to wandb's server. Raises OSError: it cannot be reached."""
    try:
        urllib.request.urlopen(_base_url(), timeout=REACH_S).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it is
    except (OSError, ValueError) as error:
        raise OSError(f"{_base_url()} cannot be reached ({one_line(error)})") from error


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Make a call in a thread, and raise its error. Raises TimeoutError: it takes longer, and is abandoned."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0]


def _credentials() -> bool:
    """Return True if wandb will find an API key. wandb's own check may prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(_base_url()).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _give_it_a_cache(run: Path) -> None:
    """Let wandb keep its cache in the run folder if HOME is not a writable folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("HOME", "")
    if not os.access(home, os.W_OK):
        os.environ.setdefault("WANDB_CACHE_DIR", str((RunFolder(run).wandb / "cache").absolute()))
