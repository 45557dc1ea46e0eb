"""docs/reference/config.md is generated from the types, and says something of every key."""

from typing import get_type_hints

import pytest

from data_pipelines.errors import UserError
from tests.conftest import REPO
from tests.worldmodel.config.test_choices import kind_at
from tests.worldmodel.config.test_keys import dataclasses_of
from worldmodel.config import External, choices, flatten, load_config, to_dict
from worldmodel.config.data import ExternalData
from worldmodel.config.kinds import dotted_keys, keys_of
from worldmodel.config.objective import ExternalObjective
from worldmodel.config.reference import description, reference
from worldmodel.config.sections import Config

PAGE = REPO / "docs" / "reference" / "config.md"


def test_the_page_is_current() -> None:
    command = "python -c 'from worldmodel.config.reference import reference; print(reference(), end=\"\")' > docs/..."
    assert PAGE.read_text(encoding="utf-8") == reference(), f"write the page again: {command}"


def test_every_key_and_every_choice_has_a_description() -> None:
    for kind in [kind for kind, _ in dataclasses_of()] + [External, ExternalData, ExternalObjective]:
        assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), kind
        for key in keys_of(kind):
            assert len(description(kind, key)) > 4, (kind, key)


def test_every_key_is_in_the_page() -> None:
    page = reference()
    for key in flatten(to_dict(load_config(REPO / "configs" / "objectives.yaml"))):
        assert f"| `{key}` |" in page, key
    for key in ("data", "model.encoder", "objective", "planning.planner"):
        assert kind_at(key) is not None
        for name in choices(key):
            assert f" {name}" in page, name


@pytest.mark.parametrize(
    "row",
    [
        "| `train.lr` | number, above 0 | `0.0001` |",
        "| `train.steps` | integer, 1 to 1,000,000,000 | `75000` |",
        "| `objective.vicreg_weights` | list of 3 values: number, 0 or more | `[25.0, 25.0, 1.0]` |",
        "| `data.fps` | number, above 0, at most 1,000 or null | `null` |",
        "| `data.num_segments` | `2`, `3` | `3` |",
        "| `model.encoder.freeze` | true or false | `false` |",
        "| `run_dir` | text | required |",
        "| `model.encoder.options` | keys and values | `{}` |",
    ],
)
def test_a_row_has_key_type_range_and_default(row: str) -> None:
    assert row in reference()


def test_one_section() -> None:
    text = reference("planning")
    assert text.startswith("## planning\n") and "`planning.planner.noise_beta`" in text and "train.lr" not in text
    assert set(get_type_hints(Config)) - {"run_dir", "seed"} == {
        line.removeprefix("## ") for line in reference().splitlines() if line.startswith("## ")
    }
    for key, meant in (
        ("trian", "train"),
        ("train.step", "train.steps"),
        ("model.encoder.widht", "model.encoder.width"),
    ):
        with pytest.raises(
            UserError, match=rf"no key '{key}' of the config \(did you mean {meant}\?\): it has run_dir, "
        ):
            reference(key)
    for key in ("", ".", "train.", "xyz", "x" * 10_000, "train.lr.x"):
        with pytest.raises(UserError, match="there is no key ") as caught:
            reference(key)
        assert len(str(caught.value)) < 400


def test_every_section_choice_and_key_can_be_asked_for() -> None:
    """Each has the rows of the whole page that begin with it, and no other."""
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    keys = list(dict.fromkeys(dotted_keys(Config)))
    assert {"seed", "model", "model.encoder", "model.encoder.width", "planning.planner.elites"} <= set(keys)
    for key in keys:
        own = [row for row in rows if row.startswith((f"| `{key}`", f"| `{key}."))]
        is_choice = any(row.startswith(f"| `{key}` | choice: ") for row in own)
        printed = [line for line in reference(key).splitlines() if line.startswith("| `")]
        assert printed == own[is_choice:] and printed, key
    text = reference("model.encoder")
    assert text.startswith("## model.encoder\n\nA choice by `model.encoder.name`; the default is `conv3d`.\n")
    assert all(f"### model.encoder: {name}" in text for name in ("conv3d", "resnet", "mlp", "vit_tiny, ", "pretrained"))
    assert "## model.encoder: resnet" in reference("model.encoder.width")
