import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel import WorldModel, load
from worldmodel.config import Config
from worldmodel.data import Segments
from worldmodel.evaluation import forecast
from worldmodel.evaluation.forecast import development_scores, evaluate_forecasts
from worldmodel.latents import Inference
from worldmodel.teacher import Teacher
from worldmodel.train import train

CPU = torch.device("cpu")


class OracleStudent(WorldModel):
    """Knows the law: its embedding of a context is the velocity that the pixels show, and its latent draws v'."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.latent = nn.Identity()  # type: ignore[assignment]

    def encode(self, video: Tensor) -> Tensor:
        return forecast.centroid_velocity(video)

    def rollout_embedding(
        self, context: Tensor, horizon: int, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        digit = torch.zeros(len(context), dtype=torch.int64)
        assert generator is not None
        return forecast_law(context, digit, num_samples, generator)[:, :, None]

    def prior_mean_forecast(self, context: Tensor) -> Tensor:
        return context

    def infer(
        self, context: Tensor, segments: Segments, known_r: Tensor | None, generator: torch.Generator | None = None
    ) -> Inference:
        return Inference(context, None, None)


class CentroidTeacher(nn.Module):
    """An embedding that is the velocity seen in the pixels."""

    def forward(self, video: Tensor) -> Tensor:
        return forecast.centroid_velocity(video)


def forecast_law(velocity: Tensor, digit: Tensor, count: int, generator: torch.Generator) -> Tensor:
    from data_pipelines.sources.moving_mnist import sample_law

    return sample_law(velocity, digit, count, "A", generator)


def test_a_model_that_knows_the_law_scores_as_the_oracle_does(tiny_config: Callable[..., Config]) -> None:
    """The whole protocol, with the velocity itself as the embedding: every forecast's score is known beforehand."""
    sizes = ("evaluation.queries=512", "evaluation.num_samples=64", "evaluation.law_samples=128")
    config = tiny_config(
        "data.source=moving_mnist", *sizes, "evaluation.fit_clips=512", "evaluation.selection_clips=256"
    )
    result = evaluate_forecasts(config, OracleStudent(), CentroidTeacher(), CPU)
    scores = result.metrics["forecasts"]
    oracle = scores["simulator_oracle"]
    assert oracle["energy_score"] == pytest.approx(0.61, abs=0.04)
    assert oracle["ratio_to_oracle"] == 1
    assert scores["model"]["energy_score"] == pytest.approx(oracle["energy_score"], rel=0.03)
    for covered in (*oracle["coverage_90"], *scores["model"]["coverage_90"]):
        assert covered == pytest.approx(0.9, abs=0.02)
    assert scores["persistence"]["energy_score"] == pytest.approx(scores["prior_mean"]["energy_score"], rel=1e-4)
    assert scores["persistence"]["energy_score"] == pytest.approx(
        scores["pixel_constant_velocity"]["energy_score"], rel=0.02
    )
    assert scores["pixel_constant_velocity"]["energy_score"] > 1.2 * oracle["energy_score"]
    assert scores["persistence"]["coverage_90"] is None
    assert result.metrics["probes"]["velocity_r2"] > 0.999
    assert result.metrics["queries"] == 512


@pytest.fixture
def trained(tiny_config: Callable[..., Config]) -> Any:
    return load(train(tiny_config()))


def test_metrics_of_a_trained_run(trained: Any) -> None:
    result = evaluate_forecasts(trained.config, trained.model, trained.target_encoder, CPU)
    metrics = result.metrics
    assert set(metrics["forecasts"]) == {
        "model",
        "prior_mean",
        "persistence",
        "pixel_constant_velocity",
        "encode_decode_oracle",
        "simulator_oracle",
    }
    assert len(metrics["forecasts"]["model"]["coverage_90"]) == 2
    assert metrics["kl_nats"] > 0 and metrics["queries"] == 24
    assert result.examples.frames.shape == (6, 9, 1, 64, 64)
    assert result.examples.neighbours is not None and result.examples.neighbours.shape == (6, 4, 3, 1, 64, 64)
    assert result.examples.velocity_samples is not None and result.examples.velocity_samples.shape == (
        6,
        8,
        2,
    )
    again = evaluate_forecasts(trained.config, trained.model, trained.target_encoder, CPU)
    assert again.metrics == metrics


def test_development_scores_leave_the_networks_training(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    student = WorldModel(config)
    teacher = Teacher(student.embedder)
    student.train()
    teacher.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    scores = development_scores(config, student, teacher, CPU)
    assert scores["relative_energy_score"] > 0 and math.isfinite(scores["energy_score"])
    assert student.training and teacher.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@contextmanager
def without_law(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(forecast, "known_law", lambda config: None)
        yield


def test_videos_without_a_law_are_scored_in_embedding_space(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_law(monkeypatch):
        result = evaluate_forecasts(trained.config, trained.model, trained.target_encoder, CPU)
        scores = development_scores(trained.config, trained.model, trained.target_encoder, CPU)
    assert result.metrics["space"] == "embedding"
    assert set(result.metrics["forecasts"]) == {"model", "prior_mean", "persistence", "climatology"}
    assert result.examples.velocity_samples is None
    assert scores["relative_energy_score"] > 0


def test_a_perfect_forecast_in_embedding_space_scores_zero() -> None:
    target = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    clips = forecast.EmbeddedClips(
        context=target,
        persistence=-target,
        target=target,
        prior_mean=target,
        r=target[:, :0],
        penalty=None,
        clip_id=torch.arange(10),
        labels={},
        frames=torch.empty(0),
        centroid_velocity=None,
    )
    scores = forecast.embedding_scores(clips, target[:, None].expand(-1, 5, -1), torch.Generator())["forecasts"]
    assert scores["model"]["energy_score"] == pytest.approx(0, abs=1e-5)
    expected = 2 * target.norm(dim=1).mean().item()
    assert scores["persistence"]["energy_score"] == pytest.approx(expected, rel=1e-5)
    assert scores["climatology"]["energy_score"] > 0.1


def test_too_few_clips_is_one_line(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    student = WorldModel(config)
    with pytest.raises(UserError, match="fewer than 2 clips"):
        forecast.embed_clips(config, student.eval(), Teacher(student.embedder).eval(), "test", 1, CPU)
