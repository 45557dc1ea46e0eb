"""Models that are put together by hand or from a config."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from tests.conftest import normal
from worldmodel import build, parts
from worldmodel.build import build_training_model
from worldmodel.config import Config
from worldmodel.data import TrainingInputs
from worldmodel.nets.distance import NoDistance
from worldmodel.nets.editors import MlpEditor
from worldmodel.nets.encoders import Embedder
from worldmodel.nets.latents import GaussianLatent, NoLatent
from worldmodel.nets.scene import NoScene
from worldmodel.nets.world_model import WorldModel
from worldmodel.training.losses import SequenceTerms, TrainingModel
from worldmodel.training.objectives import Byol


class FirstRow(nn.Module):
    """A user's encoder: the first row of pixels of a clip."""

    num_features = 64

    def forward(self, video: Tensor) -> Tensor:
        return video[:, 0, 0, 0]


@pytest.mark.parametrize("with_latent", [True, False])
def test_a_model_is_put_together_by_hand_and_trained(with_latent: bool) -> None:
    torch.manual_seed(0)
    latent = GaussianLatent(8, 8, 16, dim=2) if with_latent else NoLatent()
    model = WorldModel(
        Embedder(FirstRow(), [16], 8, "sphere"), latent, MlpEditor(8, 16, latent.latent_dim), NoScene(), NoDistance()
    )
    training = TrainingModel(model, Byol(), SequenceTerms({}, 8, 16, 0))
    optimizer = torch.optim.Adam(training.parameters(), 1e-2)
    inputs = TrainingInputs(normal(0, 4, 3, 1, 1, 64, 64).sigmoid(), torch.empty(4, 0), torch.empty(4, 1, 0))
    losses = []
    for _ in range(20):
        values, targets = training(inputs, normal(1, 4, 8), 0.1, torch.Generator().manual_seed(0))
        assert targets.shape == (4, 8)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        losses.append(float(values["loss"].detach()))
    assert losses[-1] < losses[0] - 0.1
    futures = model.eval().rollout(inputs.segments[:, 0], 3, 5, torch.Generator().manual_seed(0))
    assert futures.shape == (4, 5, 3, 8) and (futures.std(dim=1).max() > 1e-6) == with_latent


def test_without_a_projector_the_embedding_has_as_many_dimensions_as_the_features(
    tiny_config: Callable[..., Config],
) -> None:
    objects = ["model.encoder=objects", "model.encoder.num_objects=4", "model.projector_layers=null"]
    model = build_training_model(tiny_config(*objects, "model.embedding_dim=36")).model
    assert model.encode(normal(0, 5, 3, 1, 64, 64).sigmoid()).shape == (5, 36)
    line = (
        r"^model.projector_layers=null: model.embedding_dim=32 must be the number of features of "
        r"model.encoder=objects, 36$"
    )
    with pytest.raises(UserError, match=line):
        build_training_model(tiny_config(*objects, "model.embedding_dim=32"))


def test_a_training_model_shares_the_parts_of_its_model_under_their_names(tiny_config: Callable[..., Config]) -> None:
    training = build_training_model(tiny_config("objective.name=hinfonce", "model.scene_dim=2", "train.refine_steps=1"))
    own, of_model = training.state_dict(keep_vars=True), training.model.state_dict(keep_vars=True)
    assert all(own[name] is value for name, value in of_model.items())
    assert {name.split(".")[0] for name in own.keys() - of_model.keys()} == {"objective"}
    training.eval()
    assert not training.model.training and not any(module.training for module in training.modules())


def test_parts_are_built_in_a_fixed_order(tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial weights are drawn in the order of construction: another order would change every result."""
    order: list[str] = []

    def spied(name: str | None, make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def spy(*arguments: Any, **options: Any) -> nn.Module:
            order.append(name or arguments[0])
            return make(*arguments, **options)

        return spy

    monkeypatch.setattr(parts, "build_module", spied(None, parts.build_module))
    for name in ("SceneCode", "TemporalDistance"):
        monkeypatch.setattr(build, name, spied(name, getattr(build, name)))
    refined = ("model.scene_dim=2", "model.distance_dim=2", "train.refine_steps=1")
    build_training_model(tiny_config("objective.name=hinfonce", *refined))
    networks = ["model.encoder.name", "SceneCode", "model.latent.name", "objective.name", "model.editor.name"]
    assert order == [*networks, "TemporalDistance"]
