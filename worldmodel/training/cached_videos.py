"""Videos as the tokens of a frozen encoder, from a cache on disk (the key `train.encoder_cache`).

A frozen backbone gives the same tokens for a segment in every epoch. They are computed once, before training, and later
epochs neither decode videos nor run the backbone: only what learns is computed. What is stored is what pooling needs
(`PretrainedEncoder.frozen_part`), by the weights of the backbone, the content of the video and the first frame of the
segment. A batch of such clips has tokens [B, S * G, P, E] in place of pixels [B, S * T, C, H, W].

Legend: B clips, S segments of a clip, T frames, C channels, H = W pixels, G times of a segment, P patches of one time,
E dimensions of a token.
"""

import json
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from tqdm.auto import tqdm

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.clip_decoder import ClipSet, labels_of
from data_pipelines.clips import Ints
from data_pipelines.decoders import resolve_decoder
from data_pipelines.errors import UserError
from data_pipelines.segments import Keys, Segments, segments_of_clips
from data_pipelines.splits import Split
from data_pipelines.stream import VideoStream, clips_of_pass, read_clips, share_of_pass
from data_pipelines.transforms import on_device, to_float
from worldmodel import parts
from worldmodel.config import Config, PretrainedConfig, VideosConfig
from worldmodel.nets.encoders import Encoder
from worldmodel.nets.parallel import max_over_processes
from worldmodel.nets.pretrained import PretrainedEncoder
from worldmodel.runs.checkpoint import hash_of_tensors
from worldmodel.sources.source import EVALUATION_BATCH, Source
from worldmodel.sources.videos import VideosSource, read_settings
from worldmodel.training.launch import from_main_process
from worldmodel.training.session import Interrupted, Stop
from worldmodel.training.token_store import TokenStore

VERSION = 1  # increase it with any change to stored tokens
SEGMENTS_AT_ONCE = 16
PART_BYTES = 2**27
GB = 10**9


def _never() -> int:
    return 0


def cached_videos(config: Config, source: Source, accelerator: Accelerator, stop: Stop) -> Source:
    """Return the source with the tokens of the frozen encoder in place of pixels, if the config asks for it.

    Raises:
        UserError: the encoder cannot be built, or the folder of the cache cannot be used.
    """
    if config.train.encoder_cache is None:
        return source
    assert isinstance(source, VideosSource), "the config is checked for this"
    return CachedVideos(config, source, accelerator, stop)


class CachedVideos(VideosSource):
    """Videos whose clips are tokens of a frozen encoder (worldmodel.sources.source.Source).

    Missing tokens are computed when a stream is opened or a split is evaluated. Clips whose law needs pixels are
    decoded as usual.
    """

    def __init__(self, config: Config, source: VideosSource, accelerator: Accelerator, stop: Stop) -> None:
        data, encoder = config.data, config.model.encoder
        assert isinstance(data, VideosConfig) and isinstance(encoder, PretrainedConfig) and config.train.encoder_cache
        super().__init__(data, seed=config.seed, evaluation_seed=config.evaluation.seed)
        self._indexes = source._indexes
        self._accelerator, self._stop = accelerator, stop
        self._refine_clips = config.train.refine_clips
        shape = {"channels": data.channels, "num_frames": data.num_frames, "size_px": data.size_px}
        network: Any = parts.build_module("model.encoder.name", encoder, Encoder, **shape)
        self._encoder: PretrainedEncoder = network
        self._failed = np.empty(0, np.uint64)
        blank = torch.zeros(1, data.num_frames, data.channels, data.size_px, data.size_px)
        with torch.no_grad():
            example = self._encoder.frozen_part(blank)[0].numpy()
        about = {
            "version": VERSION,
            "weights": weights_hash(self._encoder),
            "precision": accelerator.mixed_precision,
            **shape,
            "frame_stride": data.frame_stride,
            "fps": data.fps,
            "decoder": resolve_decoder(data.decoder),
        }
        root, max_bytes = Path(config.train.encoder_cache), config.train.encoder_cache_gb * GB
        self._store = TokenStore(root, about, example.shape, example.dtype, max_bytes)

    def training_stream(
        self, steps: int, *, rank: int, world_size: int, device: torch.device, clip_step: int | None = None
    ) -> BatchStream:
        """Compute what is missing of all clips, or, with `clip_step`, of those that refinement embeds."""
        stream = self.video_stream(steps, rank=rank, world_size=world_size, clip_step=clip_step)
        segments, clips = segments_of_clips(stream.clip_set), np.arange(stream.clip_set.table.num_clips)
        if clip_step is not None:
            count = -(-self._refine_clips // self._data.batch_size)
            clips = np.concatenate([each for each, _ in islice(stream.places(), count)])
        alone = self._accelerator.num_processes == 1
        self._fill(segments, clips, self._stop if alone or world_size > 1 else _never, rank, world_size)
        return CachedStream(stream, segments, self._store)

    def evaluation_batches(
        self, split: Split, num_clips: int, horizon: int = 1, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        if self.known_law(split, horizon) is not None:
            yield from super().evaluation_batches(split, num_clips, horizon, rank=rank, world_size=world_size)
            return
        clip_set = self.clip_set(split, horizon)
        segments = segments_of_clips(clip_set)
        clips = clips_of_pass(clip_set.table.num_clips, num_clips, rank, world_size)
        self._fill(segments, clips, _never)
        for first in range(0, len(clips), EVALUATION_BATCH):
            ids = clips[first : first + EVALUATION_BATCH]
            batch = read_batch(segments, self._store, ids, np.arange(len(ids)))
            if len(batch["video"]):
                yield batch

    def _fill(self, segments: Segments, clips: Ints, stop: Stop, rank: int = 0, world_size: int = 1) -> None:
        """Compute the tokens of clips that are missing. Several ranks do a share each, and call it together.

        Raises:
            Interrupted: `stop` asked for it. Computed tokens are stored.
            UserError: the limit of the cache is too low, too many videos do not decode, tokens are not finite, or the
                ranks do not share the folder.
        """
        store, accelerator = self._store, self._accelerator
        store.refresh()
        ids = np.unique(segments.ids(clips))
        keys = segments.keys(ids)
        _, first = np.unique(keys, return_index=True)  # copies of a video have the same keys
        is_first = np.zeros(len(ids), dtype=bool)
        is_first[first] = True
        missing = ids[is_first & ~store.has(keys) & ~np.isin(keys, self._failed)]
        if world_size > 1:  # other programs may write to the folder at the same time
            [missing] = broadcast_object_list([missing])
        if len(missing):
            store.check_room(len(missing))
            accelerator.print(describe(segments.alone, len(ids), len(missing), store))
            self._encoder.to(accelerator.device)
            self._compute(segments, missing, stop, rank, world_size)
            self._encoder.to("cpu")
            keys_of_missing = segments.keys(missing)
            self._failed = np.concatenate([self._failed, keys_of_missing[~store.has(keys_of_missing)]])
        if world_size > 1 and (seen := int(store.has(keys).sum())) != from_main_process(accelerator, seen):
            raise UserError(f"not all processes see the same files in {store.folder}: use a folder that hosts share")

    def _compute(self, segments: Segments, missing: Ints, stop: Stop, rank: int, world_size: int) -> None:
        """Store the tokens of missing segments. Ranks wait for each other after every part."""
        per_part = max(1, PART_BYTES // self._store.bytes_per_segment)
        rounds = -(-len(missing) // world_size // per_part)  # of the largest share
        own = missing[share_of_pass(len(missing), rank, world_size)]
        with closing(self._parts(segments, own, per_part, stop)) as computed:
            for _ in range(rounds):
                if part := next(computed, None):
                    self._store.add(*part)
                caught = max_over_processes(stop()) if world_size > 1 else stop()
                if caught:
                    raise Interrupted(caught)
        self._store.refresh()

    def _parts(self, segments: Segments, ids: Ints, per_part: int, stop: Stop) -> Generator[tuple[Keys, NDArray[Any]]]:
        """Yield the keys and tokens of segments, `per_part` at a time; after a signal, those that are done."""
        settings = read_settings(self._data, SEGMENTS_AT_ONCE)
        keys: list[Keys] = []
        tokens: list[NDArray[Any]] = []
        batches = read_clips(segments.alone, ids, settings, ranks=self._accelerator.num_processes)
        shown = tqdm(total=len(ids), desc="caching", unit="segment", disable=not self._accelerator.is_main_process)
        with shown, closing(batches):
            for batch in batches:
                if len(batch["video"]):
                    keys.append(segments.keys(batch["clip_id"].numpy()))
                    tokens.append(self._encode(batch))
                shown.update(len(batch["video"]))
                if sum(map(len, keys)) >= per_part or (keys and stop()):
                    yield np.concatenate(keys), np.concatenate(tokens)
                    keys, tokens = [], []
                if stop():
                    return
        if keys:
            yield np.concatenate(keys), np.concatenate(tokens)

    def _encode(self, batch: Batch) -> NDArray[Any]:
        video = to_float(on_device(batch["video"], self._accelerator.device))
        with torch.no_grad(), self._accelerator.autocast():
            tokens = self._encoder.frozen_part(video).cpu()
        if not tokens.isfinite().all():
            raise UserError("tokens of the encoder are not finite, or too large for fp16: train without a cache")
        return tokens.numpy()


class CachedStream(BatchStream):
    """The batches of a stream of videos, with stored tokens in place of pixels."""

    def __init__(self, stream: VideoStream, segments: Segments, store: TokenStore) -> None:
        self._stream, self._segments, self._store = stream, segments, store
        self.fingerprint, self.batches_per_epoch = stream.fingerprint, stream.batches_per_epoch

    def batches(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        for clips, rows in self._stream.places(start_batch):
            yield read_batch(self._segments, self._store, clips, rows)


def read_batch(segments: Segments, store: TokenStore, clips: Ints, rows: Ints) -> Batch:
    """Return the clips [B] whose segments are all stored, at their rows [B] of the batch."""
    keys = segments.keys(segments.ids(clips))
    stored = store.has(keys).all(axis=1)
    keys, clip_id = keys[stored], torch.from_numpy(clips[stored])
    tokens = torch.from_numpy(store.read(keys.ravel()))
    return {
        "video": tokens.unflatten(0, keys.shape).flatten(1, 2),
        "clip_id": clip_id,
        "row": torch.from_numpy(rows[stored]),
        "labels": labels_of(segments.clip_set, clip_id),
    }


def describe(alone: ClipSet, num_segments: int, num_missing: int, store: TokenStore) -> str:
    """Return what the tokens of these segments take on disk, in all and for each hour of video."""
    size = num_segments * store.bytes_per_segment
    line = f"caching {num_missing:,} of {num_segments:,} segments in {store.folder}, {size / GB:.3g} GB in all"
    ranges = zip(alone.index.videos, alone.index.frame_ranges, strict=True)
    hours = sum((stop - start) / video.fps if video.fps else math.nan for video, (start, stop) in ranges) / 3600
    return line if math.isnan(hours) else f"{line}, {size / GB / hours:.3g} GB per hour of video"


def weights_hash(encoder: PretrainedEncoder) -> str:
    """Return a hash of everything that the frozen part of an encoder computes from."""
    backbone = encoder.backbone
    ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    settings = {key: value for key, value in backbone.config.to_dict().items() if key not in ignored}
    kind = type(backbone).__name__, encoder.pool is not None, json.dumps(settings, sort_keys=True, default=str)
    return hash_of_tensors({**backbone.state_dict(), "mean": encoder.mean, "std": encoder.std}, repr(kind))
