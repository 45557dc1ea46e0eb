"""Sources of clips: video files, or generated worlds with known laws. No model is known here.

To add a source, write a class that implements `worldmodel.sources.source.Source` in a file of this folder, and its
entry in `DataConfig` (worldmodel/config/data.py). The class is offered `data`, its section, `seed` and
`evaluation_seed` (worldmodel/parts.py).
"""

from typing import get_args

from data_pipelines.errors import UserError
from worldmodel import parts
from worldmodel.config import Config, frame_channels
from worldmodel.sources.source import Content, Source


def make_source(config: Config) -> Source:
    """Return the source of a config. It reads nothing yet, and holds what it has read from then on.

    Raises:
        UserError: a source from outside of the project cannot be loaded, or differs from the config.
    """
    data, seeds = config.data, {"seed": config.seed, "evaluation_seed": config.evaluation.seed}
    source: Source = parts.build("data.source", data, Source, data=data, **seeds)
    if source.content not in get_args(Content):
        raise UserError(f"data.source={data.source}: content={source.content!r} must be one of {get_args(Content)}")
    described, shape = (frame_channels(data), data.size_px, data.size_px), tuple(source.frame_shape)
    if shape != described:
        raise UserError(
            f"data.source={data.source} has frames of C, H, W = {shape}, the config describes {described}: set "
            "data.channels and data.size_px"
        )
    return source
