"""Video world models whose futures are many: joint-embedding prediction with a latent variable."""

from worldmodel.nets.world_model import WorldModel
from worldmodel.runs.trained_run import TrainedRun, load

__version__ = "0.1.0"

__all__ = ["TrainedRun", "WorldModel", "__version__", "load"]
