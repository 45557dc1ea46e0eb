"""Stochastic video world models: joint-embedding prediction with a latent variable.

    import worldmodel

    config = worldmodel.load_config("demo", ["train.steps=400"])
    run = worldmodel.load(worldmodel.train(config))
    metrics = worldmodel.evaluate(run)
    worldmodel.push(run, "owner/name")

Each name is imported when it is first used, so that `import worldmodel` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipelines.stream import open_videos
    from worldmodel.build import build_model
    from worldmodel.config import Config, load_config
    from worldmodel.evaluation.evaluate import evaluate
    from worldmodel.nets.world_model import WorldModel
    from worldmodel.runs.trained_run import TrainedRun, load
    from worldmodel.runs.travel import export, push
    from worldmodel.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "TrainedRun",
    "WorldModel",
    "__version__",
    "build_model",
    "evaluate",
    "export",
    "load",
    "load_config",
    "open_videos",
    "push",
    "train",
]

_MODULES = {
    "Config": "worldmodel.config",
    "TrainedRun": "worldmodel.runs.trained_run",
    "WorldModel": "worldmodel.nets.world_model",
    "build_model": "worldmodel.build",
    "evaluate": "worldmodel.evaluation.evaluate",
    "export": "worldmodel.runs.travel",
    "load": "worldmodel.runs.trained_run",
    "load_config": "worldmodel.config",
    "open_videos": "data_pipelines.stream",
    "push": "worldmodel.runs.travel",
    "train": "worldmodel.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
