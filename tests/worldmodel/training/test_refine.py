import signal
from collections.abc import Callable
from contextlib import closing, nullcontext
from itertools import count
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_pipelines.errors import UserError
from data_pipelines.stream import VideoStream
from tests.worldmodel.training.test_loop import assert_same_weights, final_tensors, rows
from worldmodel import WorldModel, export, load
from worldmodel.build import build_model, build_training_model
from worldmodel.config import Config
from worldmodel.data import segments_of
from worldmodel.evaluation.ordinary import load_ordinary, save_ordinary
from worldmodel.evaluation.surprise import Ordinary
from worldmodel.nets.teacher import Teacher
from worldmodel.runs.checkpoint import updates_of
from worldmodel.runs.metrics import Metrics, Training, write_metrics
from worldmodel.sources import make_source
from worldmodel.training.loop import train
from worldmodel.training.refine import (
    RefinementClips,
    copied_state,
    draw_batch,
    draw_pairs,
    embed_refinement_clips,
    most_similar,
    refine,
    refinement_stream,
    steps_of,
)
from worldmodel.training.session import Interrupted, Session

CPU = torch.device("cpu")
REFINED = ["train.refine_steps=4", "train.refine_clips=12"]


def never() -> int:
    return 0


def no_score() -> float:
    raise AssertionError("nothing is scored without train.refine_eval_every")


def full_precision() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def embedded(config: Config, model: WorldModel, target_encoder: nn.Module) -> RefinementClips:
    with closing(refinement_stream(make_source(config), config, CPU).batches(0)) as batches:
        return embed_refinement_clips(config, model, target_encoder, batches, CPU, full_precision, never)


def test_clips_are_embedded_with_running_statistics_by_student_and_teacher(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config(*REFINED)
    torch.manual_seed(0)
    model = build_model(config)
    teacher = Teacher(build_model(config).embedder)
    clips = embedded(config, model, teacher)
    with closing(make_source(config).training_stream(1, rank=0, world_size=1, device=CPU).batches(0)) as batches:
        segments = torch.cat([segments_of(next(batches), 3, CPU) for _ in range(2)])[:12]
    model.eval(), teacher.eval()
    with torch.no_grad():
        torch.testing.assert_close(clips.own.flatten(0, 1), model.encode(segments.flatten(0, 1)))
        torch.testing.assert_close(clips.targets.flatten(0, 1), teacher(segments[:, 1:].flatten(0, 1)))
    assert clips.features.shape == (12, 3, 0) and clips.known_r.shape == (12, 0) and clips.actions.shape == (12, 1, 0)


def test_refined_clips_start_where_the_steps_of_the_one_before_end(
    tiny_config: Callable[..., Config], kicked_world: Path
) -> None:
    config = tiny_config(f"data.root={kicked_world}", "data.clip_step=1", "train.refine_horizon=2")
    stream = refinement_stream(make_source(config), config, CPU)
    # 8 videos of 24 frames: clips of 4 segments that begin at frames 0, 6 and 12
    assert isinstance(stream, VideoStream) and stream.batches_per_epoch == 8 * 3 // config.data.batch_size
    with closing(stream.batches(0)) as batches:
        assert next(batches)["video"].shape[1] == 12


def numbered(num_clips: int, num_segments: int, first: int) -> torch.Tensor:
    """[N, L, 1]: first + 100 n + l"""
    clips = 100.0 * torch.arange(num_clips)[:, None] + torch.arange(num_segments)
    return first + clips[..., None]


@pytest.mark.parametrize(("horizon", "rollout_steps"), [(1, 1), (4, 1), (3, 2)])
def test_a_step_is_drawn_with_its_targets_actions_and_a_scene_from_before(
    tiny_config: Callable[..., Config], horizon: int, rollout_steps: int
) -> None:
    config = tiny_config(
        "data.source=videos", "data.batch_size=512", f"train.refine_horizon={horizon}",
        f"objective.rollout_steps={rollout_steps}", "model.scene_dim=2", "model.embedding_dim=1",
        "train.refine_steps=1",
    )  # fmt: skip
    training = build_training_model(config)
    length = steps_of(config) + 2  # x, x+ and x++ of the last step
    own, targets, features = numbered(5, length, 0), numbered(5, length - 1, 1001), numbered(5, length, 2000)
    clips = RefinementClips(own, targets, features, torch.empty(5, 0), numbered(5, length - 2, 3000))
    drawn = draw_batch(clips, config, training, torch.Generator().manual_seed(0))
    batch, actions = drawn.embedded, drawn.actions
    first = batch.real[:, 0, 0]
    assert set(first.tolist()) == {100.0 * clip + step for clip in range(5) for step in range(horizon)}
    following = first[:, None] + torch.arange(rollout_steps)
    assert torch.equal(batch.real[:, 1:, 0], following + 1001)
    assert torch.equal(batch.seen[..., 0], following + 2)
    assert torch.equal(actions[..., 0], following + 3000)
    read_at = batch.features[:, 0] - 2000
    assert torch.equal(read_at, first - batch.age)
    assert set(batch.age.tolist()) == set(range(horizon))
    assert drawn.known_r.shape == (512, 0) and drawn.examples is None
    assert ((read_at % 100) >= 0).all()


def test_pairs_are_of_similar_clips_and_half_of_them_near_each_other(tiny_config: Callable[..., Config]) -> None:
    features = numbered(6, 5, 0)
    own = 10 * torch.arange(5.0)[None, :, None] + torch.arange(6.0)[:, None, None]  # clips lie near each other
    clips = RefinementClips(own, own[:, 1:], features, torch.empty(6, 0), torch.empty(6, 1, 0))
    similar = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [4, 5], [5, 4]])
    pairs = draw_pairs(clips, similar, features[:, 0], 400, torch.Generator().manual_seed(0))
    clip, segment = pairs.features[..., 0].div(100).floor(), pairs.features[..., 0].remainder(100)
    assert torch.equal(pairs.embeddings[..., 0], 10 * segment + clip)
    assert set((segment[0] - segment[1])[:200].tolist()) == set(map(float, range(-4, 5)))
    assert torch.equal((clip[0] / 2).floor(), (clip[1] / 2).floor())
    assert ((clip[0] != clip[1])[:200].float().mean() - 0.5).abs() < 0.1 and (clip[0] != clip[1])[200:].any()
    assert (segment[0] - segment[1])[200:].abs().mean() < 0.7
    assert (clip[0] > clip[1]).any() and (clip[0] < clip[1]).any()

    config = tiny_config("model.scene_dim=2", "model.embedding_dim=1", "train.refine_steps=1", "model.distance_dim=2",
                         "train.refine_batch_size=64")  # fmt: skip
    batch = draw_batch(clips, config, build_training_model(config), torch.Generator().manual_seed(0), similar)
    assert batch.examples is not None and batch.examples.embeddings.shape == (2, 128, 1)
    assert len(batch.embedded.real) == 64
    assert torch.equal(batch.examples.other_features[:, 0].div(100).floor(), batch.embedded.real[:, 0, 0].remainder(10))


@pytest.mark.parametrize("scene_dim", [0, 2])
def test_a_temporal_distance_is_learned_in_refinement(tiny_config: Callable[..., Config], scene_dim: int) -> None:
    config = tiny_config(
        "model.distance_dim=2", f"model.scene_dim={scene_dim}", "train.refine_steps=60", "train.refine_clips=12",
        "train.log_every=20", "objective.distance_error_weight=1", "data.source=videos", "train.refine_lr=3e-3",
    )  # fmt: skip
    torch.manual_seed(0)
    training = build_training_model(config)
    model = training.model
    clips = embedded(config, model, Teacher(model.embedder))
    similar = most_similar(model, clips)
    assert similar.shape == (12, 8 if scene_dim else 1)
    before = {name: value.clone() for name, value in training.state_dict().items()}
    logged: list[dict[str, float]] = []
    assert (
        refine(
            config,
            training,
            clips,
            CPU,
            full_precision,
            lambda _, values: logged.append(values),
            never,
            no_score,
            nullcontext(),
        )
        == 0
    )
    weights = {name: value for name, value in model.distance.named_parameters() if value.ndim > 1}
    assert all(not torch.equal(value, before[f"distance.{name}"]) for name, value in weights.items())
    assert logged[-1]["distance_nearness"] < logged[0]["distance_nearness"]
    assert all(row["distance_error"] > 0 and row["distance_excess"] >= 0 for row in logged)


def test_refinement_lowers_the_loss_and_moves_all_but_the_encoder(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.refine_steps=60", "train.refine_clips=12", "train.log_every=20")
    torch.manual_seed(0)
    training = build_training_model(config)
    model = training.model
    clips = embedded(config, model, Teacher(model.embedder))
    before = {name: value.clone() for name, value in training.state_dict().items()}
    logged: list[tuple[int, dict[str, float]]] = []

    def log(updates: int, values: dict[str, float]) -> None:
        logged.append((updates, values))

    assert refine(config, training, clips, CPU, full_precision, log, never, no_score, nullcontext()) == 0
    moved = {name for name, value in training.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in training.named_parameters() if not name.startswith("embedder.")}
    assert all(torch.equal(before[name], value) for name, value in training.state_dict().items() if "embedder." in name)
    assert [updates for updates, _ in logged] == [20, 40, 60]
    assert logged[-1][1]["loss"] < logged[0][1]["loss"] - 0.05
    assert all(parameter.requires_grad for parameter in model.embedder.parameters())


def test_the_energy_score_alone_trains_editor_and_prior(tiny_config: Callable[..., Config]) -> None:
    """With other losses of weight zero, the posterior alone differs from a refinement by all losses."""
    energy = ["train.refine_steps=60", "train.refine_clips=12", "train.log_every=20", "train.refine_energy_weight=1"]
    weights: list[dict[str, torch.Tensor]] = []
    for beta in (0.0, 10.0):
        config = tiny_config(*energy, f"objective.beta={beta}", "train.refine_samples=4")
        torch.manual_seed(0)
        training = build_training_model(config)
        clips = embedded(config, training.model, training.embedder)
        logged: list[dict[str, float]] = []

        def log(_: int, values: dict[str, float], logged: list[dict[str, float]] = logged) -> None:
            logged.append(values)

        assert refine(config, training, clips, CPU, full_precision, log, never, no_score, nullcontext()) == 0
        assert logged[-1]["energy_score"] < 0.8 * logged[0]["energy_score"]
        weights.append({name: value.detach().clone() for name, value in training.named_parameters()})
    differing = {name.split(".")[1] for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert differing == {"posterior_net"}


def test_the_best_weights_of_a_refinement_are_kept(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.refine_steps=6", "train.refine_clips=12", "train.refine_eval_every=2")
    training = build_training_model(config)
    clips = embedded(config, training.model, training.embedder)
    scores = iter([0.5, 0.3, 0.4])
    seen: list[dict[str, torch.Tensor]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def score() -> float:
        seen.append({name: value.clone() for name, value in training.state_dict().items()})
        return next(scores)

    def log(updates: int, values: dict[str, float]) -> None:
        logged.append((updates, values))

    assert refine(config, training, clips, CPU, full_precision, log, never, score, nullcontext()) == 0
    assert all(torch.equal(value, seen[1][name]) for name, value in training.state_dict().items())
    assert not all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    told = [(updates, values["selection_energy_score"]) for updates, values in logged if "loss" not in values]
    assert told == [(2, 0.5), (4, 0.3), (6, 0.4)]


def test_noise_is_added_to_contexts_alone(tiny_config: Callable[..., Config]) -> None:
    training = build_training_model(tiny_config("train.refine_clips=12"))
    clips = embedded(tiny_config("train.refine_clips=12"), training.model, training.embedder)
    plain, noisy = (
        draw_batch(clips, tiny_config(f"train.refine_noise={noise}"), training, torch.Generator().manual_seed(0))
        for noise in (0.0, 0.5)
    )
    assert torch.equal(plain.embedded.real[:, 1:], noisy.embedded.real[:, 1:])
    changes = clips.own[:, 1:] - clips.own[:, :-1]
    added = (noisy.embedded.real - plain.embedded.real)[:, 0] / changes.std(dim=(0, 1))
    assert added.std() == pytest.approx(0.5, rel=0.3)


def test_a_run_that_is_refined_by_the_energy_score_keeps_the_best_on_selection_clips(
    tiny_config: Callable[..., Config],
) -> None:
    run = train(tiny_config(*REFINED, "train.refine_energy_weight=1", "train.refine_eval_every=2"))
    scored = [row for row in rows(run, "refinement") if "selection_energy_score" in row]
    assert len(scored) == 2 and all(row["selection_energy_score"] > 0 for row in scored)


def test_a_signal_ends_refinement(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(*REFINED)
    training = build_training_model(config)
    model = training.model
    clips = embedded(config, model, Teacher(model.embedder))
    calls = count()

    def third_time() -> int:
        return 15 if next(calls) == 2 else 0

    assert (
        refine(config, training, clips, CPU, full_precision, lambda *_: None, third_time, no_score, nullcontext()) == 15
    )


def test_a_signal_before_refinement_leaves_the_networks_as_they_are(tiny_config: Callable[..., Config]) -> None:
    """Nothing is fitted to the clips, of which there may be few; a linear start would be scored."""
    config = tiny_config(*REFINED, "model.editor=linear", "model.latent.prior=linear", "model.scene_dim=2")
    training = build_training_model(config)
    clips = embedded(config, training.model, Teacher(training.model.embedder)).map(itemgetter(slice(1)))
    before = copied_state(training)
    assert (
        refine(config, training, clips, CPU, full_precision, lambda *_: None, lambda: 15, no_score, nullcontext()) == 15
    )
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())


def test_a_run_is_refined_once_and_an_interrupted_refinement_begins_anew(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(tiny_config(f"run_dir={tmp_path / 'plain'}"))
    whole = train(tiny_config(f"run_dir={tmp_path / 'whole'}", *REFINED))
    assert [row["step"] for row in rows(whole, "refinement")] == [7, 8, 9, 10]
    before, after = final_tensors(plain), final_tensors(whole)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model/") and "embedder" not in name for name in changed)

    interrupted = tiny_config(f"run_dir={tmp_path / 'interrupted'}", *REFINED)
    with monkeypatch.context() as patched:
        patched.setattr("worldmodel.training.session.refine", lambda *_: signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(interrupted)
    assert_same_weights(plain, tmp_path / "interrupted")
    train(interrupted, resume=True)
    assert_same_weights(whole, tmp_path / "interrupted")

    metrics = (tmp_path / "interrupted" / "metrics.jsonl").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("worldmodel.training.session.refine", lambda *_: pytest.fail("a refined run is refined again"))
        train(interrupted, resume=True)
    assert (tmp_path / "interrupted" / "metrics.jsonl").read_text() == metrics, "rows of refinement are kept"


@pytest.mark.parametrize(("scores", "best"), [([1.0, 2.0], False), ([2.0, 1.0], True)], ids=["worse", "better"])
def test_refined_weights_have_a_checkpoint_of_their_own(
    scores: list[float],
    best: bool,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that those of before are not lost if they are better, and results are not taken for those of the others."""
    found = iter(scores)
    monkeypatch.setattr(Session, "_selection_scores", lambda *_: ({}, next(found)))
    run = train(tiny_config(*REFINED))
    latest, chosen = load(run), load(run, which="best")
    assert (latest.refine_steps, latest.num_updates, latest.state["step"]) == (4, 10, 6)
    assert (chosen.refine_steps, chosen.num_updates, chosen.state["step"]) == ((4, 10, 6) if best else (0, 6, 6))
    assert {"step_00000006", "step_00000010"} <= {path.name for path in (run / "checkpoints").iterdir()}

    ordinary = Ordinary(np.zeros(1, np.float32), None)
    save_ordinary(run, ordinary, 6)
    assert load_ordinary(run, latest.num_updates) is None
    write_metrics(run, Metrics(run="run", train=Training(seconds=1.0, steps=6, refine_steps=0)))
    exported = export(latest, tmp_path / "exported")
    assert not (exported / "metrics.json").exists()
    assert load(exported).num_updates == 10


def test_a_checkpoint_of_an_earlier_version_is_known_by_its_step() -> None:
    assert updates_of({"step": 6, "refined": True}) == 6
    assert updates_of({"step": 6, "refined": True, "updates": 10}) == 10


def test_videos_too_short_for_refinement_are_told_before_training(
    tiny_config: Callable[..., Config], kicked_world: Path, tmp_path: Path
) -> None:
    config = tiny_config(f"run_dir={tmp_path / 'run'}", f"data.root={kicked_world}", *REFINED, "train.refine_horizon=9")
    with pytest.raises(UserError, match=r"clips span 33 frames .* but the longest video has 24"):
        train(config)
    assert not (tmp_path / "run").exists()
