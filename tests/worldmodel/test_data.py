import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.index import VideoIndex
from data_pipelines.shards.packing import pack_videos
from data_pipelines.split_folders import split_folders
from data_pipelines.splits import SPLITS, Split
from data_pipelines.transforms import split_segments
from data_pipelines.worlds.kicked_mnist import KickedMnistLaw
from data_pipelines.worlds.law import Law
from data_pipelines.worlds.moving_mnist import MovingMnistLaw
from data_pipelines.worlds.written import encode_h264, write_whole
from tests.conftest import REPO, videos_of
from tests.data_pipelines.shard_server import ShardServer
from worldmodel.config import Config, VideosConfig, load_config
from worldmodel.sources import make_source
from worldmodel.sources.videos import VideosSource, video_number
from worldmodel.training.loop import train

CAUSAL = REPO / "configs" / "causal" / "isotropic.yaml"


def law_of(config: Config) -> Law | None:
    return make_source(config).known_law("test", config.evaluation.horizon)


def index_of(config: Config, split: Split) -> VideoIndex:
    source = make_source(config)
    assert isinstance(source, VideosSource)
    return source.index(split)


def test_a_source_keeps_its_videos_and_a_new_one_sees_new_videos(
    tiny_config: Callable[..., Config], world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world, tmp_path / "w")
    config = tiny_config(f"data.root={tmp_path / 'w'}")
    source = make_source(config)
    before = [batch["clip_id"].tolist() for batch in source.evaluation_batches("selection", 1000)]
    shutil.copy(world / "selection" / "000000.mp4", tmp_path / "w" / "selection" / "new.mp4")
    assert [batch["clip_id"].tolist() for batch in source.evaluation_batches("selection", 1000)] == before
    after = [batch["clip_id"].tolist() for batch in make_source(config).evaluation_batches("selection", 1000)]
    assert sum(map(len, after)) == sum(map(len, before)) + 1


@pytest.mark.parametrize("name", ["videos", "moving_mnist", "causal"])
def test_every_source_has_the_whole_interface(tiny_config: Callable[..., Config], name: str) -> None:
    config = tiny_config(f"data.source={name}") if name != "causal" else load_config(CAUSAL, ["run_dir=unused"])
    source = make_source(config)
    stream = source.training_stream(1, rank=0, world_size=1, device=torch.device("cpu"))
    [batch] = islice(stream, 1)
    assert stream.state_dict() == {"next_batch": 1, "fingerprint": stream.fingerprint}
    assert batch["video"].shape[2:] == source.frame_shape
    assert batch.keys() == {"video", "clip_id", "row", "labels"}
    [few] = source.evaluation_batches("test", 5)
    assert few.keys() == batch.keys() and few["video"].shape == (5, *batch["video"].shape[1:])
    source.check_split("train", 1, (), "")
    assert source.url is None
    assert (source.factors is not None) == (source.content == "factors") == (name == "causal")
    assert (source.known_law("test", 1) is None) == (name == "causal")
    assert (source.contents(()) is not None) == (name == "videos") == bool(list(source.video_files("test", 1)))


def test_both_sources_have_one_batch_layout(tiny_config: Callable[..., Config]) -> None:
    cpu = torch.device("cpu")
    layouts = []
    for source in ("videos", "moving_mnist"):
        stream = make_source(tiny_config(f"data.source={source}")).training_stream(1, rank=0, world_size=1, device=cpu)
        batches = stream.batches()
        batch = next(batches)
        batches.close()
        assert batch["video"].shape == (16, 9, 1, 64, 64)
        assert batch["clip_id"].shape == (16,)
        assert {name: values.shape for name, values in batch["labels"].items() if name == "velocity_after"}
        layouts.append({name: values.shape for name, values in batch["labels"].items() if name != "seed"})
    assert layouts[0] == layouts[1]


def test_segments_of_a_video_come_in_order(tiny_config: Callable[..., Config]) -> None:
    """The digit's centroid moves by v within x and by v' into x+ and on: the labels say which segment is which."""
    batch = next(iter(make_source(tiny_config()).evaluation_batches("selection", 32)))
    x, target, later = split_segments(batch["video"].float() / 255, 3).unbind(1)
    labels = batch["labels"]
    inside = (labels["centre"] + 2 * labels["velocity"] + 6 * labels["velocity_after"]).amax(dim=1) < 50

    def centroid(frames: torch.Tensor) -> torch.Tensor:
        weights = frames[:, 0]
        return (weights.sum(dim=-2) * torch.arange(64)).sum(dim=-1) / weights.sum(dim=(-2, -1))

    for segment, first, velocity in (
        (x, 0, "velocity"),
        (target, 1, "velocity_after"),
        (later, 4, "velocity_after"),
    ):
        start = labels["centre"] if segment is x else labels["centre"] + 2 * labels["velocity"]
        steps = torch.tensor([first, first + 1, first + 2])
        expected = (start[:, None] + steps[:, None] * labels[velocity][:, None])[..., 0]
        seen = torch.stack([centroid(segment[:, t]) for t in range(3)], dim=1)
        assert inside.sum() > 10
        offset = (seen - expected)[inside]  # a digit's centroid is off its centre, by the same in all frames
        assert (offset - offset.mean(dim=1, keepdim=True)).abs().max() < 0.5
        assert offset.abs().max() < 4


@pytest.mark.parametrize(("fraction", "num_clips"), [(0.5, 3), (0.1, None)])
def test_an_evaluation_leaves_out_as_many_bad_videos_as_the_config_allows(
    fraction: float, num_clips: int | None, tiny_config: Callable[..., Config], world: Path, tmp_path: Path
) -> None:
    """One of four files is damaged after it was indexed."""
    for split in SPLITS:
        (tmp_path / "few" / split).mkdir(parents=True)
        for path in sorted((world / split).glob("*.mp4"))[:4]:
            shutil.copy(path, tmp_path / "few" / split)
    source = make_source(tiny_config(f"data.root={tmp_path / 'few'}", f"data.max_bad_fraction={fraction}"))
    assert isinstance(source, VideosSource) and len(source.index("selection").videos) == 4
    (tmp_path / "few" / "selection" / path.name).write_bytes(b"damaged")
    batches = source.evaluation_batches("selection", 4)
    if num_clips is None:
        with pytest.raises(UserError, match=r"1 of 4 videos .* more than max_bad_fraction=0\.1 allows"):
            list(batches)
    else:
        assert sum(len(batch["video"]) for batch in batches) == num_clips


def test_evaluation_gives_the_asked_number_of_clips_always_the_same(
    tiny_config: Callable[..., Config],
) -> None:
    for source in ("videos", "moving_mnist"):
        config = tiny_config(f"data.source={source}")
        first, again = (list(make_source(config).evaluation_batches("test", 20)) for _ in range(2))
        assert sum(len(batch["video"]) for batch in first) == 20
        assert all(torch.equal(a["video"], b["video"]) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("num_clips", "world_size"), [(131, 3), (2, 3)])
def test_ranks_share_the_clips_of_an_evaluation(
    num_clips: int, world_size: int, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config("data.source=moving_mnist")
    whole = list(make_source(config).evaluation_batches("selection", num_clips))
    shared = [
        batch
        for rank in range(world_size)
        for batch in make_source(config).evaluation_batches("selection", num_clips, rank=rank, world_size=world_size)
    ]
    for name in ("clip_id", "video"):
        assert torch.equal(torch.cat([batch[name] for batch in shared]), torch.cat([batch[name] for batch in whole]))
    assert all(len(batch["clip_id"]) for batch in shared)


def test_the_law_is_known_for_both_sources(tiny_config: Callable[..., Config]) -> None:
    for source in ("videos", "moving_mnist"):
        law = law_of(tiny_config(f"data.source={source}"))
        assert isinstance(law, MovingMnistLaw) and law.setting == "A" and len(law.sprites) == 250


def test_labels_do_not_hold_for_clips_that_are_cut_otherwise(tiny_config: Callable[..., Config]) -> None:
    overrides = ("data.num_segments=2", "data.num_frames=2", "data.size_px=32", "data.channels=3", "data.fps=5.0")
    for override in (*overrides, "evaluation.horizon=2"):
        assert law_of(tiny_config(override)) is None


def test_the_kicked_law_holds_for_clips_that_begin_at_kicks(
    tiny_config: Callable[..., Config], kicked_world: Path
) -> None:
    kicked = (f"data.root={kicked_world}", "evaluation.horizon=4")
    assert isinstance(law_of(tiny_config(*kicked, "data.clip_step=6")), KickedMnistLaw)
    assert law_of(tiny_config(*kicked, "data.clip_step=4")) is None


def test_clips_are_as_long_as_their_rollouts(tiny_config: Callable[..., Config], kicked_world: Path) -> None:
    config = tiny_config(f"data.root={kicked_world}", "data.batch_size=4")
    batches = make_source(config).training_stream(2, rank=0, world_size=1, device=torch.device("cpu")).batches()
    assert next(batches)["video"].shape[1] == 12
    batches.close()
    assert next(make_source(config).evaluation_batches("test", 4, horizon=3))["video"].shape[1] == 15


def test_clips_for_evaluation_are_spread_over_the_split(tiny_config: Callable[..., Config], kicked_world: Path) -> None:
    config = tiny_config(f"data.root={kicked_world}")
    [batch] = make_source(config).evaluation_batches("train", 8)
    sprites = batch["labels"]["sprite"].tolist()
    assert len(sprites) == 8 and len(set(sprites)) == 8


@pytest.mark.parametrize("name", ["selection", "validation", "val", "valid", "dev", "Validation", "VAL"])
def test_split_folders_go_by_several_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert split_folders(tmp_path) is None
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    expected = {"train": "train", "selection": name, "test": "test"}
    assert split_folders(tmp_path) == {split: f"{tmp_path}/{folder}" for split, folder in expected.items()}


def test_classes_have_the_same_number_in_every_split(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    world = Path(videos_of(tiny_config()).place)
    for split, name in (("train", "train"), ("selection", "val"), ("test", "test")):
        for folder in ("ape", "cat") if split == "train" else ("cat",):
            (tmp_path / "classes" / name / folder).mkdir(parents=True)
            for video in sorted((world / split).glob("*.mp4"))[:16]:
                (tmp_path / "classes" / name / folder / video.name).hardlink_to(video)
    config = tiny_config(f"data.root={tmp_path / 'classes'}")
    for split in ("selection", "test"):
        [batch] = make_source(config).evaluation_batches(split, 16)  # type: ignore[arg-type]
        assert batch["labels"]["label"].tolist() == [1] * 16


def test_a_camera_is_for_lerobot_data_sets_only(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"camera='front': .* is a folder of video files, which has no cameras"):
        next(iter(make_source(tiny_config("data.camera=front")).evaluation_batches("test", 4)))


@pytest.fixture
def keep_open() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_shards_behind_a_url_serve_in_place_of_a_folder(
    tiny_config: Callable[..., Config], world: Path, tmp_path: Path, keep_open: ExitStack
) -> None:
    """Splits in folders of their own, as in the plain world; with the packed order, and the same clips."""
    for split in ("train", "selection", "test"):
        pack_videos(world / split, tmp_path / "packed" / split, shard_mb=0.02, progress=False)
    cache = tmp_path / "cache"
    server = keep_open.enter_context(ShardServer(tmp_path / "packed"))
    config = tiny_config(f"data.root={server.url}", f"data.remote_cache_dir={cache}", "data.cache_mb=0")
    assert len(index_of(config, "selection").videos) == 32
    batches = make_source(config).training_stream(1, rank=0, world_size=1, device=torch.device("cpu")).batches()
    assert next(batches)["video"].shape == (16, 9, 1, 64, 64)
    batches.close()
    plain = torch.cat([batch["video"] for batch in make_source(tiny_config()).evaluation_batches("test", 24)])
    packed = torch.cat([batch["video"] for batch in make_source(config).evaluation_batches("test", 24)])
    assert sorted(map(hash_of, plain)) == sorted(map(hash_of, packed))
    assert law_of(config) is None and len(list(cache.glob("*/*.tar"))) > 4


def hash_of(clip: torch.Tensor) -> int:
    return hash(clip.numpy().tobytes())


def test_videos_in_one_folder_of_shards_are_split_as_the_plain_ones(
    tiny_config: Callable[..., Config], world: Path, tmp_path: Path, keep_open: ExitStack
) -> None:
    pack_videos(world / "train", tmp_path / "packed", shard_mb=0.02, progress=False)
    server = keep_open.enter_context(ShardServer(tmp_path / "packed"))
    for split in ("train", "selection", "test"):
        paths = [
            {video.path for video in index_of(tiny_config(f"data.root={root}"), split).videos}
            for root in (world / "train", tmp_path / "packed", server.url)
        ]
        assert paths[0] == paths[1] == paths[2] and len(paths[0]) in (6, 52)


@pytest.mark.parametrize(
    ("folders", "sizes", "shared"),
    [
        (("Train", "Val", "Test"), (24, 12, 10), None),
        (("TRAIN", "VALIDATION"), (24, 6, 6), "selection and test share"),
        (("train", "dev"), (24, 6, 6), "selection and test share"),
        (("train", "test"), (22, 2, 10), "train and selection share"),
    ],
)
def test_splits_in_capitals_or_without_one_folder(
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    folders: tuple[str, ...],
    sizes: tuple[int, int, int],
    shared: str | None,
) -> None:
    caplog.set_level("INFO")
    world = Path(videos_of(tiny_config()).place)
    counts = {"train": 24, "test": 10}
    for folder in folders:
        (tmp_path / "v" / folder).mkdir(parents=True)
        for video in sorted((world / "train").glob("*.mp4"))[: counts.get(folder.lower(), 12)]:
            (tmp_path / "v" / folder / video.name).hardlink_to(video)
    config = tiny_config(f"data.root={tmp_path / 'v'}")
    parts = [index_of(config, split) for split in SPLITS]
    assert tuple(len(part.videos) for part in parts) == sizes
    paths = [part.root / video.path for part in parts for video in part.videos]
    assert len(set(paths)) == len(paths) and not any("label" in part.labels for part in parts)
    assert (shared is None) == ("share" not in caplog.text) and (shared or "") in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.horizon=3"],
            r"the selection split of .*: clips span 15 frames \(num_segments=5, .* has 12: .*evaluation.horizon.*, and "
            r"num_segments is data.num_segments=3 plus 2 for further steps\)$",
        ),
        (["data.num_frames=4"], r"the selection split of .* has fewer than 2 clips of 3 segments"),
        (["data.frame_stride=12"], r"the train split of .*data.frame_stride\)$"),
        (
            ["train.refine_steps=4", "train.refine_horizon=40"],
            r"the train split of .* span 126 frames .*train.refine_horizon",
        ),
    ],
)
def test_short_splits_are_found_out_before_the_first_step(
    tiny_config: Callable[..., Config], tmp_path: Path, overrides: list[str], message: str
) -> None:
    """One video of 120 frames, split by time: 96 train, 12 select, 12 test."""
    write_long(tmp_path / "one" / "v.mp4", 120)
    config = tiny_config(f"data.root={tmp_path / 'one'}", "data.batch_size=4", "data.clip_step=3", *overrides)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (Path(config.run_dir) / "checkpoints").exists()


def test_a_label_that_is_asked_for_must_be_sound(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    world = Path(videos_of(tiny_config()).place)
    shutil.copytree(world, tmp_path / "w")
    metadata = tmp_path / "w" / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[3]["velocity_change"] = [float("nan"), 0.0]
    metadata.write_text("\n".join(map(json.dumps, rows)))
    asked = ["model.latent=oracle", "model.latent.label=velocity_change", "model.latent.dim=2"]
    with pytest.raises(UserError, match=r"'velocity_change' cannot be used: .* of '000003.mp4' is nan"):
        train(tiny_config(f"data.root={tmp_path / 'w'}", *asked))
    train(tiny_config(f"data.root={tmp_path / 'w'}", "train.steps=1"))  # nobody asks for it


def write_long(path: Path, num_frames: int) -> None:
    frames = np.zeros((num_frames, 64, 64), np.uint8)
    frames[np.arange(num_frames), :, np.arange(num_frames) % 64] = 255
    path.parent.mkdir(parents=True)
    write_whole(path, frames, 10)


def test_clips_have_their_places_in_videos_that_splits_share(tmp_path: Path) -> None:
    """Frame numbers are painted into the pixels: the upper half shows the video, the lower half the frame."""
    for video in range(2):
        frames = np.full((200, 32, 32), 60 + 100 * video, np.uint8)
        frames[:, 16:] = (20 + np.arange(200))[:, None, None]
        encode_h264(tmp_path / f"{video}.mp4", frames)
    data = VideosConfig(root=str(tmp_path), size_px=32, channels=1, num_frames=2, clip_step=4, num_workers=0)
    source = VideosSource(data, seed=0, evaluation_seed=0)
    numbers: dict[int, set[int]] = {0: set(), 1: set()}
    for split in ("train", "selection", "test"):
        (batch,) = source.evaluation_batches(split, 100, horizon=2)
        places = source.clip_places(split, batch["clip_id"], 2)
        shown = batch["video"][:, 0, 0].float()
        torch.testing.assert_close(
            shown[:, 20:, 4:-4].mean(dim=(1, 2)) - 20, places.first_frame.float(), atol=2.5, rtol=0
        )
        assert places.span_frames == batch["video"].shape[1] == 8
        for number, level in zip(places.video.tolist(), shown[:, 4:12].mean(dim=(1, 2)).tolist(), strict=True):
            numbers[int(level > 110)].add(number)
    assert len(numbers[0]) == len(numbers[1]) == 1 and numbers[0] != numbers[1]
    assert numbers[0] == {video_number("0.mp4", "")}


def test_each_clip_of_a_generated_world_is_a_video_of_its_own(tiny_config: Callable[..., Config]) -> None:
    places = make_source(tiny_config("data.source=moving_mnist")).clip_places("test", torch.arange(5), 1)
    assert len(places.video.unique()) == 5 and not places.first_frame.any()
