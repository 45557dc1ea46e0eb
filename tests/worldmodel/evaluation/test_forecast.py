import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from data_pipelines.worlds.digits import pixel_centroid
from data_pipelines.worlds.kicked_mnist import KickedMnistLaw
from data_pipelines.worlds.moving_mnist import centroid_velocity, sample_law
from tests.worldmodel.report.samples import undeclared
from worldmodel import WorldModel, load
from worldmodel.build import build_model, clip_layout
from worldmodel.config import Config, EvaluationConfig
from worldmodel.evaluation.embed import Networks, embed_split
from worldmodel.evaluation.forecast import development_scores, evaluate_forecasts
from worldmodel.evaluation.futures import roll_out
from worldmodel.evaluation.probes import label_targets
from worldmodel.evaluation.recalibration import Recalibration, save_recalibration
from worldmodel.nets.history import NoHistory
from worldmodel.nets.latents import Inference, NoLatent
from worldmodel.nets.scene import NoScene
from worldmodel.nets.teacher import Teacher
from worldmodel.runs.folder import RunFolder
from worldmodel.sources import make_source
from worldmodel.sources.videos import VideosSource
from worldmodel.training.loop import train

CPU = torch.device("cpu")
KICKED = ("evaluation.horizon=4", "data.clip_step=3", "evaluation.queries=16", "evaluation.fit_clips=48")


class Pixels(nn.Module):
    """An embedding that is where the ink is, and how it moves: [B, T, 1, H, W] -> [B, 4] px and px/frame."""

    def forward(self, video: Tensor) -> Tensor:
        return torch.cat([pixel_centroid(video[:, -1, 0]), centroid_velocity(video)], dim=1)

    def features(self, video: Tensor) -> Tensor:
        return self(video)

    def project(self, features: Tensor) -> Tensor:
        return features


class OracleStudent(WorldModel):
    """Knows the law: its embedding of a context is what the pixels show, and its latent draws what the law does."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.latent = NoLatent()
        self.latent.latent_dim = 2
        self.embedder = Pixels()  # type: ignore[assignment]
        self.scene = NoScene()
        self.history = NoHistory()
        self.embedding_dim = 4

    def rollout_embedding(
        self,
        state: Tensor,
        horizon: int,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
        shuffle: bool = False,
    ) -> Tensor:
        assert generator is not None and horizon == 1
        velocity = state[:, 2:].roll(1, dims=0) if shuffle else state[:, 2:]
        after = sample_law(velocity, torch.zeros(len(state), dtype=torch.int64), num_samples, "A", generator)
        return torch.cat([state[:, None, :2] + 3 * after, after], dim=-1)[:, :, None]

    def prior_mean_rollout(self, state: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
        return torch.cat([state[:, :2] + 3 * state[:, 2:], state[:, 2:]], dim=-1)[:, None]

    def infer_from(
        self,
        state: Tensor,
        seen: Tensor,
        known_r: Tensor,
        generator: torch.Generator | None = None,
        *,
        action: Tensor | None = None,
    ) -> Inference:
        return Inference(state[:, 2:])


def test_a_model_that_knows_the_law_scores_as_the_oracle_does(tiny_config: Callable[..., Config]) -> None:
    """The whole protocol, with pixel measurements as the embedding: every forecast's score is known beforehand."""
    sizes = ("evaluation.queries=512", "evaluation.num_samples=64", "evaluation.law_samples=128")
    config = tiny_config(
        "data.source=moving_mnist", *sizes, "evaluation.fit_clips=512", "evaluation.selection_clips=256"
    )
    networks = Networks(OracleStudent(), Pixels(), CPU, make_source(config), clip_layout(config))
    metrics: Any = evaluate_forecasts(networks, config.evaluation).metrics
    scores = {name: dict(values) for name, values in metrics["forecasts"].items()}
    energy = {name: values["energy_score"][0] for name, values in scores.items()}
    assert energy["simulator_oracle"] == pytest.approx(0.61, abs=0.04)
    assert scores["simulator_oracle"]["ratio_to_oracle"] == [1]
    assert energy["model"] == pytest.approx(energy["simulator_oracle"], rel=0.03)
    for name in ("simulator_oracle", "model"):
        for covered in scores[name]["coverage"]["90"][0]:
            assert covered == pytest.approx(0.9, abs=0.02)
    assert energy["persistence"] == pytest.approx(energy["prior_mean"], rel=0.02)
    assert energy["persistence"] == pytest.approx(energy["pixel_constant_velocity"], rel=0.02)
    assert energy["shuffled_r"] > energy["pixel_constant_velocity"] > 1.2 * energy["simulator_oracle"]
    assert scores["persistence"]["coverage"] is None
    assert metrics["probes"]["embedding"]["velocity"]["linear"] > 0.999
    assert metrics["queries"] == 512


@pytest.fixture
def trained(tiny_config: Callable[..., Config]) -> Any:
    return load(train(tiny_config()))


@pytest.fixture
def kicked(tiny_config: Callable[..., Config], kicked_world: Path) -> Any:
    return load(train(tiny_config(f"data.root={kicked_world}", *KICKED, "objective.rollout_steps=2")))


CONTROLS = {
    *("model", "prior_mean", "shuffled_r", "persistence"),
    *("climatology", "training_climatology", "linear_gaussian"),
}
ORACLES = {"encode_decode_oracle", "simulator_oracle"}


def test_metrics_of_a_trained_run(trained: Any) -> None:
    result = evaluate_forecasts(trained.networks, trained.config.evaluation)
    metrics: Any = result.metrics
    assert set(metrics["forecasts"]) == CONTROLS | ORACLES | {"pixel_constant_velocity"}
    assert set(metrics["embedding"]["forecasts"]) == CONTROLS | {"encode_decode_oracle"}
    assert metrics["kl_nats"] > 0 and metrics["queries"] == 24 and metrics["horizon"] == 1
    assert set(metrics["probes"]) == {"backbone", "embedding", "r", "embedding_and_r"}
    assert set(metrics["probes"]["r"]) == {"digit", "velocity", "velocity_change", "position"}
    shown = result.illustrations
    assert shown.frames.shape == (6, 6, 1, 64, 64)
    assert shown.neighbours.shape == (6, 1, 4, 3, 1, 64, 64)
    assert shown.fans is not None and shown.fans.samples.shape == (6, 8, 1, 2) and shown.fans.on_frames
    again = evaluate_forecasts(trained.networks, trained.config.evaluation)
    assert again.metrics == metrics and undeclared(metrics) == []


def test_a_run_is_scored_at_every_step_of_its_horizon(kicked: Any) -> None:
    result = evaluate_forecasts(kicked.networks, kicked.config.evaluation)
    metrics: Any = result.metrics
    assert metrics["space"] == "centroid, px" and metrics["horizon"] == 4
    for forecasts in (metrics["forecasts"], metrics["embedding"]["forecasts"]):
        for scores in forecasts.values():
            assert len(scores["energy_score"]) == len(scores["crps"]) == 4
    assert [len(row) for row in metrics["forecasts"]["model"]["coverage"]["90"]] == [2] * 4
    assert len(metrics["embedding"]["retrieval"]["forecasts"]["model"]["mrr"]) == 4
    assert result.illustrations.frames.shape == (6, 15, 1, 64, 64)
    assert result.illustrations.neighbour_steps == (1, 2, 4)
    fans = result.illustrations.fans
    assert fans is not None and fans.law is not None
    law = kicked.source.known_law("test", kicked.config.evaluation.horizon)
    assert isinstance(law, KickedMnistLaw)
    # What is drawn is where the ink is in the frames shown.
    seen = pixel_centroid(torch.from_numpy(result.illustrations.frames[:, 2::3, 0]).float())
    torch.testing.assert_close(torch.from_numpy(fans.origin), seen[:, 0], atol=0.3, rtol=0)
    torch.testing.assert_close(torch.from_numpy(fans.true), seen[:, 1:], atol=0.3, rtol=0)


def test_a_label_of_frames_is_forecast_where_no_law_is_known(kicked: Any, tiny_config: Callable[..., Config]) -> None:
    def labelled(name: str) -> tuple[Networks, EvaluationConfig]:
        changes = ("data.clip_step=4", f"evaluation.label={name}", "objective.rollout_steps=2")
        config = tiny_config(f"data.root={kicked.config.data.root}", *KICKED, *changes)
        return replace(kicked.networks, source=make_source(config)), config.evaluation

    metrics: Any = evaluate_forecasts(*labelled("velocity")).metrics
    assert metrics["quantity"] == {"name": "velocity", "unit": "", "dimensions": ["0", "1"]}
    assert set(metrics["forecasts"]) == CONTROLS | {"label_persistence", "constant_velocity"}
    assert metrics["forecasts"]["model"]["energy_score"][3] > 0
    with pytest.raises(
        UserError, match=r"evaluation.label='digit' is not a per-frame label: these videos have centre, "
    ):
        evaluate_forecasts(*labelled("digit"))


@pytest.mark.slow
def test_recalibrated_forecasts_stand_beside_the_raw_ones(kicked: Any, tmp_path: Path) -> None:
    plain, config = evaluate_forecasts(kicked.networks, kicked.config.evaluation), kicked.config.evaluation
    result = evaluate_forecasts(kicked.networks, replace(config, recalibrate=True))
    metrics: Any = result.metrics
    assert undeclared(metrics) == [] and plain.recalibrated == {}
    for name in ("embedding", "quantity"):
        facts = metrics["recalibration"][name]
        assert len(facts["spread"]) == len(facts["weight"]) == 4 and all(0 <= w <= 1 for w in facts["weight"])
    without: Any = plain.metrics
    for now, before in (
        (metrics["forecasts"], without["forecasts"]),
        (metrics["embedding"]["forecasts"], without["embedding"]["forecasts"]),
    ):
        recalibrated = now.pop("model_recalibrated")
        assert now == before  # nothing else has changed
        assert len(recalibrated["energy_score"]) == len(recalibrated["coverage"]["90"]) == 4
        assert set(recalibrated["skill"]) == set(now["model"]["skill"]) >= {"climatology", "linear_gaussian"}
        # Six updates learn nothing: climatology is much better, and the recalibrated forecast nearly as good.
        assert recalibrated["energy_score"][0] < now["model"]["energy_score"][0]

    save_recalibration(kicked.folder, result.recalibrated, kicked.state["step"])
    clip = torch.rand(2, 3, 1, 64, 64)
    raw, changed = (kicked.rollout(clip, 4, 16, recalibrate=change) for change in (False, True))
    assert raw.shape == changed.shape == (2, 16, 4, 16) and not torch.equal(raw, changed)
    past = result.recalibrated["embedding"].past
    from_past = torch.cdist(changed[:, :, 0].flatten(0, 1), past[:, 0]).amin(dim=1) == 0
    weight = result.recalibrated["embedding"].fitted.weight[0]
    assert float(from_past.float().mean()) == pytest.approx(weight, abs=0.3)
    assert torch.equal(changed, kicked.rollout(clip, 4, 16, recalibrate=True))
    assert kicked.rollout(clip, 4, 1, recalibrate=True).shape == (2, 1, 4, 16)
    with pytest.raises(UserError, match=r"horizon=5: the recalibration of .* reaches to 4"):
        kicked.rollout(clip, 5, 16, recalibrate=True)
    RunFolder(kicked.folder).recalibration.unlink()
    with pytest.raises(UserError, match=r"has no recalibration: set evaluation.recalibrate to true in its config.yaml"):
        kicked.rollout(clip, 4, 16, recalibrate=True)


def test_recalibration_is_fitted_with_random_numbers_apart(kicked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    rollout = WorldModel.rollout_embedding

    def spy(model: WorldModel, *args: Any, **kwargs: Any) -> Tensor:
        seeds.append(args[3].initial_seed())
        return rollout(model, *args, **kwargs)

    monkeypatch.setattr(WorldModel, "rollout_embedding", spy)
    monkeypatch.setattr("worldmodel.evaluation.forecast.known_truth", lambda *_: None)  # its draws would come first
    evaluate_forecasts(kicked.networks, replace(kicked.config.evaluation, recalibrate=True))
    assert len(set(seeds)) == len(seeds) == 3  # the futures, the control, and those of the fit


def test_every_chunk_of_futures_has_another_r_to_shuffle(monkeypatch: pytest.MonkeyPatch, kicked: Any) -> None:
    monkeypatch.setattr("worldmodel.evaluation.futures.ROLLOUT_BATCH", 4)
    state, actions = torch.randn(5, kicked.model.embedding_dim), torch.empty(5, 1, 0)
    plain, shuffled = (
        roll_out(kicked.networks, state, actions, 3, torch.Generator().manual_seed(0), shuffle=shuffle)
        for shuffle in (False, True)
    )
    assert not any(torch.equal(one, other) for one, other in zip(plain, shuffled, strict=True))


def test_a_forecast_that_is_recalibrated_into_climatology_has_its_score(
    kicked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a forecast is never worse than training climatology where its weight is 1."""
    only_climatology = Recalibration((2.0,) * 4, (1.0,) * 4)
    monkeypatch.setattr("worldmodel.evaluation.recalibration.fit_recalibration", lambda *_: only_climatology)
    config = replace(kicked.config.evaluation, recalibrate=True)
    metrics: Any = evaluate_forecasts(kicked.networks, config).metrics
    for forecasts in (metrics["forecasts"], metrics["embedding"]["forecasts"]):
        recalibrated, climatology = forecasts["model_recalibrated"], forecasts["training_climatology"]
        assert recalibrated["skill"]["training_climatology"]["value"] == [0, 0, 0, 0]
        assert recalibrated["coverage"] == climatology["coverage"]


def test_development_scores_leave_the_networks_training(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    student = build_model(config)
    teacher = Teacher(student.embedder)
    student.train()
    teacher.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    networks = Networks(student, teacher, CPU, make_source(config), clip_layout(config))
    scores = development_scores(networks, config.evaluation)
    assert scores["relative_energy_score"] > 0 and math.isfinite(scores["energy_score"])
    assert student.training and teacher.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_videos_without_a_law_are_scored_in_embedding_space(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideosSource, "known_law", lambda source, split, horizon: None)
    result = evaluate_forecasts(trained.networks, trained.config.evaluation)
    scores = development_scores(trained.networks, trained.config.evaluation)
    assert result.metrics["space"] == "embedding" and result.metrics["quantity"] is None
    assert result.metrics["forecasts"] == result.metrics["embedding"]["forecasts"]
    assert set(result.metrics["forecasts"]) == CONTROLS
    assert result.illustrations.fans is None and result.readout is None
    assert scores["relative_energy_score"] > 0


def test_too_few_clips_is_one_line(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    student = build_model(config)
    with pytest.raises(UserError, match="fewer than 2 clips"):
        teacher = Teacher(student.embedder).eval()
        networks = Networks(student.eval(), teacher, CPU, make_source(config), clip_layout(config))
        embed_split(networks, "test", 1, seed=0)


def test_labels_that_name_clips_or_do_not_vary_are_not_probed_for() -> None:
    labels = {
        "seed": torch.tensor([1570558271, 12, 7]),
        "kind": torch.tensor([0, 2, 1]),
        "same": torch.tensor([5, 5, 5]),
        "wall_x_px": torch.tensor([30.5, 20.0, 31.0]),
        "state": torch.rand(3, 4, 2),
    }
    targets = label_targets(labels)
    assert {name: (tuple(values.shape), values.dtype) for name, values in targets.items()} == {
        "kind": ((3,), torch.int64),
        "wall_x_px": ((3, 1), torch.float32),
    }
