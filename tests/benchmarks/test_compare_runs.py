"""benchmarks/compare_runs.py, on checkouts whose scripts write given files, and on this one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.compare_runs import (
    CASES,
    DIFFERS,
    EQUAL,
    FAILED,
    NONE,
    Result,
    as_text,
    compare,
    difference_of_tensors,
    difference_of_values,
    last_line,
    main,
    write_config,
)
from tests.conftest import REPO
from worldmodel.config import choices, load_config

SCRIPT = """
import pathlib, shutil, sys
here, run = pathlib.Path(__file__).parents[1], pathlib.Path("{run}")
{code}
"""
TRAIN = "assert pathlib.Path(sys.argv[2]).stem == run.name\nshutil.copytree(here / 'run', run)"
ROW = '{"step": 1, "split": "train", "loss": 0.5, "step_s": %s, "tflops": %s}\n'
METRICS = '{"run": "byol", "train": {"seconds": %s, "steps": 5}, "forecasts": {"model": {"energy_score": [1.5, %s]}}}'


def fake_checkout(root: Path, *, case: str = "causal_infonce", command: bool = False) -> Path:
    """A checkout that copies its folder run/ where a training would write; as a command, or as scripts."""
    checkpoint = root / "run" / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.ones(2), "bias": torch.zeros(1)}, checkpoint / "model.safetensors")
    seconds = str(float(len(root.name)))
    (root / "run" / "metrics.jsonl").write_text(ROW % (seconds, seconds))
    (root / "run" / "metrics.json").write_text(METRICS % (seconds, "NaN"))
    (root / "worldmodel").mkdir()
    if command:
        code = f"if sys.argv.pop(1) == 'train':\n    {TRAIN.splitlines()[0]}\n    {TRAIN.splitlines()[1]}"
        (root / "worldmodel" / "__main__.py").write_text(SCRIPT.format(run=case, code=code))
    else:
        (root / "scripts").mkdir()
        (root / "scripts" / "train.py").write_text(SCRIPT.format(run=case, code=TRAIN))
        (root / "scripts" / "evaluate.py").write_text("import sys\nassert sys.argv[1] == '--run'")
    return root


@pytest.fixture
def checkouts(tmp_path: Path) -> tuple[Path, Path]:
    """Two that differ in times alone; the second has a command in place of scripts."""
    return fake_checkout(tmp_path / "one"), fake_checkout(tmp_path / "second", command=True)


def compared(checkouts: tuple[Path, Path], out: Path) -> Result:
    [result] = compare(*checkouts, ["causal_infonce"], out)
    return result


def test_runs_that_differ_in_times_alone_are_equal(
    checkouts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*map(str, checkouts), "--cases", "causal_infonce", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["causal_infonce", EQUAL, EQUAL, EQUAL, NONE]
    assert lines[2].startswith("1 of 1 cases equal") and len(lines) == 3
    with pytest.raises(SystemExit):
        main(arguments)  # the folder is not empty now
    assert "not an empty folder" in capsys.readouterr().err


def test_each_kind_of_difference_is_reported(
    checkouts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkouts[1] / "run"
    weights = {"weight": torch.tensor([1.0, 1.25]), "bias": torch.zeros(1)}
    save_file(weights, run / "checkpoints" / "step_00000005" / "model.safetensors")
    (run / "metrics.jsonl").write_text((ROW % (1, 2)).replace("0.5", "0.25"))
    (run / "metrics.json").write_text(METRICS % (1, 2.0))
    assert main([*map(str, checkouts), "--cases", "causal_infonce"]) == 1
    printed = capsys.readouterr().out
    for text in (
        "losses: 1 of 1 rows, first step 1 (train): loss: old 0.5, new 0.25",
        "weights: 1 of 2 tensors, first model/weight, largest absolute difference 0.25 in model/weight",
        "metrics: forecasts.model.energy_score[1]: old NaN, new 2.0",
        "0 of 1 cases equal",
    ):
        assert text in printed


def test_a_missing_row_is_reported(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    rows = checkouts[0] / "run" / "metrics.jsonl"
    rows.write_text(rows.read_text() * 2)
    result = compared(checkouts, tmp_path / "out")
    assert result.details == ["causal_infonce, losses: old has 2 rows, new has 1"]


def test_a_failed_training_is_reported_by_its_last_line(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    (checkouts[0] / "scripts" / "train.py").write_text("raise SystemExit('first\\nerror: no such key\\n')")
    result = compared(checkouts, tmp_path / "out")
    assert result.details == ["causal_infonce, losses: old failed: train: exit code 1: error: no such key"]
    assert list(result.cells.values()) == [FAILED, NONE, NONE, NONE]


def test_what_precedes_the_messages_of_torchrun_is_the_last_line() -> None:
    stderr = "error: bad\n\nW1 torch/distributed/elastic/api.py:1] Sending\nTraceback\nChildFailedError: x\n====\n"
    assert last_line(stderr) == "error: bad"
    assert last_line("") == "no output"


def test_names_shapes_and_values_of_tensors_are_compared() -> None:
    old = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.tensor(float("nan"))}
    assert difference_of_tensors(old, {name: value.clone() for name, value in old.items()}) == ""
    new = {"a": -torch.zeros(2), "b": torch.ones(3), "e": torch.ones(2), "d": torch.tensor(float("nan"))}
    assert difference_of_tensors(old, new) == (
        "1 names only in old, first c; 1 names only in new, first e; "
        "b is torch.float32 [2] in old, torch.float32 [3] in new; "
        "1 of 2 tensors, first a, largest absolute difference 0 in a"
    )
    assert difference_of_tensors({}, {}) == "old has no tensors"


def test_values_are_compared_by_place_and_bits() -> None:
    old = as_text({"a": [1.0, {"b": None}], "seconds": 1, "c": {}}, frozenset({"seconds"}))
    assert old == {"a[0]": "1.0", "a[1].b": "null", "c": "{}"}
    assert (
        difference_of_values({"x": "0.0", "y": "1"}, {"x": "-0.0", "z": "1"}) == "x: old 0.0, new -0.0, and 2 more of 3"
    )


def test_the_cases_are_valid_and_cover_the_choices(tmp_path: Path) -> None:
    configs = [load_config(write_config(name, case, tmp_path)) for name, case in CASES.items()]
    assert {config.objective.name for config in configs} == set(choices("objective"))
    assert {config.model.encoder.name for config in configs} == {"conv3d", "resnet", "mlp", "vit_tiny"}
    assert {config.model.latent.name for config in configs} == set(choices("model.latent"))
    # Checkouts to compare with do not know these editors and images yet.
    assert {config.model.editor.name for config in configs} == set(choices("model.editor")) - {"linear", "blocks"}
    assert {config.data.source for config in configs} == set(choices("data")) - {"images"}
    assert {getattr(config.model.latent, "prior", "mixture") for config in configs} == {"mixture", "flow"}


@pytest.mark.slow
def test_this_checkout_equals_itself_and_not_a_changed_one(tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    for name in ("worldmodel", "data_pipelines", "scripts"):
        shutil.copytree(REPO / name, changed / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert compared((REPO, changed), tmp_path / "same").is_equal()
    with (changed / "worldmodel" / "__init__.py").open("a") as file:
        file.write("\nfrom torch.nn import functional\n\nexact = functional.cross_entropy\n")
        file.write("functional.cross_entropy = lambda *arguments: 1.001 * exact(*arguments)\n")
    result = compared((REPO, changed), tmp_path / "differing")
    assert list(result.cells.values()) == [DIFFERS, DIFFERS, DIFFERS, NONE]
