"""The source of clips: the section `data`, a choice by `data.source`."""

import dataclasses
import os
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from worldmodel.config.kinds import (
    KEYS,
    Choice,
    Count,
    CountFrom0,
    Fraction,
    Options,
    OutsideName,
    PathText,
    Repeat,
    RepeatFrom0,
    Samples,
    SamplesFrom2,
    Seconds,
    Text,
    TextOrList,
)

ImageSize = Annotated[int, Field(strict=True, ge=8, le=4_096)]
CropScale = Annotated[float, Field(strict=True, ge=0.05, le=1)]
HueShift = Annotated[float, Field(strict=True, ge=0, le=0.5)]
BlurWidth = Annotated[float, Field(strict=True, ge=0, le=16)]
Edge = Annotated[float, Field(strict=True, allow_inf_nan=False)]
MAX_FPS = 1_000
MAX_CAMERAS = 16


@dataclass(frozen=True, config=KEYS)
class AugmentConfig:
    """Random changes of training clips, off by default. All frames of a clip are changed alike, and only the noise
    differs between pixels and frames. Of `data.source: images`, the images of a clip are changed independently.
    Evaluation, refinement and rollouts see the clips as they are. Sources with a known law have no augmentation."""

    crop_min_scale: CropScale = 1.0
    """Least side of a square crop, as a fraction of the frame's side. The side is uniform between it and 1, and the
    crop is resized to the frame. 1: no crop."""
    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Axes along which a clip is mirrored, each with probability 1/2. horizontal: left and right change places."""
    brightness: Fraction = 0.0
    """Greatest relative change of all values: they are multiplied by 1 - brightness to 1 + brightness."""
    contrast: Fraction = 0.0
    """Greatest relative change of the differences from the clip's mean luma."""
    saturation: Fraction = 0.0
    """Greatest relative change of the differences of a pixel's channels from its luma. Needs three channels."""
    hue: HueShift = 0.0
    """Greatest rotation of the hue, in turns: 0.5 reaches the complementary colour. Needs three channels."""
    blur: BlurWidth = 0.0
    """Greatest standard deviation of a Gaussian blur, in pixels of the resized frame."""
    noise: Fraction = 0.0
    """Greatest standard deviation of Gaussian noise, independent at each pixel and frame. White is 1."""
    position_labels: Annotated[dict[Text, tuple[Edge, Edge, Edge, Edge]], Field(max_length=1_000)] = dataclasses.field(
        default_factory=dict
    )
    """Labels that are positions in the frame, pairs of x and y. Crop and flip move them with the pixels. A label has
    its values at the left, right, top and bottom edge of the resized and cropped frame: `{state: [0, 1, 0, 1]}`.
    Counted in its pixels, of which the first is 0, a 64 px frame has the edges `[-0.5, 63.5, -0.5, 63.5]`."""

    @property
    def changes_geometry(self) -> bool:
        """True if pixels move."""
        return self.crop_min_scale < 1 or self.flip != "none"

    @property
    def changes_chroma(self) -> bool:
        """True if the channels of a pixel are mixed."""
        return self.saturation > 0 or self.hue > 0

    @property
    def active(self) -> dict[str, float | str]:
        """The keys that change clips, with their values; empty if augmentation is off."""
        off = vars(AugmentConfig())
        return {key: value for key, value in vars(self).items() if key != "position_labels" and value != off[key]}


@dataclass(frozen=True, config=KEYS)
class RootConfig:
    """One of several roots."""

    path: PathText
    """A folder, as `data.root`. No URL."""
    weight: Annotated[float, Field(strict=True, gt=0, le=1e6)] = 1.0
    """Share of the training clips, relative to the weights of the other roots."""


Roots = Annotated[PathText | tuple[RootConfig, ...], TextOrList()]
Cameras = Annotated[Text | Annotated[tuple[Text, ...], Field(max_length=MAX_CAMERAS)] | None, TextOrList()]


@dataclass(frozen=True, config=KEYS)
class VideosConfig:
    """Clips of video files.

    A clip is a row of consecutive segments of `num_frames` frames, `frame_stride` source frames apart: the context x,
    the target x+ and the later x++, which the posterior sees. With two segments the posterior sees the target.
    """

    built_by: ClassVar[str] = "worldmodel.sources.videos:VideosSource"
    content: ClassVar[Literal["frames", "factors"]] = "frames"
    max_steps: ClassVar[int | None] = None
    oracle_label: ClassVar[str | None] = "velocity_change"

    source: Literal["videos"] = "videos"
    """Name of the source."""
    root: Roots = "data/videos"
    """A folder of video files or of tar shards, a LeRobot data set, or the URL of shards (http, s3, ...). Its
    subfolders train/, selection/ (or validation/ or val/) and test/ are the splits where they exist. Several folders
    are a list with weights: `[{path: a, weight: 2}, {path: b}]`."""
    format: OutsideName | None = None
    """`package.module:Class`, a format of data sets in the user's own code. null: the format is detected."""
    camera: Cameras = None
    """Camera of a LeRobot data set whose videos are read. null: the first by name. A list of up to 16, such as
    `[front, wrist]`: the frames of several cameras at the same time, as the channels of one frame, camera after camera
    in this order."""
    remote_cache_dir: PathText | None = None
    """Folder in which shards from a URL are stored. null: in the user's cache."""
    remote_cache_mb: Count = 16_384
    """Size limit of this folder, MiB. The least recently used shards are evicted."""
    size_px: ImageSize = 64
    """Side of the square frames, pixels: the short side is resized to it, the centre is cropped."""
    channels: Literal[1, 3] = 3
    """1 is luma, 3 is RGB, of each camera: a frame of n cameras has n times as many."""
    num_segments: Literal[2, 3] = 3
    """Segments per prediction step: context and target (2), plus a later one (3). Each further rollout step needs one
    more."""
    history_segments: RepeatFrom0 = 0
    """Segments before the context that the model remembers, for worlds of which one segment does not show the whole
    state. A transformer reads their embeddings and the actions between them, for editor, prior and posterior. Clips are
    longer by these segments. 0: the model reads the context alone."""
    num_frames: Repeat = 3
    """Frames per segment."""
    frame_stride: Count = 1
    """Source frames from one frame of a segment to the next."""
    clip_step: Count | None = None
    """Source frames between the starts of successive clips of a video. null: clips do not overlap."""
    fps: Annotated[float, Field(strict=True, gt=0, le=MAX_FPS)] | None = None
    """Frames per second to which videos are resampled first, by their timestamps; `frame_stride` and `clip_step` then
    count resampled frames. null: frames as stored."""
    batch_size: SamplesFrom2 = 128
    """Clips per global batch, over all processes."""
    num_lanes: Samples = 32
    """Independent sequential readers. Divides `batch_size`; the number of processes divides it."""
    pool_clips: Count = 1024
    """Limit of decoded clips that wait in memory to be shuffled, over all lanes."""
    cache_mb: CountFrom0 = 0
    """Memory per training process for decoded clips that later epochs reuse, MiB. Other clips are decoded again."""
    num_workers: RepeatFrom0 = 1
    """Decoding processes per training process. 0: the training process decodes."""
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    """Library that decodes videos. auto: the first of these that is installed."""
    decode_timeout_s: Seconds = 60.0
    """Time limit for decoding one clip, seconds. A slower decoding process is replaced and the frame skipped."""
    max_bad_fraction: Fraction = 0.1
    """Fraction of unreadable videos above which a run stops."""
    max_frame_px: Count = 2**26
    """Limit of the pixels in a frame. A file with larger frames is skipped before it is decoded, which could exhaust
    the memory. 8K video has 2^25."""
    action_label: Text = "action"
    """Per-frame label with the action taken at each frame, which leads to the next frame. Read with
    `model.action_dim`."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training clips."""

    @property
    def paths(self) -> list[str]:
        """The paths of all roots."""
        return [self.root] if isinstance(self.root, str) else [root.path for root in self.root] or [""]

    @property
    def base(self) -> str:
        """The folder or URL that all videos are in: the root, or what the paths of several roots have in common."""
        return self.root if isinstance(self.root, str) else os.path.commonpath(map(os.path.abspath, self.paths))

    @property
    def cameras(self) -> tuple[str, ...]:
        """The named cameras; none: the first by name, or videos without cameras."""
        return () if self.camera is None else (self.camera,) if isinstance(self.camera, str) else self.camera

    @property
    def place(self) -> str:
        """The root as messages show it; several are joined by commas."""
        return ", ".join(self.paths)


@dataclass(frozen=True, config=KEYS)
class MovingMnistConfig:
    """Stochastic Moving-MNIST, drawn afresh: three segments of three frames, 64 px, one channel."""

    built_by: ClassVar[str] = "worldmodel.sources.moving_mnist:MovingMnistSource"
    content: ClassVar[Literal["frames", "factors"]] = "frames"
    max_steps: ClassVar[int | None] = 1
    oracle_label: ClassVar[str | None] = "velocity_change"
    size_px: ClassVar[int] = 64
    channels: ClassVar[int] = 1
    num_segments: ClassVar[int] = 3
    history_segments: ClassVar[int] = 0
    num_frames: ClassVar[int] = 3
    frame_stride: ClassVar[int] = 1
    augment: ClassVar[AugmentConfig] = AugmentConfig()

    source: Literal["moving_mnist"] = "moving_mnist"
    """Name of the source."""
    mnist_dir: PathText | None = None
    """Folder with the IDX files of MNIST. null: the digits bundled with scikit-learn."""
    setting: Literal["A", "B"] = "A"
    """Axis whose velocity changes. A: either, with equal probability. B: more often y for larger digits."""
    batch_size: SamplesFrom2 = 128
    """Clips per global batch, over all processes."""


@dataclass(frozen=True, config=KEYS)
class CausalConfig:
    """Pairs of observations of six known factors, drawn afresh: three segments of one observation, six numbers each."""

    built_by: ClassVar[str] = "worldmodel.sources.causal:CausalSource"
    content: ClassVar[Literal["frames", "factors"]] = "factors"
    max_steps: ClassVar[int | None] = 1
    oracle_label: ClassVar[str | None] = "change"
    size_px: ClassVar[int] = 1
    channels: ClassVar[int] = 6
    num_segments: ClassVar[int] = 3
    history_segments: ClassVar[int] = 0
    num_frames: ClassVar[int] = 1
    frame_stride: ClassVar[int] = 1
    augment: ClassVar[AugmentConfig] = AugmentConfig()

    source: Literal["causal"] = "causal"
    """Name of the source."""
    change: Literal["isotropic", "anisotropic", "diagonal", "heteroscedastic", "multimodal"] = "heteroscedastic"
    """Distribution of the difference between the factors of a pair."""
    batch_size: SamplesFrom2 = 128
    """Clips per global batch, over all processes."""


@dataclass(frozen=True, config=KEYS)
class SameClassConfig:
    """Two different images of one class."""

    name: Literal["same_class"] = "same_class"
    """Name of the relation."""
    label: Text = "label"
    """Label with the class, a whole number. "label" is the subfolder of an image, unless metadata states it."""


@dataclass(frozen=True, config=KEYS)
class SameImageConfig:
    """One image twice: two views of it, by `data.augment`."""

    name: Literal["same_image"] = "same_image"
    """Name of the relation."""


@dataclass(frozen=True, config=KEYS)
class PairsFileConfig:
    """Pairs that a file lists."""

    name: Literal["file"] = "file"
    """Name of the relation."""
    path: PathText = "pairs.csv"
    """CSV file with the columns first,second: the context and the target, as paths below `data.root`. Both are in one
    split, and each split needs pairs. A relative path starts in the current folder."""


RelationConfig = SameClassConfig | SameImageConfig | PairsFileConfig


@dataclass(frozen=True, config=KEYS)
class ImagesConfig:
    """Pairs of related images in files.

    A clip has segments of one image: the context x, the target x+ and the later x++, which the posterior sees. x++ is
    the target again, in training with another augmentation.
    """

    built_by: ClassVar[str] = "worldmodel.sources.images:ImagesSource"
    content: ClassVar[Literal["frames", "factors"]] = "frames"
    max_steps: ClassVar[int | None] = 1
    oracle_label: ClassVar[str | None] = None
    history_segments: ClassVar[int] = 0
    num_frames: ClassVar[int] = 1
    frame_stride: ClassVar[int] = 1

    source: Literal["images"] = "images"
    """Name of the source."""
    root: PathText = "data/images"
    """A folder of JPEG and PNG files, directly or in a subfolder for each class. Labels are in metadata.csv or
    metadata.jsonl, with a file_name. Subfolders train/, selection/ and test/ are the splits where they exist;
    otherwise images are divided by a hash of their paths."""
    relation: Annotated[RelationConfig, Choice("same_class")] = SameClassConfig()
    """The relation of the two images of a clip, context and target."""
    size_px: ImageSize = 64
    """Side of the square frames, pixels: the short side is resized to it, the centre is cropped."""
    channels: Literal[1, 3] = 3
    """1 is luma, 3 is RGB."""
    num_segments: Literal[2, 3] = 3
    """Images of a clip: context and target (2), plus the later one (3)."""
    batch_size: SamplesFrom2 = 128
    """Clips per global batch, over all processes."""
    cache_mb: CountFrom0 = 0
    """Memory per training process for decoded images that later batches reuse, MiB. Other images are decoded again."""
    num_workers: RepeatFrom0 = 1
    """Decoding processes per training process. 0: the training process decodes."""
    decode_timeout_s: Seconds = 60.0
    """Time limit for decoding one image, seconds. A slower decoding process is replaced and the image left out."""
    max_bad_fraction: Fraction = 0.1
    """Fraction of unreadable images above which a run stops."""
    max_frame_px: Count = 2**26
    """Limit of the pixels in an image. A file with more is skipped before it is decoded."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images, independent for each image of a clip."""


@dataclass(frozen=True, config=KEYS)
class ExternalData:
    """A source from outside of the project: a class in the user's own code."""

    content: ClassVar[Literal["frames", "factors"] | None] = None
    max_steps: ClassVar[int | None] = None
    oracle_label: ClassVar[str | None] = None
    history_segments: ClassVar[int] = 0

    source: OutsideName
    """`package.module:Class`."""
    options: Options = dataclasses.field(default_factory=dict)
    """Arguments of the class, alongside those that the project gives it."""
    size_px: Annotated[int, Field(strict=True, ge=1, le=4_096)] = 64
    """Side of the square frames, pixels."""
    channels: Repeat = 3
    """Channels of a frame."""
    num_segments: Literal[2, 3] = 3
    """Segments per prediction step: context and target (2), plus a later one (3). Each further rollout step needs one
    more."""
    num_frames: Repeat = 3
    """Frames per segment."""
    frame_stride: Count = 1
    """Source frames from one frame of a segment to the next."""
    batch_size: SamplesFrom2 = 128
    """Clips per global batch, over all processes."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training clips."""

    @property
    def built_by(self) -> str:
        """The class."""
        return self.source


DataConfig = VideosConfig | MovingMnistConfig | CausalConfig | ImagesConfig | ExternalData


def num_cameras(data: DataConfig) -> int:
    """Return the number of cameras whose frames are the channels of a frame, one after the other."""
    return max(1, len(data.cameras)) if isinstance(data, VideosConfig) else 1


def frame_channels(data: DataConfig) -> int:
    """Return the number of channels of a frame, over all cameras."""
    return data.channels * num_cameras(data)
