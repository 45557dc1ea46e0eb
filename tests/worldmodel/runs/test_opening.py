"""Opening the folder of a run: what is replaced, continued and refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from tests.worldmodel.runs.checkpoints import make, saved_steps
from worldmodel import load
from worldmodel.config import Config, TrainConfig, to_dict, to_yaml
from worldmodel.runs.checkpoint import save_checkpoint
from worldmodel.runs.opening import OtherConfigError, RunExistsError, load_run_config, open_run


def opened(config: Config, **flags: bool) -> Path:
    open_run(Path(config.run_dir), to_dict(config), **flags)
    return Path(config.run_dir)


def test_a_run_folder_is_never_overwritten_unasked(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    run = opened(config)
    save_checkpoint(run, make(1), keep=1, is_best=False)
    (run / ".metrics.json.partial").write_text("cut off")
    (run / "wandb").mkdir()
    with pytest.raises(RunExistsError, match=r"already holds a run$"):
        opened(config)
    assert opened(config, resume=True) == run and saved_steps(run)
    opened(config, overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml"]


def test_a_run_that_learned_nothing_is_replaced(tiny_config: Callable[..., Config]) -> None:
    run = opened(tiny_config("train.lr=0.5"))
    (run / "videos.jsonl").write_text("{}\n")
    (run / "wandb").mkdir()
    (run / "metrics.jsonl").touch()
    opened(tiny_config("train.lr=0.25"))
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert opened(tiny_config("train.lr=0.5"), resume=True) == run
    assert load_run_config(run).train.lr == 0.5


@pytest.mark.parametrize("name", ["metrics.jsonl", "notes.txt", "checkpoints/step_00000001/state.json", "report.html"])
def test_a_run_that_may_hold_something_is_kept(tiny_config: Callable[..., Config], name: str) -> None:
    run = opened(tiny_config())
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("{}\n")
    with pytest.raises(RunExistsError):
        opened(tiny_config())
    assert (run / name).read_text() == "{}\n"


@pytest.mark.parametrize("is_lacking", [False, True], ids=["with a comment", "without a key"])
def test_a_config_that_a_person_wrote_is_kept(tiny_config: Callable[..., Config], is_lacking: bool) -> None:
    default = f"train.log_every={TrainConfig().log_every}"
    config = tiny_config(default)
    run = Path(config.run_dir)
    run.mkdir()
    text = re.sub(r" *log_every: .*\n", "", to_yaml(config)) if is_lacking else "# notes\n" + to_yaml(config)
    (run / "config.yaml").write_text(text)
    assert text != to_yaml(config)
    with pytest.raises(RunExistsError):
        opened(config)
    opened(config, resume=True)
    assert (run / "config.yaml").read_text() == text
    changed = tiny_config(default, "data.num_workers=3")
    opened(changed, resume=True)
    assert load_run_config(run) == changed
    opened(config, overwrite=True)
    assert (run / "config.yaml").read_text() == to_yaml(config)


@pytest.mark.parametrize("foreign", ["notes.txt", "src/main.py", ".git/HEAD", "checkpoints/mine.txt", ".notes.partial"])
def test_overwriting_removes_nothing_but_a_run(tiny_config: Callable[..., Config], foreign: str) -> None:
    run = opened(tiny_config())
    save_checkpoint(run, make(1), keep=1, is_best=False)
    (run / foreign).parent.mkdir(exist_ok=True)
    (run / foreign).write_text("precious")
    with pytest.raises(UserError, match=f"holds '{foreign.split('/')[0]}.*does not belong to a run"):
        opened(tiny_config(), overwrite=True)
    assert (run / foreign).read_text() == "precious" and saved_steps(run)


def test_overwriting_needs_the_config_of_a_run(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("site: mine\n")
    with pytest.raises(UserError, match="site"):
        opened(tiny_config(), overwrite=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "site: mine\n"


@pytest.mark.parametrize("name", ["wandb", "checkpoints"])
def test_overwriting_follows_no_link(tiny_config: Callable[..., Config], tmp_path: Path, name: str) -> None:
    run = opened(tiny_config())
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.tex").write_text("years")
    (run / name).symlink_to(documents)
    if name == "checkpoints":
        with pytest.raises(UserError, match="does not belong to a run"):
            opened(tiny_config(), overwrite=True)
    else:
        opened(tiny_config(), overwrite=True)
        assert not (run / name).exists()
    assert (documents / "thesis.tex").read_text() == "years"


def test_a_folder_that_is_no_run_is_never_touched(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="does not hold a run"):
            opened(tiny_config(), **flags)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years"


def test_resuming_with_another_config_names_each_key_and_both_values(
    tiny_config: Callable[..., Config],
) -> None:
    run = opened(tiny_config())
    save_checkpoint(run, make(1), keep=1, is_best=False)
    with pytest.raises(OtherConfigError) as caught:
        opened(tiny_config("train.lr=0.5", "train.log_every=2", "model.latent=none"), resume=True)
    assert str(caught.value).startswith(f"run_dir={run} was trained with another config: ")
    changes = str(caught.value).partition("config: ")[2].split("; ")
    assert {change.split("=")[0] for change in changes} == {
        "train.lr",
        *(f"model.latent.{key}" for key in ("name", "dim", "posterior_sees", "prior", "prior_components")),
    }
    assert "train.lr=0.002, now 0.5" in changes and "model.latent.name='gaussian', now 'none'" in changes
    many = [f"evaluation.{key}=7" for key in ("queries", "num_samples", "law_samples", "fit_clips", "selection_clips")]
    with pytest.raises(OtherConfigError, match=r"; and 2 more$") as caught:
        opened(tiny_config("seed=1", *many, "train.steps=7", "train.lr=1", "data.clip_step=1", "data.cache_mb=1",
                             f"evaluation.label={'x' * 255}"), resume=True)  # fmt: skip
    assert str(caught.value).count("; ") == 8 and len(str(caught.value)) < 800
    opened(tiny_config("data.num_workers=1", "train.log_every=2"), resume=True)


def test_loading_what_is_no_run(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="no run in"):
        load(tmp_path)
    run = opened(tiny_config())
    for which in ("latest", "best"):
        with pytest.raises(UserError, match="has no checkpoint yet"):
            load(run, which=which)
    save_checkpoint(run, make(1), keep=1, is_best=False)  # as of a training that ended before its first evaluation
    with pytest.raises(UserError, match="has no best checkpoint yet, as its training has not been evaluated"):
        load(run, which="best")
