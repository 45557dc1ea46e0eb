"""Logging of a run: metrics.jsonl always, and wandb."""

import json
import logging
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipelines.files import write_text
from worldmodel.config import Config
from worldmodel.wandb_tracking import start_wandb

logger = logging.getLogger(__name__)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last row that a kill cut short is dropped."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            logger.warning("%s: dropped a row that is cut short", path)
    return rows


class Tracker:
    """Writes rows of numbers to metrics.jsonl and to wandb.

    wandb is offline unless config.tracking.wandb or the environment's WANDB_MODE says otherwise; it never prompts.
    On a resume, rows after `start_step` are dropped: the steps behind them run again.

    Raises:
        UserError: as `worldmodel.wandb_tracking.wandb_mode`.
    """

    def __init__(self, run: Path, config: Config, start_step: int) -> None:
        rows = [row for row in read_metrics(run) if row["step"] <= start_step] if start_step else []
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._wandb = start_wandb(run, config)

    def log(self, split: str, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with; "-" for what is not installed."""
    found = {"python": platform.python_version()}
    for name in ("worldmodel", "torch", "accelerate", "av", "decord", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found
