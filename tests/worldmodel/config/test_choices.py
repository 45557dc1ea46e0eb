"""Choices: names, keys that belong to them, code from outside, and facts that other modules state too."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import worldmodel.config
from data_pipelines import clips
from data_pipelines.errors import UserError
from data_pipelines.text_files import is_optional, is_text
from data_pipelines.worlds import causal, moving_mnist
from tests.conftest import REPO
from worldmodel.config import CausalConfig, Config, MovingMnistConfig, choices, load_config, outside_names, validate
from worldmodel.config.data import MAX_FPS
from worldmodel.config.kinds import choice_of, members_of
from worldmodel.nets.vit import VIT_SIZES

DEMO = REPO / "configs" / "objectives.yaml"
KEYS = ("data", "model.encoder", "model.latent", "model.editor", "objective", "planning.planner")


def kind_at(key: str) -> Any:
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind, include_extras=True)[name]
    return kind


def loaded(*overrides: str) -> Config:
    return load_config(DEMO, overrides, trust_code=True)


def test_another_name_keeps_the_keys_that_it_has_and_drops_the_others() -> None:
    assert loaded("model.encoder.pooling=moments", "model.encoder=resnet").model.encoder == choices("model.encoder")[
        "resnet"
    ](width=0.25, pooling="moments")
    assert loaded("model.latent=sparse").model.latent == choices("model.latent")["sparse"](dim=8, prior_components=8)
    assert loaded("model.latent.name=none").model.latent == choices("model.latent")["none"]()
    assert loaded("objective=infonce", "objective.temperature=0.5").objective == choices("objective")["infonce"](
        name="infonce", beta=0.001, temperature=0.5
    )
    # Set before the name, a key of the later choice is kept.
    assert loaded("objective.temperature=0.5", "objective.name=hinfonce").objective.name == "hinfonce"
    assert loaded("planning.planner.elites=9", "planning.planner=cem").planning.planner == choices("planning.planner")[
        "cem"
    ](elites=9)
    assert loaded("data.source=moving_mnist").data == MovingMnistConfig()


def test_the_same_name_keeps_all_and_a_group_replaces_all() -> None:
    assert loaded("model.encoder=conv3d") == loaded()
    assert loaded("model.encoder={name: conv3d, pooling: moments}").model.encoder == choices("model.encoder")["conv3d"](
        pooling="moments"
    )


def test_a_choice_may_be_its_name_alone_or_have_no_name() -> None:
    config = validate({"run_dir": "r", "model": {"latent": "none", "encoder": {"width": 0.5}}, "data": {}}, "here")
    assert config.model.latent.name == "none" and config.model.encoder == choices("model.encoder")["conv3d"](width=0.5)


@pytest.mark.parametrize("key", KEYS)
def test_the_default_name_is_that_of_the_default(key: str) -> None:
    choice = choice_of(kind_at(key))
    config: Any = validate({"run_dir": "r"}, "here")
    for name in key.split("."):
        config = getattr(config, name)
    assert choice is not None and getattr(config, choice.tag) == choice.default


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_text_in_all_choices_that_have_it_or_in_none(key: str) -> None:
    """A file is read before the choice is known."""
    found: dict[str, set[tuple[bool, bool]]] = {}
    for member in members_of(kind_at(key)).values():
        for name, hint in get_type_hints(member, include_extras=True).items():
            if name in {field.name for field in member.__dataclass_fields__.values()}:  # type: ignore[attr-defined]
                found.setdefault(name, set()).add((is_text(hint), is_optional(hint)))
    assert all(len(kinds) == 1 for kinds in found.values())


@pytest.mark.parametrize("key", KEYS)
def test_code_from_outside_is_a_choice_that_is_named(key: str) -> None:
    choice = choice_of(kind_at(key))
    assert choice is not None
    tag = f"{key}.{choice.tag}"
    config = loaded(f"{key}=their_package.module:TheirClass", f"{key}.options={{size: 3, path: a/b}}")
    assert outside_names(config) == {tag: "their_package.module:TheirClass"}
    part: Any = config
    for name in key.split("."):
        part = getattr(part, name)
    assert part.options == {"size": 3, "path": "a/b"}
    assert outside_names(loaded()) == {}
    for name in ("a:", ":B", "a b:C", "../x:C", "a:b:c", "a.:C"):
        with pytest.raises(UserError, match=r"input should read package.module:Class"):
            loaded(f"{key}={name}")


def test_options_of_one_class_are_not_those_of_another() -> None:
    config = loaded("model.editor=a:B", "model.editor.options={x: 1}", "model.editor=a:C")
    assert config.model.editor == worldmodel.config.External("a:C")


def test_facts_of_worlds_and_networks_agree() -> None:
    assert get_args(get_type_hints(CausalConfig)["change"]) == get_args(causal.Change)
    assert CausalConfig.channels == causal.NUM_FACTORS
    assert get_args(get_type_hints(MovingMnistConfig)["setting"]) == get_args(moving_mnist.Setting)
    cut = moving_mnist.SEGMENT_FRAMES, moving_mnist.NUM_SEGMENTS
    assert (MovingMnistConfig.num_frames, MovingMnistConfig.num_segments) == cut
    assert MAX_FPS == clips.MAX_FPS
    assert {name for name in choices("model.encoder") if name.startswith("vit")} == set(VIT_SIZES)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_configuration_imports_no_network_and_no_stream() -> None:
    folder = REPO / "worldmodel" / "config"
    modules = {module for path in folder.glob("*.py") for module in imported(path)}
    ours = {module for module in modules if module.split(".")[0] in ("worldmodel", "data_pipelines")}
    below = {module for module in ours if not module.startswith("worldmodel.config")}
    assert below == {"data_pipelines.errors", "data_pipelines.text_files"} and "torch" not in modules
