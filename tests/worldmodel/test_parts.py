"""The entries of the config and the classes that they name agree."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from data_pipelines.errors import UserError
from worldmodel import parts
from worldmodel.config import Config, ExternalObjective, choices
from worldmodel.nets.editors import Editor
from worldmodel.nets.encoders import Encoder
from worldmodel.nets.latents import Latent
from worldmodel.planning.planners import Planner
from worldmodel.sources import make_source
from worldmodel.training.objectives import Objective

SIZES = {"embedding_dim": 8, "hidden_dim": 16}
OFFERED: dict[str, tuple[type, dict[str, Any]]] = {
    "model.encoder": (Encoder, {"channels": 1, "num_frames": 3, "size_px": 64}),
    "model.latent": (Latent, {"context_dim": 8, **SIZES}),
    "model.editor": (Editor, {**SIZES, "latent_dim": 8, "predictor": True}),
    "objective": (Objective, SIZES),
    "planning.planner": (Planner, {}),
}
ENTRIES = [(section, name) for section in OFFERED for name in choices(section)]
# Keys that are not for the class: those of every objective, and keys that worldmodel/build.py reads.
SHARED = {field.name for field in dataclasses.fields(ExternalObjective)} - {"options"}
ELSEWHERE = {"gaussian": {"posterior_sees"}, "sparse": {"posterior_sees"}, "oracle": {"label"}}


@pytest.mark.parametrize(("section", "name"), ENTRIES)
def test_every_entry_builds_its_part(section: str, name: str) -> None:
    if name == "pretrained":
        pytest.skip("needs files of weights; tests/worldmodel/nets/test_pretrained.py builds it")
    kind, offered = OFFERED[section]
    with torch.device("meta"):  # no memory for the weights of the largest
        built = parts.build(f"{section}.name", choices(section)[name](name=name), kind, **offered)
    assert all(hasattr(built, member) for member in parts.members_of(kind))
    assert isinstance(built, torch.nn.Module) == (section != "planning.planner")


@pytest.mark.parametrize(("section", "name"), ENTRIES)
def test_every_key_of_an_entry_is_an_argument_of_its_class(section: str, name: str) -> None:
    entry: Any = choices(section)[name]
    arguments = inspect.signature(parts.load(section, entry.built_by)).parameters
    unread = {field.name for field in dataclasses.fields(entry)} - arguments.keys() - SHARED
    assert unread == ELSEWHERE.get(name, set())


@pytest.mark.parametrize("name", choices("data"))
def test_every_source_is_built_from_its_section(name: str) -> None:
    entry: Any = choices("data")[name]
    assert make_source(Config(run_dir="", data=entry())).content == entry.content


def test_a_class_gets_the_arguments_that_it_names() -> None:
    made = parts.make("a.name", "collections:Counter", {"x": 2}, object, hidden_dim=16)
    assert made == {"x": 2}
    with pytest.raises(UserError, match=r"does not accept the arguments hidden_dim: missing .*'channels'"):
        parts.make("model.encoder.name", "worldmodel.nets.encoders:MlpEncoder", {}, object, hidden_dim=16)
