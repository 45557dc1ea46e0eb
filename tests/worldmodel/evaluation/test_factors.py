import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.worlds.causal import NUM_FACTORS, CausalWorld
from tests.conftest import REPO, run_here
from tests.data_pipelines.worlds.test_causal import unmix
from tests.worldmodel.report.samples import undeclared
from worldmodel.build import clip_layout
from worldmodel.config import Config, load_config
from worldmodel.evaluation.embed import Networks
from worldmodel.evaluation.factors import development_scores, evaluate_factors, factors_table, tree_importance
from worldmodel.nets.history import NoHistory
from worldmodel.nets.latents import Inference, NoLatent
from worldmodel.nets.scene import NoScene
from worldmodel.nets.world_model import WorldModel
from worldmodel.sources import make_source

CPU = torch.device("cpu")
CAUSAL = REPO / "configs" / "causal" / "heteroscedastic.yaml"
SIZES = ["evaluation.fit_clips=1000", "evaluation.selection_clips=500", "evaluation.queries=1000"]


class Unmixing(nn.Module):
    """Knows the mixing network: its features are a warped copy of the factors."""

    def __init__(self, config: Config, warp: float) -> None:
        super().__init__()
        world = make_source(config).factors
        assert isinstance(world, CausalWorld)
        self.world, self.warp = world, warp

    def features(self, video: Tensor) -> Tensor:
        factors = unmix(self.world, video[:, 0, :, 0, 0])
        return torch.tanh(self.warp * factors) / self.warp if self.warp else factors

    def project(self, features: Tensor) -> Tensor:
        return features


class Unmixer(WorldModel):
    """Its embedding is a warped copy of the factors."""

    def __init__(self, config: Config, warp: float) -> None:
        nn.Module.__init__(self)
        self.embedder = Unmixing(config, warp)  # type: ignore[assignment]
        self.scene, self.history, self.latent = NoScene(), NoHistory(), NoLatent()
        self.embedding_dim = NUM_FACTORS

    def infer(
        self,
        state: Tensor,
        segments: Tensor,
        known_r: Tensor,
        generator: torch.Generator | None = None,
        *,
        action: Tensor | None = None,
    ) -> Inference:
        return Inference(state[:, :0])


def networks(config: Config, warp: float) -> Networks:
    model = Unmixer(config, warp)
    return Networks(model, model.embedder, CPU, make_source(config), clip_layout(config))


def test_the_factors_themselves_score_one() -> None:
    config = load_config(CAUSAL, SIZES)
    metrics: Any = evaluate_factors(networks(config, 0), config.evaluation)
    assert metrics["factors"]["in_distribution_r2"] == pytest.approx(1, abs=1e-4)
    assert metrics["factors"]["out_of_distribution_r2"] == pytest.approx(1, abs=1e-4)
    assert undeclared(metrics) == []
    assert metrics["dci"]["disentanglement"] > 0.95 and metrics["dci"]["completeness"] > 0.95
    assert "dci_of_r" not in metrics
    assert development_scores(networks(config, 0), config.evaluation.seed)["factors_r2"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("mixing", "low", "high"), [pytest.param("none", 0.95, 1.0, marks=pytest.mark.slow), ("all", 0.0, 0.6)]
)
def test_a_latent_is_scored_by_the_changes_that_its_coordinates_hold(mixing: str, low: float, high: float) -> None:
    config = load_config(REPO / "configs" / "causal" / "multimodal.yaml", SIZES)
    trained = networks(config, 0)
    rotation = torch.linalg.qr(torch.randn(NUM_FACTORS, NUM_FACTORS, generator=torch.Generator().manual_seed(0)))[0]

    def infer(state: Tensor, segments: Tensor, *_: Any, **__: Any) -> Inference:
        embedder: Any = trained.model.embedder
        r = embedder.features(segments[:, 2]) - state
        return Inference(r @ rotation if mixing == "all" else r)

    trained.model.infer = infer  # type: ignore[method-assign]
    metrics: Any = evaluate_factors(trained, config.evaluation)
    assert low <= metrics["dci_of_r"]["disentanglement"] <= high and undeclared(metrics) == []
    assert "DCI disentanglement of r" in factors_table(metrics)


def of_one_dimension(config: Config) -> Networks:
    trained = networks(config, 0)
    whole = trained.model.embedder.project
    trained.model.embedder.project = lambda features: whole(features)[:, :1]  # type: ignore[method-assign]
    trained.model.embedding_dim = 1
    return trained


def test_an_embedding_of_one_dimension_has_no_dci() -> None:
    config = load_config(CAUSAL, SIZES)
    metrics: Any = evaluate_factors(of_one_dimension(config), config.evaluation)
    assert "dci" not in metrics and undeclared(metrics) == [] and "DCI" not in factors_table(metrics)


def test_factors_and_draws_of_r_have_different_random_numbers() -> None:
    config = load_config(CAUSAL, SIZES)
    trained, drawn = of_one_dimension(config), []

    def infer(state: Tensor, segments: Tensor, known_r: Tensor, generator: torch.Generator, **_: Any) -> Inference:
        drawn.append(torch.randn(1000, generator=generator))
        return Inference(state)

    trained.model.infer = infer  # type: ignore[method-assign,assignment]
    evaluate_factors(trained, config.evaluation)
    development_scores(trained, config.evaluation.seed)
    for seed in (config.evaluation.seed, config.evaluation.seed + 1):  # those of the factors
        of_factors = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        assert not any(torch.equal(numbers, of_factors) for numbers in drawn)


def test_a_warped_copy_fails_out_of_distribution_first() -> None:
    config = load_config(CAUSAL, SIZES)
    scores: Any = evaluate_factors(networks(config, 2.0), config.evaluation)["factors"]
    assert 0.85 < scores["in_distribution_r2"] < 0.99
    assert scores["out_of_distribution_r2"] < scores["in_distribution_r2"] - 0.1


def test_tree_importance_finds_which_dimension_tells_of_which_factor() -> None:
    codes = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    importance = tree_importance(codes, torch.stack([codes[:, 2].sign(), codes[:, 0] ** 3], dim=1))
    assert importance.shape == (3, 2)
    assert importance.argmax(dim=0).tolist() == [2, 0]
    torch.testing.assert_close(importance.sum(dim=0), torch.ones(2, dtype=importance.dtype))


def test_training_and_evaluating_by_the_scripts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = ["train.steps=30", "train.eval_every=30", "tracking.wandb=disabled", f"run_dir={run}"]
    trained = run_here("train.py", "--config", str(CAUSAL), *few, *SIZES)
    assert trained.returncode == 0, trained.stderr
    evaluated = run_here("evaluate.py", "--run", str(run))
    assert evaluated.returncode == 0, evaluated.stderr
    assert "linear R² of the factors, out of distribution" in evaluated.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["factors"]["in_distribution_r2"] > 0.2 and metrics["kl_nats"] > 0
    compared = run_here("evaluate.py", "--run", str(run), "--compare", str(run))
    assert compared.returncode == 2 and "compare runs on their known factors" in compared.stderr
