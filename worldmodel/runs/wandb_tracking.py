"""wandb alongside metrics.jsonl: a run neither waits long for it nor ends because of it."""

import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_pipelines.errors import UserError, one_line, one_line_logger, printable
from worldmodel.config import Config, to_dict

logger = one_line_logger(__name__)

# wandb's own words for modes, and what they are here.
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
    """A run of wandb, open until `finish`. A failure is a warning, and ends the use of wandb alone."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._run is not None:
            try:
                self._run.log(dict(values), step=step)
            except Exception as error:
                logger.warning("wandb failed, the run continues without it: %s", _told(error))
                self._run = None

    def finish(self) -> None:
        """Wait for what is to be uploaded, at most FINISH_S seconds."""
        if self._run is not None:
            try:
                _within(FINISH_S, self._run.finish)
            except Exception as error:
                logger.warning("wandb did not finish: %s; `wandb sync` uploads what it wrote", _told(error))
            self._run = None


def wandb_mode(config: Config) -> str:
    """Return "offline", "online" or "disabled": what WANDB_MODE says, or tracking.wandb where that is empty or unset.

    Raises:
        UserError: WANDB_MODE is none of wandb's modes, or wandb is to be online and nobody is logged in.
    """
    given = os.environ.get("WANDB_MODE", "").strip().lower()
    if given and given not in MODES:
        raise UserError(f"WANDB_MODE={given!r} is not a mode of wandb: use offline, online or disabled")
    mode = MODES[given or config.tracking.wandb]
    if mode == "online" and not _credentials():
        name = "WANDB_MODE" if given else "tracking.wandb"
        raise UserError(f"{name}=online but nobody is logged in: run `wandb login` or use {name}=offline")
    return mode


def start_wandb(run: Path, config: Config) -> WandbRun | None:
    """Start wandb for a run folder; None where it is disabled, not installed or does not start.

    Where the server is not reached within 2 * REACH_S seconds, or starts no run within START_S, wandb is offline.

    Raises:
        UserError: as `wandb_mode`.
    """
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        logger.warning("wandb is not installed: metrics go to metrics.jsonl alone")
        return None
    _give_it_a_cache(run)

    def init(mode: Literal["online", "offline"]) -> WandbRun:
        settings = wandb.Settings(silent=True, console="off", init_timeout=START_S)
        name, project = printable(run.name), config.tracking.project
        os.environ["WANDB_MODE"] = mode  # wandb refuses an empty one, whatever else it is given
        return WandbRun(
            wandb.init(project=project, name=name, dir=str(run), mode=mode, config=to_dict(config), settings=settings)
        )

    if mode == "online":
        try:
            _within(2 * REACH_S, _reach)  # the name of the server is looked up without a bound
            return init("online")
        except Exception as error:
            logger.warning("wandb cannot be online: %s; %s", _told(error), OFFLINE)
    try:
        return init("offline")
    except Exception as error:
        logger.warning("wandb does not start, metrics go to metrics.jsonl alone: %s", _told(error))
        return None


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _reach() -> None:
    """Ask wandb's server for anything. Raises OSError: there is no way to it."""
    try:
        urllib.request.urlopen(_base_url(), timeout=REACH_S).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        raise OSError(f"{_base_url()} cannot be reached ({one_line(error)})") from error


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Make a call in a thread. Raises what it raises; TimeoutError: it takes longer, and is left behind."""
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


def _told(error: Exception) -> str:
    return one_line(error)


def _credentials() -> bool:
    """Return True where wandb will find an API key. (Asking wandb itself may end in a prompt.)"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(_base_url()).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _give_it_a_cache(run: Path) -> None:
    """Let wandb keep its cache in the run folder where HOME names no folder that can be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("HOME", "")
    if not os.access(home, os.W_OK):
        os.environ.setdefault("WANDB_CACHE_DIR", str((run / "wandb" / "cache").absolute()))
