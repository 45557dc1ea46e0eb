"""The segments of clips, as things that can be decoded, stored and found again one by one.

Clips may overlap, and clips for more steps of prediction have more segments. A segment that several clips share is
then decoded once. Its key is a hash of the video's content and of its first frame.

Legend: N clips, S segments of a clip, M segments.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_pipelines.clip_decoder import ClipSet, clips_of
from data_pipelines.clips import Ints
from data_pipelines.contents import content_of
from data_pipelines.index import VideoIndex

Keys = NDArray[np.uint64]

FRAME_STEP = 0x9E37_79B9_7F4A_7C15
"""Odd, so that the keys of a video's segments differ."""


@dataclass(frozen=True)
class Segments:
    """All segments that clips of a set may consist of.

    alone: clips of one segment each, whose starts include those of all segments of the set's clips. Ids are theirs.
    videos: [videos], a number for the content of each video.
    """

    clip_set: ClipSet
    alone: ClipSet
    videos: Keys

    def ids(self, clips: Ints) -> Ints:
        """Return the ids [N, S] of the segments of clips [N]."""
        spec, table, alone = self.clip_set.spec, self.clip_set.table, self.alone.table
        videos = table.videos_of(clips)
        starts = np.arange(spec.num_segments) * spec.num_frames * spec.frame_stride
        since_first = (table.starts_of(clips) - table.first_frame[videos])[:, None] + starts
        return alone.first_clip[videos][:, None] + since_first // alone.step

    def keys(self, ids: Ints) -> Keys:
        """Return the keys of segments by their ids; both have the same shape."""
        table, flat = self.alone.table, ids.ravel()
        keys = self.videos[table.videos_of(flat)] + table.starts_of(flat).astype(np.uint64) * np.uint64(FRAME_STEP)
        return keys.reshape(ids.shape)


def segments_of_clips(clip_set: ClipSet) -> Segments:
    """Return the segments of the clips of a set."""
    spec = clip_set.spec
    step = math.gcd(spec.step, spec.num_frames * spec.frame_stride)
    alone = replace(spec, num_segments=1, clip_step=step)
    return Segments(
        clip_set,
        replace(clip_set, spec=alone, table=clips_of(clip_set.index, alone)),
        np.array([_number_of_content(clip_set.index, row) for row in range(len(clip_set.index.videos))], np.uint64),
    )


def _number_of_content(index: VideoIndex, row: int) -> int:
    """Return 64 bits of a hash of a video's content; without a digest, of its facts and its path."""
    video = index.videos[row]
    text = video.digest or f"{video.shard}\0{video.path}\0{content_of(video)}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")
