"""Training on the cached tokens of a frozen encoder, with models of tiny size and random weights."""

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from data_pipelines import stream as stream_module
from data_pipelines.errors import UserError
from tests.conftest import REPO, run_processes, run_python
from worldmodel import load
from worldmodel.config import Config, load_config
from worldmodel.nets.pretrained import PretrainedEncoder
from worldmodel.runs.checkpoint import load_checkpoint
from worldmodel.runs.travel import portable_config
from worldmodel.sources import make_source
from worldmodel.training import cached_videos as module
from worldmodel.training.cached_videos import CachedVideos, cached_videos
from worldmodel.training.loop import train
from worldmodel.training.session import Interrupted
from worldmodel.training.token_store import TokenStore

DIM = 24
CPU = torch.device("cpu")
TOLERANCE = 1e-5
SIZES = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dinov2/, other_dinov2/ and vjepa2/."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name in ("dinov2", "other_dinov2"):
        transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=32)).save_pretrained(root / name)
    predictor = {"pred_hidden_size": DIM, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    vjepa2 = transformers.VJEPA2Config(**SIZES, **predictor, crop_size=32, pred_num_mask_tokens=2)
    transformers.VJEPA2Model(vjepa2).save_pretrained(root / "vjepa2")
    return root


@pytest.fixture
def overrides(models: Path, tmp_path: Path) -> list[str]:
    """Clips of two-frame segments, of which two overlap in each video. Cut like this they have no known law."""
    return [
        "model.encoder=pretrained", f"model.encoder.path={models / 'dinov2'}", "model.encoder.freeze=true",
        "data.num_frames=2", "data.clip_step=2", "data.size_px=32", "objective.rollout_steps=2",
        f"train.encoder_cache={tmp_path / 'cache'}", "train.eval_every=3",
    ]  # fmt: skip


@pytest.fixture
def config(overrides: list[str], tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    return lambda *more: tiny_config(*overrides, *more)


def rows_of(run: Path) -> list[dict[str, Any]]:
    timed = ("_s", "_per_s", "tflops", "mfu", "time", "wall")
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if isinstance(v, float) and not k.endswith(timed)} for row in rows]


def no_work(*_: Any, **__: Any) -> Any:
    raise AssertionError("a video is decoded, or the backbone runs")


# ------------------------------------------------------------------------------------------ the same, and no work twice


def difference(one: Path, other: Path) -> list[float]:
    """The largest difference of each row of two runs, relative to values above 1."""
    rows = list(zip(rows_of(one), rows_of(other), strict=True))
    assert all(a.keys() == b.keys() for a, b in rows)
    assert len(rows) >= 8 and any("relative_energy_score" in a for a, _ in rows)
    return [max(abs(a[key] - b[key]) / max(1.0, abs(a[key])) for key in a) for a, b in rows]


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        pytest.param("mean", "dinov2", marks=pytest.mark.slow),
        pytest.param("mean", "vjepa2", marks=pytest.mark.slow),
        ("attention", "vjepa2"),
    ],
)
def test_losses_and_scores_are_those_of_training_from_pixels(
    models: Path,
    tmp_path: Path,
    config: Callable[..., Config],
    pooling: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They differ by the order of sums in fp32. For attention, the tokens from pixels are rounded to fp16 here, too."""
    keys = [f"model.encoder.path={models / name}", f"model.encoder.pooling={pooling}", "train.refine_steps=4"]
    keys.append("train.refine_clips=32")
    exact = PretrainedEncoder.tokens
    if pooling == "attention":
        monkeypatch.setattr(PretrainedEncoder, "tokens", lambda self, video: exact(self, video).half().float())
    pixels = train(config(*keys, "train.encoder_cache=null", f"run_dir={tmp_path / 'pixels'}"))
    monkeypatch.undo()
    cached = train(config(*keys, f"run_dir={tmp_path / 'cached'}"))
    assert max(difference(pixels, cached)) < TOLERANCE
    video = torch.rand(3, 2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    one, other = (load(run).encode(video) for run in (pixels, cached))
    torch.testing.assert_close(one, other, atol=10 * TOLERANCE, rtol=0)


def test_tokens_in_fp16_change_the_first_loss_little(tmp_path: Path, config: Callable[..., Config]) -> None:
    keys = "model.encoder.pooling=attention", "train.steps=6"
    pixels = train(config(*keys, "train.encoder_cache=null", f"run_dir={tmp_path / 'pixels'}"))
    cached = train(config(*keys, f"run_dir={tmp_path / 'cached'}"))
    assert 0 < difference(pixels, cached)[0] < 1e-3


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_second_run_decodes_nothing_and_runs_no_backbone(
    tmp_path: Path, config: Callable[..., Config], pooling: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    keys = f"model.encoder.pooling={pooling}", "train.refine_steps=4", "train.refine_clips=32"
    train(config(*keys, f"run_dir={tmp_path / 'first'}"))
    assert "GB per hour of video" in capsys.readouterr().out
    one_segment = PretrainedEncoder.tokens
    monkeypatch.setattr(stream_module, "run_workers", no_work)
    monkeypatch.setattr(
        PretrainedEncoder, "tokens", lambda self, video: one_segment(self, video) if len(video) == 1 else no_work()
    )
    train(config(*keys, f"run_dir={tmp_path / 'second'}", "model.hidden_dim=24", "objective.name=vicreg"))
    assert "caching" not in capsys.readouterr().out


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, config: Callable[..., Config]) -> None:
    whole = load_checkpoint(train(config(f"run_dir={tmp_path / 'whole'}")))
    steps = iter([0, 0, 0, signal.SIGTERM])
    halved = config(f"run_dir={tmp_path / 'halved'}")
    with pytest.raises(Interrupted):
        train(halved, stop=lambda: next(steps, signal.SIGTERM))
    resumed = load_checkpoint(train(halved, resume=True))
    assert whole is not None and resumed is not None and whole.model.keys() == resumed.model.keys()
    assert all(torch.equal(value, resumed.model[key]) for key, value in whole.model.items())


def test_a_known_law_is_scored_from_pixels(models: Path, tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    keys = ["model.encoder=pretrained", f"model.encoder.path={models / 'dinov2'}", "model.encoder.freeze=true"]
    keys += ["train.eval_every=2", "train.steps=2"]
    scores = [
        rows_of(train(tiny_config(*keys, f"run_dir={tmp_path / name}", f"train.encoder_cache={cache}")))
        for name, cache in (("pixels", "null"), ("cached", tmp_path / "cache"))
    ]
    assert any("relative_energy_score" in str(row) for row in scores[0])
    for a, b in zip(*scores, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


# ------------------------------------------------------------------------------------------------ the pass, interrupted


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 32 * DIM * 2 * 4)  # 32 segments of two frames


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of segments that are encoded."""
    counts: list[int] = []
    encode = CachedVideos._encode

    def counting(self: CachedVideos, batch: Any) -> Any:
        counts.append(len(batch["video"]))
        return encode(self, batch)

    monkeypatch.setattr(CachedVideos, "_encode", counting)
    yield counts


def opened(config: Config, stop: Callable[[], int] = lambda: 0, steps: int = 2) -> Any:
    source = cached_videos(config, make_source(config), Accelerator(cpu=True), stop)
    return source.training_stream(steps, rank=0, world_size=1, device=CPU)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_pass_goes_on_where_it_stopped(config: Callable[..., Config], counted: list[int]) -> None:
    with pytest.raises(Interrupted):
        opened(config(), stop=lambda: signal.SIGTERM if sum(counted) >= 48 else 0)
    assert sum(counted) == 48
    stream = opened(config())
    assert sum(counted) == len(stream._store._keys) == 64 * 4  # eight of nine frames are used
    opened(config())
    opened(config("data.clip_step=null", "objective.rollout_steps=1"), steps=1)
    opened(config("data.clip_step=4"))  # other clips of the same segments
    assert sum(counted) == 64 * 4


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_a_killed_pass_keeps_whole_parts_and_no_other(
    overrides: list[str], tiny_overrides: list[str], counted: list[int]
) -> None:
    """The process dies in the middle of writing its third part."""
    program = """
import os, signal, sys
from unittest.mock import patch
import numpy as np
from tests.worldmodel.training.test_cached_videos import DIM, module, opened
from worldmodel.config import load_config
module.PART_BYTES = 32 * DIM * 2 * 4
write, calls = np.lib.format.write_array, []
def write_and_die(file, rows, **options):
    calls.append(1)
    if len(calls) == 3:
        file.write(b"x" * 1000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, rows, **options)
with patch.object(np.lib.format, "write_array", write_and_die):
    opened(load_config(sys.argv[1], sys.argv[2:]))
"""
    arguments = [str(REPO / "configs" / "objectives.yaml"), *tiny_overrides, *overrides]
    done = run_python("-c", program, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    config = load_config(arguments[0], arguments[1:])
    [folder] = Path(str(config.train.encoder_cache)).iterdir()
    [partial] = folder.glob(".*.npy.*.partial")
    assert len(list(folder.glob("*.npy"))) == 2 and partial.stat().st_size > 0
    stream = opened(config)
    assert sum(counted) == 64 * 4 - 2 * 32 and partial.exists()  # another process might still write it
    os.utime(partial, (0, 0))
    opened(config)
    assert not partial.exists()
    batch = next(stream.batches())
    assert batch["video"].shape == (16, 4 * 2, 1, DIM) and batch["video"].abs().sum(dim=(1, 2, 3)).min() > 0


def test_clips_of_a_broken_video_are_left_out_as_in_pixels(
    config: Callable[..., Config], world: Path, tmp_path: Path
) -> None:
    for split in ("train", "selection", "test"):
        (tmp_path / "videos" / split).mkdir(parents=True)
        for path in (world / split).glob("*.mp4"):
            (tmp_path / "videos" / split / path.name).write_bytes(path.read_bytes())
    broken = config(f"data.root={tmp_path / 'videos'}", "data.max_bad_fraction=0.02")  # one of 64
    source = make_source(broken)
    reader = cached_videos(broken, source, Accelerator(cpu=True), lambda: 0)
    victim = sorted((tmp_path / "videos" / "train").iterdir())[5]
    pixels = source.training_stream(2, rank=0, world_size=1, device=CPU)  # both have indexed the whole file
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    cached = reader.training_stream(2, rank=0, world_size=1, device=CPU)
    sizes = []
    for expected, found, _ in zip(pixels.batches(), cached.batches(), range(pixels.batches_per_epoch), strict=False):
        assert torch.equal(expected["clip_id"], found["clip_id"]) and torch.equal(expected["row"], found["row"])
        assert expected["labels"].keys() == found["labels"].keys()
        assert all(torch.equal(values, found["labels"][key]) for key, values in expected["labels"].items())
        sizes.append(len(found["row"]))
    assert min(sizes) < 16 == max(sizes)
    strict = config(f"data.root={tmp_path / 'videos'}", "data.max_bad_fraction=0.01", "data.size_px=40")
    refusing = cached_videos(strict, make_source(strict), Accelerator(cpu=True), lambda: 0)
    assert isinstance(refusing, CachedVideos)
    refusing._indexes = reader._indexes  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"1 of 64 videos do not decode or have changed"):
        refusing.training_stream(2, rank=0, world_size=1, device=CPU)


@pytest.mark.slow
def test_processes_share_the_pass(overrides: list[str], tiny_overrides: list[str], tmp_path: Path) -> None:
    cases = {"one": (1, {}), "two": (2, {}), "shards": (2, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})}
    keys, losses = {}, {}
    for name, (count, environment) in cases.items():
        changes = [*tiny_overrides, *overrides, f"run_dir={tmp_path / name}"]
        changes.append(f"train.encoder_cache={tmp_path / f'cache_{name}'}")
        arguments = "-m", "worldmodel", "train", "--config", str(REPO / "configs" / "objectives.yaml"), *changes
        run_processes(count, *arguments, environment=environment)
        [folder] = (tmp_path / f"cache_{name}").iterdir()
        stored = [np.load(path, allow_pickle=False)["key"] for path in folder.glob("*.npy")]
        keys[name] = np.sort(np.concatenate(stored)).tolist()
        losses[name] = [row["loss"] for row in rows_of(tmp_path / name) if "loss" in row]
    assert keys["one"] == keys["two"] == keys["shards"] and len(losses["one"]) == 6
    assert losses["one"] == pytest.approx(losses["two"], abs=1e-4)
    assert losses["one"] == pytest.approx(losses["shards"], abs=1e-4)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_other_weights_or_cuts_have_another_folder(config: Callable[..., Config], models: Path, tmp_path: Path) -> None:
    changes = [
        [], [f"model.encoder.path={models / 'other_dinov2'}"], ["model.encoder.pooling=attention"],
        ["data.size_px=40"], ["data.num_frames=1"], ["data.num_frames=1", "data.frame_stride=2"],
    ]  # fmt: skip
    for count, change in enumerate(changes, start=1):
        opened(config(*change), steps=1)
        assert len(list((tmp_path / "cache").iterdir())) == count
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in (models / "dinov2").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    opened(config(f"model.encoder.path={copied}"))  # the same weights
    assert len(list((tmp_path / "cache").iterdir())) == len(changes)


def test_the_limit_is_told_before_anything_is_computed(config: Callable[..., Config], counted: list[int]) -> None:
    tight = config("train.encoder_cache_gb=1")
    source = cached_videos(tight, make_source(tight), Accelerator(cpu=True), lambda: 0)
    assert isinstance(source, CachedVideos)
    source._store._max_bytes = 10_000
    with pytest.raises(UserError, match=r"would grow to .* above train.encoder_cache_gb=1e-05: raise the limit"):
        source.training_stream(2, rank=0, world_size=1, device=CPU)
    assert not counted


def store(root: Path) -> TokenStore:
    return TokenStore(root, {"weights": "w"}, (2, 1, 3), np.dtype("<f4"), 10**6)


def test_a_store_finds_what_it_was_given_and_what_others_wrote(tmp_path: Path) -> None:
    one, other = store(tmp_path), store(tmp_path)
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 2**64, 50, dtype=np.uint64)
    tokens = generator.standard_normal((50, 2, 1, 3), dtype=np.float32)
    one.add(keys[:20], tokens[:20])
    other.add(keys[20:], tokens[20:])
    assert one.has(keys).tolist() == [True] * 20 + [False] * 30
    one.refresh()
    chosen = generator.permutation(50)
    assert one.has(keys[chosen].reshape(5, 10)).all()
    assert np.array_equal(one.read(keys[chosen]), tokens[chosen])
    assert not one.has(keys + np.uint64(1)).any() and not store(tmp_path / "empty").has(keys).any()


@pytest.mark.parametrize("damage", ["cut", "pickle", "other type", "folder"])
def test_a_damaged_part_is_told_and_never_unpickled(tmp_path: Path, damage: str) -> None:
    class Mark:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    given = store(tmp_path)
    given.add(np.arange(9, dtype=np.uint64), np.zeros((9, 2, 1, 3), np.float32))
    [part] = given.folder.glob("*.npy")
    content = part.read_bytes()
    part.unlink()
    if damage == "cut":
        part.write_bytes(content[:-5])
    elif damage == "pickle":
        part.write_bytes(pickle.dumps(Mark()))
    elif damage == "other type":
        np.save(part, np.zeros(9))
    else:
        part.mkdir()
    with pytest.raises(UserError, match=r"\.npy (is damaged|holds rows of another type)"):
        store(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.encoder.freeze=false"], "train.encoder_cache is for a frozen encoder"),
        (["data.augment.flip=horizontal"], "stores segments as they are: leave out data.augment.flip=horizontal"),
        (["model.encoder=conv3d"], "needs model.encoder=pretrained and model.encoder.freeze=true"),
    ],
)
def test_what_cannot_be_cached_is_told(config: Callable[..., Config], changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(*changes)
    assert message in str(caught.value)


def test_a_world_without_files_is_not_cached(models: Path, tmp_path: Path) -> None:
    keys = ["data.source=moving_mnist", f"train.encoder_cache={tmp_path}", "model.encoder=pretrained"]
    keys += [f"model.encoder.path={models / 'dinov2'}", "model.encoder.freeze=true"]
    with pytest.raises(UserError, match=r"train.encoder_cache needs data.source=videos"):
        load_config(REPO / "configs" / "paper.yaml", keys)


def test_the_folder_stays_at_home_when_a_run_travels(config: Callable[..., Config]) -> None:
    public, _ = portable_config(config(), "name")
    assert public.train.encoder_cache is None
