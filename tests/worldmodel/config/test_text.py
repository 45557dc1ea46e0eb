"""Keys that hold text take it as it is; YAML of strangers is read within bounds, and refused in one short line."""

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import pytest
from pydantic import Field

from data_pipelines.errors import UserError
from data_pipelines.text_files import MAX_YAML_BYTES, MAX_YAML_NODES, is_optional, is_text, kind_of_items, shown
from data_pipelines.worlds.recorder import parse_kwargs
from tests.conftest import REPO, videos_of
from worldmodel.config import Config, flatten, load_config, to_dict, to_yaml, validate
from worldmodel.config.kinds import choice_of, members_of
from worldmodel.runs.opening import load_run_config

DEMO = REPO / "configs" / "objectives.yaml"
# What YAML reads as something else, or as less.
TEXTS = (
    *("runs/exp #3", "#3", "2024-05-01", "007", "no", "off", "~", "a: b", "[x]", "{x", "1e-3", "1_000", "0x1f"),
    *("trailing  ", " leading", "'quoted'", '"quoted"', "*star", "&anchor", "!tag", "%percent", "@at", "- item"),
    *("two\nlines", "tab\there", "\x1b[2J", "\x85", "\u2028", "\ufeffbom", "ünïcode", "日本", "|", ">", "?"),
)


def keys_of_text(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of the config that hold text, and their types."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if choice_of(hint):
            for member in members_of(hint).values():
                yield from keys_of_text(member, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(hint):
            yield from keys_of_text(hint, f"{prefix}{name}.")
        elif is_text(hint):
            yield prefix + name, hint


KEYS = dict(keys_of_text())
DEMO_KEYS = flatten(to_dict(load_config(DEMO)))
FREE_KEYS = [key for key, kind in KEYS.items() if key in DEMO_KEYS and not key.endswith((".name", ".source"))]
FREE_KEYS = [key for key in FREE_KEYS if not str(KEYS[key]).startswith("typing.Literal")]


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_the_keys_of_text_are_found_by_their_types() -> None:
    assert {"run_dir", "data.root", "data.camera", "tracking.project", "model.latent.name", "data.change"} <= set(KEYS)
    assert not {"train.steps", "data.num_segments", "data.fps", "objective.beta", "model.encoder.freeze"} & set(KEYS)
    assert is_text(Annotated[Literal["a", "b"] | None, Field()]) and is_optional(Annotated[str | None, Field()])
    assert not is_text(Literal["a", 2]) and not is_text(str | int) and not is_text(tuple[str, ...]) and not is_text(Any)
    assert kind_of_items(tuple[str, ...] | None) is str and kind_of_items(tuple[float, str]) is Any


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_text_is_taken_as_it_is(text: str) -> None:
    config = load_config(DEMO, [f"run_dir={text}", f"data.action_label={text}", f"tracking.project={text}"])
    assert (config.run_dir, videos_of(config).action_label, config.tracking.project) == (text, text, text)


def test_the_home_folder_at_the_beginning_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves ~/ within an argument as it is, and then a folder with that name was made."""
    monkeypatch.setenv("HOME", "/home/me")
    roots = "data.root=[{path: ~/videos}, {path: ~other/videos}]"
    config = load_config(DEMO, ["run_dir=~/runs/a", "train.start_from=~/runs/b", roots, "data.camera=~/c"])
    assert (config.run_dir, config.train.start_from) == ("/home/me/runs/a", "/home/me/runs/b")
    videos = videos_of(config)
    paths = [root.path for root in videos.root if not isinstance(root, str)]
    assert paths == ["/home/me/videos", "~other/videos"] and videos.camera == "~/c"
    assert videos_of(load_config(DEMO, ["data.root=~/a/~/b"])).root == "/home/me/a/~/b"


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_file_of_a_run(text: str, tmp_path: Path) -> None:
    config = load_config(DEMO, [f"run_dir={text}", f"data.camera={text}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_run_config(tmp_path) == config


def test_null_and_nothing_are_null_where_a_key_may_be_null_and_text_elsewhere() -> None:
    optional = [key for key in FREE_KEYS if is_optional(KEYS[key])]
    assert optional
    for text in ("null", ""):
        config = load_config(DEMO, [f"{key}={text}" for key in optional])
        filled = {"model.embedding_norm": "sphere"}  # the default of the objective
        assert {key: value_of(config, key) for key in optional} == dict.fromkeys(optional) | filled
    assert videos_of(load_config(DEMO, ["data.camera=Null"])).camera == "Null"
    assert load_config(DEMO, ["run_dir=null"]).run_dir == "null"
    for key in FREE_KEYS:
        if not is_optional(KEYS[key]):
            with pytest.raises(UserError, match=f"{key} is empty"):
                load_config(DEMO, [f"{key}="])


@pytest.mark.parametrize("text", ["2024-05-01", "007", "no", "1e-3", "0x1f", "12:30:00", "1.0", "true", "="])
def test_a_file_needs_no_quotes_for_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"run_dir: {text} # a remark\ndata: {{root: {text}, camera: {text}}}\n")
    config = load_config(path)
    assert (config.run_dir, videos_of(config).root, videos_of(config).camera) == (text, text, text)
    path.write_text("run_dir: runs/x\ndata: {camera: null, remote_cache_dir: }\n")
    assert videos_of(load_config(path)).camera is None
    path.write_text("run_dir:\n")
    with pytest.raises(UserError, match=r"run_dir=None: .*string"):
        load_config(path)


@pytest.mark.parametrize("text", ["a\0b", "x" * 3000, "/".join(["ü" * 128]), "\ud800", "caf\udce9"])
def test_a_name_that_no_file_can_have_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="run_dir="):
        validate({"run_dir": text}, "here")
    assert videos_of(load_config(DEMO, [f"data.root=https://host/{'x' * 300}"])).place.endswith("xxx")


def test_several_ways_of_a_mistake_are_short() -> None:
    tree = {"run_dir": ["x" * 1000] * 1000, **{f"key{i}": "y" * 10_000 for i in range(1000)}, "a\x1b[2J\n": 1}
    with pytest.raises(UserError, match="and 997 more") as caught:
        validate(tree, "here")
    assert len(str(caught.value)) < 5_000 and "\n" not in str(caught.value)
    assert len(shown(10**6000)) < 100 and len(shown([[[["x"] * 99] * 99] * 99] * 99)) < 2_000


# ------------------------------------------------------------------------------------------------ hostile YAML

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    + ["run_dir: *a8"]
)
HOSTILE = {
    "aliases": (BOMB, "anchors and aliases"),
    "itself": ("&a [*a]", "anchors and aliases"),
    "alias": ("run_dir: *a", "anchors and aliases"),
    "merged": ("run_dir: x\ndata:\n  <<: {size_px: 64}\n", "unknown key 'data.<<'"),
    "deep": ("run_dir: " + "[" * 3000 + "]" * 3000, "nested more than 32 deep"),
    "deep_keys": ("{a: " * 3000 + "1" + "}" * 3000, "nested more than 32 deep"),
    "deep_blocks": ("- " * 3000 + "x", "nested more than 32 deep"),
    "many": ("run_dir: x\ndata: [" + "a, " * MAX_YAML_NODES + "]", "more than 10,000 values"),
    "large": ("run_dir: " + "x" * MAX_YAML_BYTES, "larger than 1,048,576 bytes"),
    "twice": ("run_dir: a\nseed: 1\nrun_dir: b\n", "the key 'run_dir' is given twice"),
    "twice_inside": ("run_dir: a\ntrain: {steps: 1, lr: 1, steps: 2}\n", "the key 'steps' is given twice"),
    "tag": ("run_dir: !!python/object/apply:os.getcwd []\n", "tag 'tag:yaml.org,2002:python/object/apply"),
    "binary": ("run_dir: !!binary aGk=\n", "tag 'tag:yaml.org,2002:binary'"),
    "own_tag": ("run_dir: !x a\n", "tag '!x'"),
    "tag_of_the_whole": ("!!set {run_dir}", "tag 'tag:yaml.org,2002:set'"),
    "listed_key": ("? [run_dir]\n: x\n", "a key is not text"),
    "tab": ("run_dir: x\ntrain:\n\tsteps: 1\n", "found character '\\t'"),
    "control": ("run_dir: a\x07b\n", "special characters are not allowed"),
    "two_documents": ("run_dir: a\n---\nrun_dir: b\n", "expected a single document"),
    "unended": ('run_dir: "a', "end of stream"),
    "list": ("[run_dir]", "must hold keys and values, not list"),
    "nothing": ("", "must hold keys and values, not NoneType"),
    "remark": ("# nothing\n", "must hold keys and values, not NoneType"),
    "text": ("run_dir", "must hold keys and values, not str"),
    "long_integer": (f"run_dir: a\nseed: {'9' * 5000}\n", "seed='9999"),
    "long_float": (f"run_dir: a\ntrain: {{lr: {'9' * 5000}.0}}\n", "train.lr=inf"),
    "no_date": ("run_dir: a\nseed: 2001-99-99\n", "seed='2001-99-99'"),
}


@pytest.mark.parametrize(("text", "tells"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_one_short_line_at_once(text: str, tells: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    for read in (load_config, lambda path: load_run_config(path.parent)):
        started_s = time.process_time()
        with pytest.raises(UserError) as caught:
            read(path)
        assert time.process_time() - started_s < 5
        message = str(caught.value)
        assert tells in message and str(path) in message and "\n" not in message and len(message) < 1_500


def test_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("run_dir: ünïcode\n".encode("utf-8-sig"))
    assert load_config(path).run_dir == "ünïcode"
    path.write_bytes(b"run_dir: a\r\ntrain:\r\n  steps: 3\r\n")
    assert load_config(path).run_dir == "a" and load_config(path).train.steps == 3
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        path.write_bytes("run_dir: ünïcode\n".encode(encoding))
        with pytest.raises(UserError, match=r"UTF-8|special characters"):
            load_config(path)


def test_a_config_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (
            tmp_path / "fifo",
            tmp_path / "socket",
            tmp_path,
            Path("/dev/zero"),
            tmp_path / "no",
            tmp_path / "a\0b",
            tmp_path / ("x" * 999),
        ):
            with pytest.raises(UserError, match="cannot read config"):
                load_config(path)
    for name in ("a\0b", "x" * 999):
        with pytest.raises(UserError, match="is neither a file nor a shipped config"):
            load_config(name)


def test_arguments_of_an_environment_are_read_within_the_same_bounds() -> None:
    assert parse_kwargs(["slip=0.1", "layout=random", "day=2001-99-99"]) == {
        "slip": 0.1,
        "layout": "random",
        "day": "2001-99-99",
    }
    for value in ("[" * 3000, "&a [*a]", "!!binary x"):
        with pytest.raises(UserError, match="must read NAME=VALUE"):
            parse_kwargs([f"a={value}"])
