"""Configs from strangers: refused in one line, in little time, whatever is in them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data_pipelines.generated import DEEP, EXAMPLES, JSON, result_or_refusal
from tests.worldmodel.config.test_parser import DEMO, KEYS
from worldmodel.config import load_config, validate

ODD_YAML = (
    *("9" * 5000, "2001-99-99", "!!timestamp x", "!!int x", "!!float x", "!!bool x", "=", "{<<: 1}", "? [1, 2]\n: 3"),
    *("&a [*a]", "\x85", "\u2028", "\x1b[2J", ".nan", "1e999", "{1: 2}", "!!binary x", "!!set {a}"),
    *(DEEP[0], "- " * 3000, "{a: " * 3000),
)


@pytest.mark.parametrize("value", ODD_YAML, ids=range(len(ODD_YAML)))
def test_odd_yaml_is_refused(tmp_path: Path, value: str) -> None:
    """As an override, as a value in the file, and as the file."""
    assert result_or_refusal(lambda: load_config(DEMO, [f"train.steps={value}"])) is None
    path = tmp_path / "config.yaml"
    for text in (f"run_dir: r\ntrain:\n  steps: {value}\n", value):
        path.write_text(text, encoding="utf-8")
        assert result_or_refusal(lambda: load_config(path)) is None


@EXAMPLES
@given(st.sampled_from(KEYS), JSON)
@example("train.steps", "\x1b[2J")
@example("train.steps", "x" * 10**6)
@example("data.root", "a\nb")
def test_any_value_of_a_key_is_taken_or_refused(key: str, value: Any) -> None:
    tree: dict[str, Any] = {"run_dir": "r"}
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    result_or_refusal(lambda: validate(tree, source="config.yaml"))


@EXAMPLES
@given(JSON)
@example({"\x1b[2J": 1})
@example({"a\nb": 1})
@example({"": {"": 1}})
def test_any_tree_is_taken_or_refused(tree: Any) -> None:
    if isinstance(tree, dict):
        result_or_refusal(lambda: validate({"run_dir": "r"} | tree, source="config.yaml"))


@EXAMPLES
@given(st.text(max_size=20))
@example("")
@example("=")
@example("train.steps")
@example(".=1")
@example("train.=1")
def test_what_is_no_override_is_refused(text: str) -> None:
    result_or_refusal(lambda: load_config(DEMO, [text]))
