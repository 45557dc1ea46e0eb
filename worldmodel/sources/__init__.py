"""Sources of clips: video files, or generated worlds with known laws. No model is known here.

To add a source, write a class that implements `worldmodel.sources.source.Source` in a file of this folder. Add it to
SOURCES under the name that `data.source` has in the config.
"""

from typing import get_args

from data_pipelines.errors import UserError
from worldmodel import outside
from worldmodel.config import Config, ExternalData
from worldmodel.sources.causal import CausalSource
from worldmodel.sources.moving_mnist import MovingMnistSource
from worldmodel.sources.source import Content, Source
from worldmodel.sources.videos import VideosSource

SOURCES: dict[str, type[Source]] = {
    "videos": VideosSource,
    "moving_mnist": MovingMnistSource,
    "causal": CausalSource,
}


def make_source(config: Config) -> Source:
    """Return the source of a config. It reads nothing yet, and holds what it has read from then on.

    Raises:
        UserError: a source from outside of the project cannot be loaded, or differs from the config.
    """
    data, seeds = config.data, {"seed": config.seed, "evaluation_seed": config.evaluation.seed}
    return _outside(data, **seeds) if isinstance(data, ExternalData) else SOURCES[data.source](data, **seeds)


def _outside(data: ExternalData, **seeds: int) -> Source:
    source: Source = outside.make("data.source", data.source, data.options, Source, data=data, **seeds)
    if source.content not in get_args(Content):
        raise UserError(f"data.source={data.source}: content={source.content!r} must be one of {get_args(Content)}")
    described, shape = (data.channels, data.size_px, data.size_px), tuple(source.frame_shape)
    if shape != described:
        raise UserError(
            f"data.source={data.source} has frames of C, H, W = {shape}, the config describes {described}: set "
            "data.channels and data.size_px"
        )
    return source
