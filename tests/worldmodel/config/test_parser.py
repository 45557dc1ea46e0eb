"""Properties of the configuration's parser."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import UserError
from data_pipelines.text_files import dump_yaml, parse_yaml
from tests.conftest import REPO
from tests.data_pipelines.generated import EXAMPLES, result_or_refusal
from worldmodel.config import apply_override, flatten, load_config, to_dict, to_yaml

DEMO = REPO / "configs" / "objectives.yaml"
KEYS = sorted(flatten(to_dict(load_config(DEMO))))
TEXT = st.text(st.characters(categories=["L", "N", "P"], max_codepoint=0xFFFF), max_size=10)
PLAIN = st.one_of(st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False), TEXT)


@EXAMPLES
@given(st.sampled_from(KEYS), PLAIN | st.lists(PLAIN, max_size=3))
def test_an_override_sets_its_key_and_no_other(key: str, value: Any) -> None:
    tree: dict[str, Any] = {"run_dir": "r", "model": {"width": 1}}
    text = json.dumps(value, ensure_ascii=True)
    apply_override(tree, f"{key}={text}")
    found = flatten(tree)
    # Keys of text take it as it is, and null for None; a text that is written for another key is that of the JSON.
    is_text = found[key] == text or (found[key] is None and value is None)
    assert is_text or found[key] == value
    assert {name: found[name] for name in found if name != key} == {
        name: default for name, default in {"run_dir": "r", "model.width": 1}.items() if name != key
    }


@EXAMPLES
@given(st.integers(1, 10**6), st.floats(1e-9, 1e3), st.integers(0, 2**31))
def test_a_config_that_is_written_reads_the_same(tmp_path: Path, steps: int, lr: float, seed: int) -> None:
    overrides = [f"train.steps={steps}", f"train.lr={lr!r}", f"seed={seed}"]
    config = result_or_refusal(lambda: load_config(DEMO, overrides))
    assert config is not None and (config.train.steps, config.train.lr, config.seed) == (steps, lr, seed)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(written) == config


@EXAMPLES
@given(PLAIN | st.from_regex(r"[-+]?[0-9_.:eE\-+xob~]{1,6}", fullmatch=True))
def test_values_of_any_type_survive_the_file_of_a_run(value: Any) -> None:
    tree = {"options": {"value": value, "more": [value]}}
    read = parse_yaml(dump_yaml(tree))
    assert read == tree and type(read["options"]["value"]) is type(value)


@EXAMPLES
@given(st.integers(-(10**20), 10**20), st.integers(0, 9))
def test_zeros_in_front_of_a_number_mean_nothing(number: int, zeros: int) -> None:
    assert parse_yaml(f"{'-' * (number < 0)}{'0' * zeros}{abs(number)}") == number


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("08", 8), ("+0_7", 7), ("0x1F", 31), ("0b101", 5)])
def test_whole_numbers_are_those_that_are_written(text: str, value: int) -> None:
    assert load_config(DEMO, [f"seed={text}"]).seed == value


@pytest.mark.parametrize("override", ["seed=1:30", "train.lr=1:30", "train.lr=1:30.5", "seed=0o17", "seed=0x_"])
def test_what_is_no_number_is_not_taken_for_one(override: str) -> None:
    with pytest.raises(UserError, match=r"input should be a valid (integer|number)"):
        load_config(DEMO, [override])
