"""Stochastic video world models: joint-embedding prediction with a latent variable.

The names below are imported when they are first used, so that `import worldmodel` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldmodel.config import Config, load_config
    from worldmodel.nets.world_model import WorldModel
    from worldmodel.runs.trained_run import TrainedRun, load
    from worldmodel.training.loop import train

__version__ = "0.1.0"

__all__ = ["Config", "TrainedRun", "WorldModel", "__version__", "load", "load_config", "train"]

_MODULES = {
    "Config": "worldmodel.config",
    "TrainedRun": "worldmodel.runs.trained_run",
    "WorldModel": "worldmodel.nets.world_model",
    "load": "worldmodel.runs.trained_run",
    "load_config": "worldmodel.config",
    "train": "worldmodel.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
