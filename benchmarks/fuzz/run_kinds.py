"""Configs with overrides, and run folders of strangers."""

import argparse
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import worldmodel
from benchmarks.fuzz.kinds import Case, Kind, require
from benchmarks.fuzz.mutate import ODD_TEXTS, damage_bytes, dumps, mutate_json, mutate_text, odd_value
from data_pipelines.errors import UserError
from data_pipelines.worlds.moving_mnist import write_moving_mnist
from worldmodel import load
from worldmodel.commands import compare
from worldmodel.config import load_config, to_dict, to_yaml
from worldmodel.evaluation.evaluate import evaluate
from worldmodel.report.run_page import report_of_run
from worldmodel.runs.checkpoint import load_checkpoint, save_checkpoint
from worldmodel.runs.opening import load_run_config
from worldmodel.training.loop import train

REPO = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------------- configs

ODD_YAML = (
    *("!!python/object/apply:os.system ['true']", "!!binary x", "!!set {a, b}", "!!timestamp x", "2001-99-99", "0o8"),
    *(
        "&a [*a]",
        "{<<: 1}",
        "{<<: [{a: 1}]}",
        "? [1, 2]\n: 3",
        "- - - x",
        "|",
        ">",
        "'",
        '"',
        "[",
        "{",
        "}",
        "%YAML 9.9",
    ),
    *(
        "~",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
        "0x" + "f" * 5000,
        "9" * 5000,
        "190:20:30",
        "1_000",
        "0b11",
        "yes",
        "=",
        "*a",
    ),
    *(
        "[" * 3000,
        "{a: " * 3000,
        "- " * 3000,
        "\t",
        "---\na: 1",
        "...",
        "\0",
        "\x85",
        "\u2028",
        "\ufeff",
        "x" * 100_000,
    ),
)
ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    + ["run_dir: *a8"]
)


def prepare_configs(seeds: Path) -> None:
    shutil.copytree(REPO / "configs", seeds, ignore=shutil.ignore_patterns("accelerate"), dirs_exist_ok=True)


def odd_yaml(rng: random.Random, value: Any) -> str:
    """Return the YAML of a value, or text that is special in YAML."""
    if rng.random() < 0.5:
        return rng.choice(ODD_YAML)
    text = dumps(rng, value) if rng.random() < 0.5 else _dump_yaml(value)
    return text.strip()


def _dump_yaml(value: Any) -> str:
    try:
        return str(yaml.safe_dump(value, default_flow_style=True, width=10**9))
    except (yaml.YAMLError, ValueError, RecursionError):  # a number of too many digits
        return "x"


def _mutate_yaml(rng: random.Random, text: str) -> bytes:
    """Change the tree of a config, replace a value, or change lines."""
    what = rng.random()
    if what < 0.45:
        tree = mutate_json(rng, yaml.safe_load(text))
        text = rng.choice((_dump_yaml, partial(dumps, rng)))(tree)
    elif what < 0.85:
        lines = text.split("\n")
        at = rng.choice([number for number, line in enumerate(lines) if ":" in line])
        key = lines[at].partition(":")[0]
        value = rng.choice((odd_value(rng), rng.choice(ODD_TEXTS)))
        lines[at] = rng.choice(
            (f"{key}: {odd_yaml(rng, value)}", f"{odd_yaml(rng, value)}: 1", f"{key}:", lines[at] * 2)
        )
        text = "\n".join(lines)
    elif what < 0.88:
        text = rng.choice((ALIASES, ALIASES + "\n" + text, text + "\n" + ALIASES))
    return text.encode("utf-8", "surrogatepass") if rng.random() < 0.7 else mutate_text(rng, text)


def _paths_of(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix]
    return [prefix, *(path for key in tree for path in _paths_of(tree[key], f"{prefix}.{key}" if prefix else key))]


def build_config(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Build a config of the project with changed text or odd overrides."""
    source = rng.choice(sorted(seeds.rglob("*.yaml")))
    for sibling in source.parent.glob("*.yaml"):  # the config may name one as its base
        shutil.copyfile(sibling, folder / sibling.name)
    path = folder / "config.yaml"
    overrides: list[str] = []
    is_good = rng.random() < 0.05
    if is_good or rng.random() < 0.4:
        path.write_bytes(source.read_bytes())
    else:
        path.write_bytes(_mutate_yaml(rng, source.read_text()))
    if not is_good and rng.random() < 0.6:
        keys = _paths_of(to_dict(load_config(source)))
        for _ in range(rng.choice((1, 1, 2, 4))):
            key = rng.choice(keys)
            key = rng.choice((key, key, key, key + ".x", key.upper(), "." + key, key + ".", rng.choice(ODD_TEXTS)[:50]))
            overrides.append(
                rng.choice(("{}={}", "{}={}", "{}={}", "{}", "{}=={}", "{} = {}")).format(
                    key, odd_yaml(rng, odd_value(rng))
                )
            )
    return Case(partial(attempt_config, path, overrides), is_good)


def attempt_config(path: Path, overrides: Sequence[str]) -> str:
    config = load_config(path, overrides)
    again = path.with_name("again.yaml")
    again.write_text(to_yaml(config), encoding="utf-8")
    require(load_config(again) == config, "the config that is written reads otherwise")
    return ""


# --------------------------------------------------------------------------------------------------- run folders

TINY = (
    *("train.steps=2", "train.checkpoint_every=1", "train.eval_every=2", "train.log_every=1", "train.warmup_steps=0"),
    *("data.batch_size=8", "data.num_lanes=4", "data.num_workers=0", "model.encoder.width=0.125", "model.hidden_dim=8"),
    *("model.embedding_dim=8", "evaluation.queries=8", "evaluation.num_samples=4", "evaluation.law_samples=4"),
    *("evaluation.fit_clips=16", "evaluation.selection_clips=16", "tracking.wandb=disabled", "train.precision=fp32"),
    *("train.num_threads=1", "train.timeout_s=60"),
)


def prepare_run(seeds: Path) -> None:
    """Train a tiny run for two steps and evaluate it."""
    write_moving_mnist(seeds / "world", {"train": 16, "selection": 16, "test": 24}, num_processes=1)
    overrides = [*TINY, f"data.root={seeds / 'world'}", f"run_dir={seeds / 'run'}"]
    run = train(load_config(REPO / "configs" / "objectives.yaml", overrides))
    evaluate(load(run, device="cpu"))
    shutil.rmtree(seeds / "world")


def build_run(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Build a run folder with one or two changed files or with links, and a use of it."""
    run, victim = folder / "run", folder / "victim"
    shutil.copytree(seeds / "run", run)
    victim.mkdir()
    (victim / "kept.txt").write_text("mine")
    latest = f"checkpoints/{json.loads((run / 'checkpoints' / 'index.json').read_text())['latest']}"
    is_good = rng.random() < 0.05
    uses = {"load": _load, "report": _report, "compare": _compare, "save": _save}
    use = rng.choice(sorted(uses))
    if not is_good:
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(_FILES_OF[use]).format(latest)
            if rng.random() < 0.12:
                _plant(rng, run, run / name, victim)
            elif (run / name).is_file():
                (run / name).write_bytes(_mutate_file(rng, run / name))
    return Case(partial(_attempt_run, uses[use], run, victim), is_good)


_FILES_OF = {
    "load": (
        "config.yaml",
        "checkpoints/index.json",
        "{}/state.json",
        "{}/model.safetensors",
        "{}/teacher.safetensors",
    ),
    "report": ("config.yaml", "metrics.json", "metrics.json", "metrics.jsonl", "illustrations.safetensors"),
    "compare": ("config.yaml", "metrics.json", "metrics.json", "metrics.jsonl"),
    "save": ("config.yaml", "checkpoints/index.json", "checkpoints/index.json", "{}/state.json"),
}
# Numbers of these sizes are refused by no type, and must not be believed.
BIG_NUMBERS = (1000, 10**6, 10**9, 10**18, 1e300)


def _mutate_file(rng: random.Random, path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return _mutate_safetensors(rng, content)
    text = content.decode()
    if path.suffix == ".yaml":
        if rng.random() < 0.3:  # a size that a stranger may claim
            lines = text.split("\n")
            numbers = [number for number, line in enumerate(lines) if line.split(": ")[-1].replace(".", "").isdecimal()]
            at = rng.choice(numbers)
            lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(BIG_NUMBERS)}"
            return "\n".join(lines).encode()
        return _mutate_yaml(rng, text)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        at = rng.randrange(len(rows))
        rows[at] = mutate_json(rng, rows[at])
        text = "".join(dumps(rng, row) + "\n" for row in rows)
    elif path.name == "index.json" and rng.random() < 0.5:
        tree = json.loads(text)
        odd = rng.choice(("..", "", ".", "../victim", "victim", "step_00000002/..", "step_1", "\0", None, 5, "*", "~"))
        tree[rng.choice(sorted(tree))] = rng.choice((odd, [odd, *tree["kept"]], [*tree["kept"], odd]))
        text = json.dumps(tree)
    else:
        text = dumps(rng, mutate_json(rng, json.loads(text)))
    return text.encode("utf-8", "surrogatepass") if rng.random() < 0.8 else mutate_text(rng, text)


def _mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change the header, its stated size or any bytes, or store numbers that are not finite."""
    what = rng.random()
    length = struct.unpack("<Q", content[:8])[0]
    if what < 0.2:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 8, 2**31, 2**62, 2**64 - 1))) + content[8:]
    if what < 0.7:
        header = mutate_json(rng, json.loads(content[8 : 8 + length]))
        encoded = dumps(rng, header).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]
    if what < 0.8:
        at = 8 + length + 4 * rng.randrange(max(1, (len(content) - 8 - length) // 4))
        return content[:at] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f")) + content[at + 4 :]
    return damage_bytes(rng, content)


def _plant(rng: random.Random, run: Path, path: Path, victim: Path) -> None:
    """Place a link to a file outside of the run, a folder or nothing at the path of a file."""
    what = rng.randrange(6)
    if what == 0:
        path.with_name(f".{path.name}.partial").symlink_to(victim / "kept.txt")
    elif what == 1:
        target = run / rng.choice((".report.html.partial", "report.html"))
        target.unlink(missing_ok=True)
        target.symlink_to(victim / "kept.txt")
    elif what == 2:
        shutil.copytree(run / "checkpoints", victim / "checkpoints")
        (victim / "checkpoints" / "Documents").mkdir()
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").symlink_to(rng.choice((victim / "checkpoints", Path("."))))
    elif what == 3 and path.is_file():
        path.unlink()
        path.mkdir()
    elif what == 4 and path.is_file():
        path.unlink()
        path.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "missing", path.name)))
    elif path.is_file():
        path.unlink()


def _attempt_run(use: Callable[[Path], None], run: Path, victim: Path) -> str:
    before = sorted(victim.rglob("*"))
    had_config = os.path.lexists(run / "config.yaml")
    try:
        use(run)
    finally:
        require((victim / "kept.txt").read_text() == "mine", "a file outside of the run was written")
        require([path for path in before if not path.exists()] == [], "files outside of the run were removed")
        require(os.path.lexists(run / "config.yaml") == had_config, "the run's files were removed")
    return ""


def _load(run: Path) -> None:
    for which in ("latest", "best"):
        worldmodel.load(run, which=which)


def _report(run: Path) -> None:
    report_of_run(run)


def _compare(run: Path) -> None:
    compare.compare_folders(argparse.Namespace(runs=[run], out=run.with_name("comparison")))


def _save(run: Path) -> None:
    """Save one more checkpoint, as a resumed training does; config.yaml stays the same."""
    load_run_config(run)
    checkpoint = load_checkpoint(run)
    if checkpoint is None:
        raise UserError("no checkpoint")
    if not isinstance(checkpoint.state, dict) or not isinstance(checkpoint.state.get("step"), int):
        raise UserError("a state without a step")
    state = {**checkpoint.state, "step": 3}
    save_checkpoint(
        run, type(checkpoint)(checkpoint.model, checkpoint.teacher, checkpoint.optimizer, state), keep=1, is_best=False
    )


KINDS = (
    Kind("config", prepare_configs, build_config),
    Kind("run", prepare_run, build_run),
)
