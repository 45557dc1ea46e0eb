"""Sources of clips: video files, or generated worlds with known laws. No model is known here.

To add a source, write a class that implements `worldmodel.sources.source.Source` in a file of this folder. Add it to
SOURCES under the name that `data.source` has in the config.
"""

from worldmodel.config import Config
from worldmodel.sources.causal import CausalSource
from worldmodel.sources.moving_mnist import MovingMnistSource
from worldmodel.sources.source import Source
from worldmodel.sources.videos import VideosSource

SOURCES: dict[str, type[Source]] = {
    "videos": VideosSource,
    "moving_mnist": MovingMnistSource,
    "causal": CausalSource,
}


def make_source(config: Config) -> Source:
    """Return the source of a config. It reads nothing yet, and holds what it has read from then on."""
    return SOURCES[config.data.source](config.data, seed=config.seed, evaluation_seed=config.evaluation.seed)
