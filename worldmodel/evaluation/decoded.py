"""Futures as pictures: sampled futures of held-out clips after the run's decoder, and the file of the decoder.

Legend: Q clips, S samples, B clips, D embedding dimensions, T frames of a segment, L frames of the future, C channels,
P pixels of a decoded side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import check_regular, remove, write_bytes
from worldmodel.config import MAX_CAMERAS, Config, EvaluationConfig, frame_channels
from worldmodel.evaluation.embed import Networks, embed_split, frozen
from worldmodel.evaluation.futures import num_futures, roll_out
from worldmodel.evaluation.illustrations import side_by_side
from worldmodel.evaluation.records import Axes, save_records
from worldmodel.nets.decoder import Decoder
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import DecoderFacts, read_decoder_facts, write_decoder_facts
from worldmodel.training.decoding import AT_ONCE, as_bytes, resized
from worldmodel.training.finite import not_finite

NUM_CLIPS = 3
NUM_SAMPLES_SHOWN = 6
MAX_FUTURE_FRAMES = 32
MAX_DECODER_BYTES = 2**30


@dataclass(frozen=True)
class DecodedFutures:
    """Q held-out clips, their real futures and sampled futures as pictures, uint8 with P pixels a side.

    The frames of several cameras are side by side: pictures are then [C, P, cameras * P], C 1 or 3.

    context [Q, T, C, P, P], which the model saw; real [Q, L, C, P, P], the frames that followed; decoded_real
    [Q, L, C, P, P], the same after encoder and decoder; samples [Q, at most 6, L, C, P, P]; mean and spread
    [Q, L, C, P, P], the mean and the standard deviation of each pixel over all `num_samples` samples. frame_numbers [L]
    counts the frames of the future from 1. step: the checkpoint's.
    """

    step: int
    num_samples: int
    frame_numbers: Annotated[np.ndarray, Axes("i", "frame")]
    context: Annotated[np.ndarray, Axes("u", "clip segment_frame channel height width")]
    real: Annotated[np.ndarray, Axes("u", "clip frame channel height width")]
    decoded_real: Annotated[np.ndarray, Axes("u", "clip frame channel height width")]
    samples: Annotated[np.ndarray, Axes("u", "clip sample frame channel height width")]
    mean: Annotated[np.ndarray, Axes("u", "clip frame channel height width")]
    spread: Annotated[np.ndarray, Axes("u", "clip frame channel height width")]

    def __post_init__(self) -> None:
        """Raise ValueError for frames that are not those of cameras side by side, as in a damaged file."""
        channels, height, width = self.context.shape[-3:]
        if channels not in (1, 3) or width % height or width > MAX_CAMERAS * height:
            raise ValueError(f"frames of shape {[channels, height, width]}, not squares side by side")


def decode_futures(networks: Networks, decoder: Decoder, step: int, sizes: EvaluationConfig) -> DecodedFutures:
    """Sample futures of a few test clips, spread evenly over the split, and decode them.

    Raises:
        UserError: the test split has too few clips.
    """
    seed, num_samples = sizes.seed, num_futures(networks.model, sizes.num_samples)
    with frozen(networks.model, networks.target_encoder):
        clips = embed_split(
            networks, "test", NUM_CLIPS, seed=seed, horizon=sizes.horizon, num_framed=NUM_CLIPS, progress=False
        )
        generator = torch.Generator().manual_seed(seed)
        futures = roll_out(networks, clips.state, clips.actions, num_samples, generator)
    num_frames = networks.layout.num_frames
    context, real = resized(clips.frames / 255, decoder.side_px).tensor_split([num_frames], dim=1)
    kept = torch.linspace(0, real.shape[1] - 1, min(real.shape[1], MAX_FUTURE_FRAMES)).round().long()

    def decoded(embeddings: Tensor, clip: int) -> Tensor:
        """[S, horizon, D] -> [S, L, C, P, P]"""
        return decode_paths(decoder, embeddings[None], context[clip, -1:])[0].flatten(1, 2)[:, kept]

    pictures: dict[str, list[Tensor]] = {"decoded_real": [], "samples": [], "mean": [], "spread": []}
    for clip, future in enumerate(futures):  # all samples of all clips would take much memory
        samples = decoded(future, clip)
        pictures["decoded_real"].append(decoded(clips.targets[clip, None], clip)[0])
        pictures["samples"].append(samples[:NUM_SAMPLES_SHOWN])
        pictures["mean"].append(samples.mean(dim=0))
        pictures["spread"].append(samples.std(dim=0, correction=0))
    shown = {"context": context, "real": real[:, kept], **{name: torch.stack(each) for name, each in pictures.items()}}
    return DecodedFutures(
        step=step,
        num_samples=futures.shape[1],
        frame_numbers=kept.numpy() + 1,
        **{name: side_by_side(as_bytes(frames), networks.layout.num_cameras) for name, frames in shown.items()},
    )


@torch.no_grad()
def decode_paths(decoder: Decoder, embeddings: Tensor, before: Tensor) -> Tensor:
    """Decode embeddings of successive segments [B, S, horizon, D] after the frames before them [B, C, P, P].

    Each segment comes after the last frame decoded before it.

    Returns: frames [B, S, horizon, T, C, P, P] in [0, 1], on the CPU.
    """
    device, num_samples = decoder.mean_picture.device, embeddings.shape[1]
    decoded = []
    paths = embeddings.flatten(0, 1).split(AT_ONCE)
    for path, last in zip(paths, before.repeat_interleave(num_samples, dim=0).split(AT_ONCE), strict=True):
        last, segments = last.to(device), []
        for embedding in path.to(device).unbind(1):
            segments.append(decoder(embedding, last).clamp(0, 1))
            last = segments[-1][:, -1]
        decoded.append(torch.stack(segments, dim=1).cpu())
    return torch.cat(decoded).unflatten(0, (-1, num_samples))


def store_futures(run: Path, networks: Networks, config: Config, step: int) -> DecodedFutures:
    """Decode futures by the decoder in a run folder, write them there for the report, and return them.

    Raises:
        UserError: the run has no decoder for the checkpoint at `step`, or the file cannot be written.
    """
    futures = decode_futures(networks, load_decoder(run, config, step, networks.device), step, config.evaluation)
    path = RunFolder(run).decoded
    try:
        save_records(path, [futures])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return futures


# -------------------------------------------------------------------------------------------------------------- file


def save_decoder(run: str | Path, decoder: Decoder, facts: DecoderFacts) -> None:
    """Write the weights of a decoder and its facts into a run folder. The facts are written last, and make it valid.

    Raises:
        UserError: they cannot be written.
    """
    folder = RunFolder(run)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    try:
        remove(folder.decoder_facts)
        write_bytes(folder.decoder, serialise(tensors))
    except OSError as error:
        raise UserError(f"cannot write {folder.decoder}: {error.strerror or error}") from error
    write_decoder_facts(Path(run), facts)


def stored_facts(run: str | Path, step: int) -> DecoderFacts | None:
    """Return the facts of a run's decoder; None if there is none for the checkpoint at `step`.

    Raises:
        UserError: the file is damaged.
    """
    facts = read_decoder_facts(Path(run))
    return facts if facts is not None and facts.get("step") == step else None


def load_decoder(run: str | Path, config: Config, step: int, device: str | torch.device = "cpu") -> Decoder:
    """Return the decoder of a run, for the checkpoint at `step`.

    Raises:
        UserError: the run has no decoder, or one of another checkpoint, or its file is damaged.
    """
    facts = read_decoder_facts(Path(run))
    if facts is None:
        raise UserError(f"the run {run} has no decoder: train one by `worldmodel decode --run {run}`")
    if facts.get("step") != step:
        raise UserError(
            f"the decoder of {run} was trained at step {facts.get('step')}, but the loaded checkpoint is from step "
            f"{step}: run `worldmodel decode --run {run}`"
        )
    path, data = RunFolder(run).decoder, config.data
    decoder = Decoder(config.model.embedding_dim, data.num_frames, frame_channels(data), data.size_px)
    try:
        check_regular(path)
        if path.stat().st_size > MAX_DECODER_BYTES:
            raise ValueError(f"it is larger than {MAX_DECODER_BYTES:,} bytes")
        tensors = deserialise(path.read_bytes())
        _check_tensors(decoder, tensors)
    except (OSError, SafetensorError, ValueError) as error:
        advice = f"run `worldmodel decode --run {run} --overwrite`"
        raise UserError(f"{path} is damaged, {advice}: {one_line(error)}") from error
    decoder.load_state_dict(tensors)
    return decoder.to(device).eval()


def _check_tensors(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for weights that do not fit the decoder, or are not finite."""
    expected = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise ValueError(f"it does not fit config.yaml, first in {name[:100]}")
    if bad := not_finite(tensors):
        raise ValueError(f"it holds weights that are not finite, first in {bad}")
