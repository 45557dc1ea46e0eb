"""Exported runs: they load as the original does, and hold nothing private."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import worldmodel
from data_pipelines.errors import UserError
from tests.conftest import videos_of
from worldmodel.commands.main import main
from worldmodel.config import load_config
from worldmodel.report.numbers import number
from worldmodel.report.tables import column_digits
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import read_metrics
from worldmodel.runs.model_card import model_card
from worldmodel.runs.travel import public_path

CLIP = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
CHECKPOINT = "checkpoints/step_00000006"
FILES = {
    *(
        "README.md",
        "config.yaml",
        "metrics.json",
        "readout.safetensors",
        "surprise.safetensors",
        "checkpoints/index.json",
    ),
    *(f"{CHECKPOINT}/{name}" for name in ("model.safetensors", "teacher.safetensors", "state.json")),
}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_an_exported_run_computes_the_same(evaluated_run: Path, tmp_path: Path) -> None:
    run = worldmodel.load(evaluated_run)
    exported = worldmodel.load(worldmodel.export(run, tmp_path / "exported"))
    assert files_in(tmp_path / "exported") == FILES
    assert torch.equal(exported.rollout(CLIP, 2, 3), run.rollout(CLIP, 2, 3))
    assert torch.equal(exported.forecast(CLIP, 2, 3), run.forecast(CLIP, 2, 3))
    assert torch.equal(exported.target_encoder(CLIP), run.target_encoder(CLIP))
    video = torch.cat([*CLIP, CLIP[0]])
    threshold = run.surprise(video, false_alarms=0.25).threshold
    assert threshold is not None and exported.surprise(video, false_alarms=0.25).threshold == threshold
    assert read_metrics(tmp_path / "exported") == read_metrics(evaluated_run)
    again = worldmodel.load(worldmodel.export(exported, tmp_path / "again"), which="best")
    assert torch.equal(again.encode(CLIP), run.encode(CLIP))


def test_no_private_path_is_exported(evaluated_run: Path, world: Path, tmp_path: Path) -> None:
    folder = worldmodel.export(worldmodel.load(evaluated_run), tmp_path / "exported")
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(str(private.parent).encode() in content for private in (world, evaluated_run, folder)), path
    config = load_config(folder / "config.yaml")
    assert (videos_of(config).root, config.run_dir) == (world.name, "exported")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/moving_mnist", "data/moving_mnist"),
        ("/home/name/videos", "videos"),
        ("~/videos", "videos"),
        ("../../name/videos", "videos"),
        ("C:\\Users\\name\\videos", "videos"),
        ("/", "data"),
        ("https://name:secret@host/videos?key=secret#part", "https://host/videos"),
        ("s3://bucket/videos", "s3://bucket/videos"),
    ],
)
def test_private_parts_of_paths(path: str, expected: str) -> None:
    assert public_path(path) == expected


def test_the_run_that_the_weights_started_from_is_named(evaluated_run: Path, tmp_path: Path) -> None:
    run = worldmodel.load(evaluated_run)
    train = dataclasses.replace(run.config.train, start_from="/home/name/runs/first")
    started = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    folder = worldmodel.export(started, tmp_path / "exported")
    assert load_config(folder / "config.yaml").train.start_from == "first"
    card = (folder / "README.md").read_text()
    assert "after its weights were trained in first on the data of that run. The scores" in card
    assert "- the private part of train.start\\_from, which is now first\n" in card and "/home" not in card
    assert "start\\_from" not in worldmodel.export(run, tmp_path / "other").joinpath("README.md").read_text()


def test_scores_of_another_checkpoint_are_left_out(evaluated_run: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated_run, tmp_path / "run")
    metrics = json.loads((evaluated_run / "metrics.json").read_text())
    metrics["train"]["steps"] = 4
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    folder = worldmodel.export(worldmodel.load(tmp_path / "run"), tmp_path / "exported")
    assert files_in(folder) == FILES - {"metrics.json", "readout.safetensors", "surprise.safetensors"}
    assert "they belong to step 4, not to step 6" in (folder / "README.md").read_text()


def test_the_card(evaluated_run: Path, tmp_path: Path) -> None:
    run = worldmodel.load(evaluated_run)
    metrics = read_metrics(evaluated_run)
    assert metrics is not None
    text = worldmodel.export(run, tmp_path / "exported").joinpath("README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "worldmodel" and "world-model" in front["tags"]
    assert not {"license", "pipeline_tag"} & set(front)
    assert 'worldmodel.load("exported")' in text and text.startswith("---\n")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    oracle = metrics["forecasts"]["simulator_oracle"]["energy_score"][0]
    climatology = metrics["embedding"]["forecasts"]["climatology"]["energy_score"][0]
    assert isinstance(oracle, float) and f"{oracle:.3f}" in rows["Simulator oracle"]
    digits = column_digits(metrics, "energy_score.0", 3, "embedding.forecasts")
    assert isinstance(climatology, float) and number(climatology, digits) in rows["Climatology"]
    metrics["quantity"] = {"name": "x", "unit": "<script>|\n# y"}
    card = model_card(run, run.config, metrics, "a", ["<b>"], has_decoder=True)
    assert "embeddings, not frames" in text and "refinement" not in rows and "embeddings, not frames" not in card
    assert "<script>" not in card and "\n# y" not in card


def test_a_run_that_was_not_evaluated(trained_run: Path, tmp_path: Path) -> None:
    folder = worldmodel.export(worldmodel.load(trained_run), tmp_path / "exported")
    assert files_in(folder) == FILES - {"metrics.json", "readout.safetensors", "surprise.safetensors"}
    assert "The run was not evaluated" in (folder / "README.md").read_text()


def test_training_cannot_continue_from_an_export(
    trained_run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worldmodel.export(worldmodel.load(trained_run), tmp_path / "exported")
    shutil.copytree(world, tmp_path / world.name)
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "exported" / "config.yaml", ["tracking.wandb=disabled"])
    with pytest.raises(UserError, match="exported was exported without optimiser state: its training cannot be"):
        worldmodel.train(config, resume=True)


def test_programs_that_fail_leave_an_empty_folder(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the user, which may be a link."""

    def fail(folder: Path, *_: object) -> None:
        (folder / "encoder.pt2").write_bytes(b"half")
        raise UserError("these networks cannot be exported")

    monkeypatch.setattr("worldmodel.runs.travel.write_programs", fail)
    (tmp_path / "disk").mkdir()
    (tmp_path / "exported").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match="these networks cannot be exported"):
        worldmodel.export(worldmodel.load(trained_run), tmp_path / "exported", programs=True)
    assert (tmp_path / "exported").is_symlink() and not any((tmp_path / "disk").iterdir())


def test_an_export_that_fails_can_be_repeated(evaluated_run: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated_run, tmp_path / "run")
    surprise = RunFolder(tmp_path / "run").surprise
    intact = surprise.read_bytes()
    surprise.write_bytes(intact[:100])
    with pytest.raises(UserError, match="damaged"):
        worldmodel.export(worldmodel.load(tmp_path / "run"), tmp_path / "exported")
    surprise.write_bytes(intact)
    assert worldmodel.export(worldmodel.load(tmp_path / "run"), tmp_path / "exported").is_dir()


def test_only_a_new_folder_is_written(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: export to a new folder"):
        worldmodel.export(worldmodel.load(trained_run), tmp_path)
    with pytest.raises(UserError, match="cannot write to"):
        worldmodel.export(worldmodel.load(trained_run), tmp_path / "notes.txt")
    for folder in (tmp_path / "\udcff", tmp_path / "\udcff" / "new"):
        with pytest.raises(UserError, match=r"\\udcff.*: the name is not UTF-8"):
            worldmodel.export(worldmodel.load(trained_run), folder)
    assert files_in(tmp_path) == {"notes.txt"}


def test_the_command(evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(evaluated_run), str(tmp_path / "out"), "--checkpoint", "best"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert files_in(tmp_path / "out") == FILES
    with pytest.raises(SystemExit):
        main(["push", str(evaluated_run), "noowner"])
    assert capsys.readouterr().err.endswith("'noowner' is not a valid name of a repository: give owner/name\n")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "latest: step 6" in capsys.readouterr().out
