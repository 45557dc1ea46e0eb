import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipelines.batches import Batch
from data_pipelines.decoders import read_frames
from data_pipelines.errors import UserError
from data_pipelines.worlds.written import encode_h264
from tests.conftest import run_script
from tests.worldmodel.commands.test_scripts import assert_one_line
from worldmodel import TrainedRun, load
from worldmodel.build import build_training_model, clip_layout
from worldmodel.commands.surprise import csv_of, table_of_peaks
from worldmodel.config import (
    ByolConfig,
    CausalConfig,
    Config,
    Conv3dConfig,
    DataConfig,
    GaussianConfig,
    InfoNceConfig,
    ModelConfig,
    NoLatentConfig,
    ObjectiveConfig,
    OracleConfig,
    ResidualEditorConfig,
    SigregConfig,
    SparseConfig,
    VicregConfig,
    VideosConfig,
)
from worldmodel.evaluation.embed import Networks
from worldmodel.evaluation.evaluate import timeline_of_test_video
from worldmodel.evaluation.surprise import (
    MEASURES,
    SurpriseOptions,
    Transitions,
    clip_surprise,
    cut_segments,
    find_peaks,
    measure,
    score_clips,
    score_transitions,
    segment_motion,
    still_nats,
    surprise_unit,
    video_surprise,
)
from worldmodel.nets.distributions import Mixture, gaussian_kl
from worldmodel.nets.latents import GaussianLatent
from worldmodel.nets.scene import SceneCode
from worldmodel.sources import make_source
from worldmodel.training.losses import TrainingModel


def tiny(
    data: DataConfig | None = None, objective: ObjectiveConfig | None = None, **changes: object
) -> tuple[Config, TrainingModel]:
    torch.manual_seed(0)
    sizes = {
        "encoder": Conv3dConfig(width=0.125),
        "latent": GaussianConfig(dim=3),
        "embedding_dim": 16,
        "hidden_dim": 32,
    }
    config = Config(
        run_dir="",
        data=data or VideosConfig(channels=1),
        model=ModelConfig(**{**sizes, **changes}),  # type: ignore[arg-type]
        objective=objective or ByolConfig(),
    )
    return config, build_training_model(config).eval()


def networks(config: Config, training: TrainingModel) -> Networks:
    source = make_source(config)
    return Networks(training.model, training.embedder, torch.device("cpu"), source, clip_layout(config), training)


def clip(num_frames: int) -> Tensor:
    return torch.rand(num_frames, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def embeddings(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def scored(config: Config, training: TrainingModel, video: Tensor, **options: int) -> Transitions:
    given = SurpriseOptions(**options)  # type: ignore[arg-type]
    return score_transitions(networks(config, training), video.numpy(), len(video), name="it", options=given)


@pytest.mark.parametrize(
    ("num_frames", "stride", "starts"), [(3, 1, [0, 3, 6]), (3, 1, [0, 1, 2, 7]), (2, 3, [1, 4, 6]), (1, 2, [0, 5])]
)
def test_segments_are_cut_from_a_stream_that_is_never_held(num_frames: int, stride: int, starts: list[int]) -> None:
    given = -1

    def frames() -> Iterator[np.ndarray]:
        nonlocal given
        for given in range(10**9):
            yield np.full((1, 1, 1), given)

    for start, segment in zip(starts, cut_segments(frames(), starts, num_frames, stride), strict=True):
        assert segment[:, 0, 0, 0].tolist() == list(range(start, start + num_frames * stride, stride))
        assert given == start + (num_frames - 1) * stride
        if start == starts[-1]:
            break


@pytest.mark.parametrize(
    ("data", "sees", "step", "num_segments"),
    [
        (VideosConfig(channels=1), "later", 3, 3),
        (VideosConfig(channels=1, frame_stride=2), "later", 6, 3),
        (VideosConfig(channels=1), "target", 3, 2),
        (VideosConfig(channels=1, num_segments=2, num_frames=2), "later", 2, 2),
        (VideosConfig(channels=1, num_frames=2), "later", 1, 3),
        (VideosConfig(channels=1), "later", 4, 3),
    ],
)
def test_each_transition_is_scored_on_its_own_segments(
    data: DataConfig, sees: str, step: int, num_segments: int
) -> None:
    """Against one transition at a time, cut by hand; with one Gaussian as prior the KL has a closed form."""
    config, training = tiny(data, latent=GaussianConfig(dim=3, posterior_sees=sees))  # type: ignore[arg-type]
    video, span = clip(26), data.num_frames * data.frame_stride
    length = (num_segments * data.num_frames - 1) * data.frame_stride + 1
    found = scored(config, training, video, step_frames=step)
    assert found.start.tolist() == list(range(0, 26 - length + 1, step))
    assert isinstance(training.latent, GaussianLatent)
    with torch.no_grad():
        for start, surprise, kl, error, scene, still in zip(*found, strict=True):
            segments = [video[None, start + k * span :][:, : span : data.frame_stride] for k in range(num_segments)]
            context, target, seen = (training.model.encode(segments[k]) for k in (0, 1, num_segments - 1))
            of_context = training.latent.prior(context)
            assert isinstance(of_context, Mixture)
            prior = of_context.components
            expected = gaussian_kl(
                training.latent.posterior(context, seen), type(prior)(prior.mean[:, 0], prior.scale[:, 0])
            )
            assert kl == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
            assert error == pytest.approx(float(measure(training, context, target, seen)[1]), abs=1e-5)
            assert surprise == pytest.approx(kl + error / 0.001, rel=1e-5)  # byol's default beta
            assert scene == still == 0


def test_segments_that_tile_are_embedded_once() -> None:
    config, training = tiny()
    seen = 0

    def count(module: object, inputs: tuple[Tensor], output: object) -> None:
        nonlocal seen
        seen += len(inputs[0])

    training.embedder.encoder.register_forward_hook(count)
    found = scored(config, training, clip(30))
    assert len(found.start) == 8 and seen == 10


def test_kl_from_a_mixture_is_the_mean_over_draws_and_no_matter_of_company() -> None:
    _, training = tiny(latent=GaussianConfig(dim=3, prior_components=4))
    context, target, later = embeddings(40, 1), embeddings(40, 2), embeddings(40, 3)
    assert isinstance(training.latent, GaussianLatent)
    with torch.no_grad():
        kl, error = measure(training, context, target, later)
        posterior, prior = training.latent.posterior(context, later), training.latent.prior(context)
        generator = torch.Generator().manual_seed(5)
        draws = [posterior.draw(generator) for _ in range(4000)]
        each = torch.stack([posterior.log_density(r) - prior.log_density(r) for r in draws])
        alone = measure(training, context[7:8], target[7:8], later[7:8])
    assert float((kl - each.mean(dim=0)).abs().max()) < 4 * float(each.std(dim=0).max()) / 16**0.5
    assert float((kl - each.mean(dim=0)).abs().mean()) < 0.5 * float(each.std(dim=0).mean())  # one draw: 0.8
    torch.testing.assert_close(torch.cat(alone), torch.stack([kl[7], error[7]]))


def test_the_prediction_error_is_what_the_best_r_leaves() -> None:
    _, training = tiny()
    context, later = embeddings(4, 1), embeddings(4, 3)
    assert isinstance(training.latent, GaussianLatent)
    with torch.no_grad():
        without_spread(training.latent)
        reached = training.model.edit(context, training.latent.posterior(context, later).mean)
        assert float(measure(training, context, reached, later)[1].abs().max()) < 1e-4
        torch.testing.assert_close(
            measure(training, context, -reached, later)[1], torch.full((4,), 2.0), atol=1e-4, rtol=0
        )


def without_spread(latent: GaussianLatent) -> None:
    last = latent.posterior_net[-1]
    assert isinstance(last, nn.Linear)
    last.weight[latent.latent_dim :] = 0
    last.bias[latent.latent_dim :] = -30


@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        (ByolConfig(), 0.001),
        (ByolConfig(beta=0.2), 0.2),
        (VicregConfig(beta=0.2, vicreg_weights=(7.0, 25.0, 1.0)), 0.2),
        (SigregConfig(), 0.002),
        (InfoNceConfig(temperature=0.5), 0.01),
    ],
)
def test_surprise_is_the_kl_and_the_objective_s_own_error_over_beta(objective: ObjectiveConfig, beta: float) -> None:
    """Computed by hand where the posterior is a point, whose error is that of one edit."""
    _, training = tiny(objective=objective)
    context, target, later = embeddings(6, 1), embeddings(6, 2), embeddings(6, 3)
    assert isinstance(training.latent, GaussianLatent)
    with torch.no_grad():
        without_spread(training.latent)
        posterior, of_context = training.latent.posterior(context, later), training.latent.prior(context)
        assert isinstance(of_context, Mixture)
        prior = of_context.components
        kl = gaussian_kl(posterior, type(prior)(prior.mean[:, 0], prior.scale[:, 0]))
        edited = training.model.edit(context, posterior.mean)
        error = {
            "byol": 1 - (edited * target).sum(dim=1) / edited.norm(dim=1) / target.norm(dim=1),
            "vicreg": 7 * (edited - target).square().mean(dim=1),
            "sigreg": (edited - target).square().mean(dim=1),
            "infonce": (edited - target).square().mean(dim=1) / 2 / 0.5,
        }[objective.name]
        parts = measure(training, context, target, later)
    torch.testing.assert_close(parts, (kl, error), rtol=1e-4, atol=1e-4)
    assert surprise_unit(training) == "nats"


def test_a_scene_code_adds_how_surprising_it_is_that_the_scene_is_the_same() -> None:
    config, training = tiny(scene_dim=3, latent=GaussianConfig(dim=3, posterior_sees="target"))
    assert isinstance(training.scene, SceneCode)
    training.scene.learn(torch.randn(32, 3, len(training.scene.mean), generator=torch.Generator().manual_seed(0)))
    found = scored(config, training, clip(15))
    with torch.no_grad():
        kept = training.scene.project(training.embedder.features(clip(15).unflatten(0, (5, 3))))
        expected = training.scene.change_nats(kept[:-1], kept[1:])
    np.testing.assert_allclose(found.scene_nats, expected, rtol=1e-4)
    nats = found.kl_nats + found.prediction_error / training.beta + found.scene_nats
    np.testing.assert_allclose(found.surprise, nats, rtol=1e-5)


def test_the_stillness_is_the_bound_of_a_bayes_factor_at_even_odds() -> None:
    ordinary = torch.arange(1.0, 100.0)  # 99 segments
    found = still_nats(torch.tensor([0.0, 1.0, 4.5, 37.0, 50.0, 1000.0]), ordinary)
    shares = [0.01, 0.02, 0.05]
    bounds = [1 / (-math.e * p * math.log(p)) for p in shares]
    expected = [*(math.log(1 + bound) for bound in bounds), *[math.log(2)] * 3]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_rest_is_ordinary_where_much_is_at_rest() -> None:
    ordinary = torch.tensor([0.0] * 40 + [1.0] * 60)
    at_rest = still_nats(torch.tensor([0.0, 1e-12]), ordinary)
    torch.testing.assert_close(at_rest, torch.full((2,), math.log(2)))


def test_motion_is_that_of_the_embedding_within_a_segment() -> None:
    _, training = tiny()
    video = clip(12).unflatten(0, (4, 3))
    video[0] = video[0, -1:]
    with torch.no_grad():
        motion = segment_motion(training.model, video, training.model.encode(video))
        still = training.model.encode(video[:, [2, 2, 2]])
    torch.testing.assert_close(motion, (training.model.encode(video) - still).square().mean(dim=1))
    assert motion[0] < 1e-9 and (motion[1:] > 1e-5).all()


def test_stillness_is_a_part_of_surprise_if_ordinary_motion_is_known() -> None:
    config, training = tiny()
    video = clip(18)
    video[6:9] = video[8]
    plain, ordinary = networks(config, training), torch.linspace(1e-3, 1, 50)
    known = replace(plain, ordinary_motion=ordinary)
    before, after = clip_surprise(plain, video), clip_surprise(known, video)
    assert before.still_nats is None and after.still_nats is not None
    with torch.no_grad():
        segments = video.unflatten(0, (6, 3))[1:5]  # the targets
        expected = still_nats(segment_motion(training.model, segments, training.model.encode(segments)), ordinary)
    np.testing.assert_allclose(after.still_nats, expected, rtol=1e-5)
    assert after.still_nats.argmax() == 1 and after.still_nats[1] == pytest.approx(
        float(still_nats(torch.zeros(1), ordinary))
    )
    np.testing.assert_allclose(after.surprise, before.surprise + after.still_nats, rtol=1e-5)


def test_segments_of_one_frame_have_no_motion() -> None:
    config, training = tiny(VideosConfig(channels=1, num_frames=1))
    batch = Batch(video=clip(12).unflatten(0, (4, 3)), clip_id=torch.arange(4), row=torch.arange(4), labels={})
    found = score_clips(networks(config, training), [batch])
    assert found.motion is None and len(found.surprise) == 4 and (np.diff(found.surprise) >= 0).all()


def test_where_the_loss_has_no_kl_surprise_is_the_prediction_error(long_video: Path) -> None:
    config, training = tiny(latent=NoLatentConfig())
    found = scored(config, training, clip(15))
    assert found.start.tolist() == [0, 3, 6, 9]  # two segments each: nothing is inferred from a third
    with torch.no_grad():
        segments = training.model.encode(clip(15).unflatten(0, (5, 3)))
        expected = 1 - torch.cosine_similarity(
            training.model.edit(segments[:-1], segments[:-1, :0]), segments[1:], dim=-1
        )
    np.testing.assert_allclose(found.surprise, expected, atol=1e-5)
    np.testing.assert_array_equal(found.surprise, found.prediction_error)
    assert not found.kl_nats.any()
    assert video_surprise(networks(config, training), config.data, long_video).unit == "units of the loss"
    config, training = tiny(objective=ByolConfig(beta=0.0))
    found = scored(config, training, clip(15))
    np.testing.assert_array_equal(found.surprise, found.prediction_error)
    assert found.kl_nats.all() and clip_surprise(networks(config, training), clip(15)).unit == "units of the loss"


def found(surprise: list[float], step: int = 3) -> Transitions:
    others = -np.array(surprise)
    return Transitions(np.arange(len(surprise)) * step, np.array(surprise), *[others] * (len(MEASURES) - 1))


def test_peaks_are_the_highest_maxima_that_do_not_touch() -> None:
    assert find_peaks(found([0, 5, 4, 1, 3, 0, 9]), 3, 5).tolist() == [6, 1, 4]
    assert find_peaks(found([0, 5, 4, 1, 3, 0, 9]), 3, 2).tolist() == [6, 1]
    assert find_peaks(found([2, 2, 2]), 3, 5).tolist() == [0, 2]
    # With a transition at every frame, those up to a segment away touch.
    assert find_peaks(found([9, 0, 5, 0, 4, 0, 6, 0], step=1), 3, 5).tolist() == [0, 6]


def test_frames_and_times_are_those_of_the_source(long_video: Path) -> None:
    """36 frames at 10 a second, resampled to 5: every other one."""
    config, training = tiny(VideosConfig(channels=1, fps=5.0))
    timeline = video_surprise(networks(config, training), config.data, long_video, SurpriseOptions(num_peaks=1))
    assert timeline.frame.tolist() == [6, 12, 18, 24]
    assert timeline.time_s is not None
    np.testing.assert_allclose(timeline.time_s, [0.6, 1.2, 1.8, 2.4], atol=2e-3)
    source = np.stack(list(read_frames(long_video, channels=1, size_px=64)))
    [peak] = timeline.peaks
    np.testing.assert_array_equal(timeline.peak_frames[0], source[timeline.frame[peak] - 6 :][:12:2])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latent": SparseConfig()}, r"needs a run with a gaussian latent or none"),
        ({"latent": OracleConfig()}, r"needs a run with a gaussian latent or none"),
        ({"action_dim": 2, "editor": ResidualEditorConfig()}, r"needs a passive run"),
        ({"latent": NoLatentConfig(), "action_dim": 2, "editor": ResidualEditorConfig()}, r"needs a passive run"),
    ],
)
def test_a_model_that_cannot_score_videos_says_why(changes: dict[str, object], reason: str, long_video: Path) -> None:
    config, training = tiny(**changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=reason):
        video_surprise(networks(config, training), config.data, long_video)
    with pytest.raises(UserError, match=reason):
        clip_surprise(networks(config, training), clip(12))


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({}, "nats"),
        ({"latent": NoLatentConfig()}, "units of the loss"),
        ({"latent": SparseConfig()}, None),
        ({"action_dim": 2, "editor": ResidualEditorConfig()}, None),
    ],
)
def test_an_evaluation_has_a_timeline_of_every_model_that_scores_videos(
    changes: dict[str, object], unit: str | None, kicked_world: Path
) -> None:
    config, training = tiny(VideosConfig(root=str(kicked_world), channels=1), **changes)  # type: ignore[arg-type]
    timeline = timeline_of_test_video(TrainedRun(kicked_world, config, training, None, {"step": 0}))
    assert (timeline and timeline.unit) == unit


def test_a_video_may_end_with_its_last_transition(tmp_path: Path) -> None:
    """Without the frames that a stride of 2 would leave out after it."""
    config, training = tiny(VideosConfig(channels=1, frame_stride=2), latent=NoLatentConfig())
    path = tmp_path / "short.mp4"
    encode_h264(path, (clip(11)[:, 0] * 255).round().byte().numpy())
    [kept] = video_surprise(networks(config, training), config.data, path).peak_frames
    np.testing.assert_array_equal(kept, list(read_frames(path, channels=1, size_px=64))[::2])


def test_the_timeline_is_of_a_video_that_is_long_enough_and_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lengths are those after resampling: 20 frames at ten a second are 10 at five."""
    (tmp_path / "test").mkdir()
    for name, num_frames in (("a", 20), ("b", 40), ("c", 40)):
        encode_h264(tmp_path / "test" / f"{name}.mp4", np.zeros((num_frames, 64, 64), np.uint8))
    config, training = tiny(VideosConfig(root=str(tmp_path), channels=1, fps=5.0))
    surprise = TrainedRun.surprise

    def damaged(run: TrainedRun, video: Path, **options: Any) -> Any:
        if video.name == "b.mp4":
            raise UserError("it cannot be decoded")
        return surprise(run, video, **options)

    run = TrainedRun(tmp_path, config, training, None, {"step": 0})
    shown = timeline_of_test_video(run)
    assert shown is not None and shown.video == "b.mp4" and not caplog.records
    monkeypatch.setattr(TrainedRun, "surprise", damaged)
    shown = timeline_of_test_video(run)
    assert shown is not None and shown.video == "c.mp4"
    assert [record.message for record in caplog.records] == [
        "the report does not show the surprise of a video: it cannot be decoded"
    ]


def test_what_cannot_be_scored_is_told_in_one_line(long_video: Path, tmp_path: Path) -> None:
    config, training = tiny()
    with pytest.raises(UserError, match="the clip has 8 frames, but one transition takes 9"):
        clip_surprise(networks(config, training), clip(8))
    with pytest.raises(UserError, match="step_frames=0 must be at least 1"):
        clip_surprise(networks(config, training), clip(9), SurpriseOptions(step_frames=0))
    with pytest.raises(UserError, match="num_peaks=0 must be at least 1"):
        clip_surprise(networks(config, training), clip(9), SurpriseOptions(num_peaks=0))
    causal = replace(config, data=CausalConfig())
    with pytest.raises(UserError, match="needs a run on videos"):
        video_surprise(networks(causal, training), causal.data, long_video)


def test_the_script_writes_a_row_a_transition_and_pictures(trained_run: Path, long_video: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(trained_run), "--video", str(long_video), "--out", str(tmp_path / "out")]
    done = run_script("surprise.py", *arguments, "--peaks", "2")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "surprise.csv").open() as file:
        rows = list(csv.DictReader(file))
    timeline = load(trained_run).surprise(long_video, num_peaks=2)
    assert [int(row["frame"]) for row in rows] == list(range(3, 31, 3))
    assert [int(row["transition"]) for row in rows] == list(range(10))
    np.testing.assert_allclose([float(row["time_s"]) for row in rows], np.arange(3, 31, 3) / 10, atol=2e-3)
    assert list(rows[0])[3:] == ["surprise", "kl_nats", "prediction_error", "is_peak"]  # there is no scene code
    for name, values in timeline.measures.items():
        np.testing.assert_allclose([float(row[name]) for row in rows], values, rtol=1e-4, atol=1e-6)
    assert {row for row in range(10) if rows[row]["is_peak"] == "1"} == set(timeline.peaks.tolist())
    assert "surprise, nats" in done.stdout and f"{timeline.surprise[timeline.peaks[0]]:.3f}" in done.stdout
    assert sorted(done.stdout.splitlines()[-3:]) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "surprise.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "out" / "surprise.webp").read_bytes()[8:12] == b"WEBP"


@pytest.mark.parametrize("has_scene", [False, True])
@pytest.mark.parametrize("has_latent", [False, True])
def test_parts_that_the_model_lacks_are_neither_stored_nor_printed(has_latent: bool, has_scene: bool) -> None:
    latent = GaussianConfig(dim=3) if has_latent else NoLatentConfig()
    config, training = tiny(latent=latent, scene_dim=2 * has_scene)
    timeline = clip_surprise(networks(config, training), clip(18))
    assert (timeline.kl_nats is not None, timeline.scene_nats is not None) == (has_latent, has_scene)
    present = ["surprise", *["kl_nats"] * has_latent, "prediction_error", *["scene_nats"] * has_scene]
    first, *others = csv.reader(csv_of(timeline).splitlines())
    assert list(timeline.measures) == first[3:-1] == present and all(len(row) == len(first) for row in others)
    heading, *lines = table_of_peaks(timeline).splitlines()
    assert ("KL, nats" in heading, "scene, nats" in heading) == (has_latent, has_scene)
    for line in lines:
        values = [timeline.measures[name][timeline.peaks[int(line.split()[0]) - 1]] for name in present]
        assert line.split()[3:] == [f"{value:.3f}" for value in values]
        assert len(line) == len(heading)


def test_mistakes_at_the_script_end_with_one_line(
    trained_run: Path, world: Path, long_video: Path, tmp_path: Path
) -> None:
    run, video, out = ("--run", str(trained_run)), ("--video", str(long_video)), ("--out", str(tmp_path / "out"))
    assert_one_line("surprise.py", *run, "--video", str(tmp_path / "no.mp4"), *out, tells="no.mp4")
    assert_one_line("surprise.py", *run, *video, *out, "--peaks", "0", tells="--peaks must be at least 1, not 0")
    assert_one_line("surprise.py", *run, *video, *out, "--step-frames", "-1", tells="--step-frames must be at least 1")
    assert not (tmp_path / "out").exists()
