"""The examples of docs/extending.md run, and only if the user allows it."""

import re
import shutil
import sys
from collections.abc import Callable
from importlib import invalidate_caches
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY, run_processes
from tests.worldmodel.config.test_keys import plan_once
from worldmodel import parts
from worldmodel.build import build_model
from worldmodel.commands.main import main
from worldmodel.commands.plan import planning_config
from worldmodel.config import Config, Conv3dConfig, kinds, load_config, outside_names, to_dict, to_yaml
from worldmodel.evaluation.evaluate import evaluate
from worldmodel.nets.encoders import Encoder
from worldmodel.planning.planners import make_planner, shift, start
from worldmodel.runs.checkpoint import load_checkpoint
from worldmodel.runs.trained_run import load
from worldmodel.runs.travel import export
from worldmodel.sources import make_source
from worldmodel.training.loop import train

PAGE = (REPO / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (my_\w+)\.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
CHOICES = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
SECTIONS = dict(zip(FILES, CHOICES, strict=True))
NETWORKS = ("my_encoder", "my_latent", "my_editor", "my_objective")
FEW = [override for override in TINY if not override.startswith(("data.", "model.encoder."))]
FEW = [*FEW, "train.steps=2", "train.eval_every=2", "data.batch_size=16"]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the examples to files that can be imported, until the test ends."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """A function that reads a config with the choices of some examples."""

    def read(*examples: str, overrides: list[str], trust_code: bool = True) -> Config:
        tree: dict[str, Any] = {"run_dir": str(tmp_path / "run")}
        for name in examples:
            for section, keys in SECTIONS[name].items():
                tree[section] = {**tree.get(section, {}), **keys}
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return load_config(path, overrides, trust_code=trust_code)

    return read


def test_there_is_an_example_of_each_part() -> None:
    assert list(FILES) == [
        f"my_{part}" for part in ("encoder", "latent", "editor", "objective", "world", "format", "planner")
    ]


@pytest.fixture
def listed(world: Path, tmp_path: Path) -> Path:
    """The tiny world with a videos.txt per split, without the first video."""
    root = tmp_path / "listed"
    shutil.copytree(world, root)
    for split in ("train", "selection", "test"):
        names = sorted(path.name for path in (root / split).glob("*.mp4"))
        (root / split / "videos.txt").write_text("\n".join(names[1:]), encoding="utf-8")
    return root


def test_networks_and_a_format_are_trained_and_loaded(read: Read, listed: Path) -> None:
    of_data = [f"data.root={listed}", "data.num_workers=1", "data.num_lanes=4", "data.channels=1"]
    config = read(*NETWORKS, "my_format", overrides=[*FEW, *of_data])
    assert len(outside_names(config)) == 5
    run = train(config)
    with pytest.raises(UserError, match=r"config\.yaml names code from outside.*model\.encoder\.name=my_encoder:Patch"):
        load(run)
    trained = load(run, trust_code=True)
    assert type(trained.model.latent).__name__ == "StandardNormal" and trained.teacher is not None
    checkpoint = load_checkpoint(run, "latest")
    assert checkpoint is not None
    state = trained.training.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in checkpoint.model.items())
    assert not torch.equal(state["editor.film.weight"], build_model(config).editor.film.weight)  # type: ignore[arg-type, union-attr]
    assert trained.rollout(torch.rand(2, 3, 1, 64, 64), 2, 4).shape == (2, 4, 2, 16)
    assert len(list(trained.source.video_files("test", 1))) == 23
    assert evaluate(trained)["forecasts"]["model"]


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_is_built_alone(name: str, read: Read) -> None:
    build_model(read(name, overrides=["model.hidden_dim=32", "model.embedding_dim=16"]))


def test_the_entry_of_the_page_builds_the_class_of_the_page() -> None:
    """As if it were in the union of encoders; its class lies in my_encoder.py here."""
    found = re.search(r"^    @dataclass.*?(?=^\S)", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    names = {**vars(kinds), "dataclass": dataclass, "ClassVar": ClassVar, "Literal": Literal}
    exec(dedent(found[0]).replace("worldmodel.nets.patches:", "my_encoder:"), names)
    entry: Any = names["PatchesConfig"]
    union: Any = Annotated[Conv3dConfig | entry, kinds.Choice("conv3d")]
    chosen = TypeAdapter(union).validate_python({"name": "patches", "width": 8})
    encoder = parts.build_module("model.encoder.name", chosen, Encoder, channels=3, num_frames=2, size_px=16)
    assert encoder(torch.rand(4, 2, 3, 16, 16)).shape == (4, 2 * 8)


def test_a_world_is_trained_on_and_exported(read: Read, tmp_path: Path) -> None:
    run = train(read("my_world", overrides=[*FEW, "model.encoder.width=0.125"]))
    trained = load(run, trust_code=True)
    assert evaluate(trained)["forecasts"]["model"]
    exported = export(trained, tmp_path / "exported")
    assert 'exported", trust_code=True)' in (exported / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="names code from outside"):
        load(exported)
    assert load(exported, trust_code=True).state["step"] == 2
    [first] = trained.source.evaluation_batches("test", 5)
    assert first["video"].shape == (5, 9, 1, 16, 16) and first["video"].sum() == 5 * 9 * 16


def test_a_planner_approaches_the_goal(read: Read) -> None:
    config = read("my_planner", overrides=["planning.horizon=4"]).planning
    planner, goal = make_planner(config.planner), torch.tensor([0.5, -0.5])
    plan, generator = start(config, 3, 2, torch.device("cpu")), torch.Generator().manual_seed(0)
    found = []
    for _ in range(8):
        plan, actions, costs = planner.improve(config, plan, lambda a: (a[:, :, 0] - goal).norm(dim=-1), generator)
        found.append(costs.max().item())
        assert actions.shape == (3, 4, 2)
    assert found[-1] < 0.1 and shift(plan).mean.shape == (3, 4, 2)


def test_a_policy_plans_with_a_planner_from_outside(tmp_path: Path) -> None:
    overrides = ["planning.planner=my_planner:RandomShooting", "planning.candidates=8"]
    plan_once(load_config(REPO / "configs" / "two_rooms.yaml", overrides, trust_code=True), tmp_path)
    assert "my_planner" in sys.modules


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_imported_without_the_users_word(name: str, read: Read) -> None:
    with pytest.raises(UserError, match=rf"runs only with trust_code=True \(--trust-code\).*{name}:"):
        read(name, overrides=[], trust_code=False)
    assert name not in sys.modules


OF_NOTHING = "class Thing:\n    def __init__(self, **sizes): pass"


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        ("", "no_such_module:Thing", "model.latent.name=no_such_module:Thing: there is no module 'no_such_module'"),
        ("", "mine.deeper:Thing", "there is no module 'mine.deeper'"),
        ("", "mine:Thing", "mine.py has no class 'Thing'"),
        ("Thing = 3", "mine:Thing", "mine.py has no class 'Thing'"),
        (OF_NOTHING, "mine:Thing", "the class lacks infer, latent_dim, penalty_name, prior, sees_later"),
        (
            "class Thing:\n    def __init__(self, size): pass",
            "mine:Thing",
            "does not accept the arguments context_dim, ",
        ),
    ],
)
def test_what_is_wrong_with_a_class_is_one_line(
    text: str, named: str, message: str, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules" / "mine.py").write_text(text, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    config = read(overrides=[f"model.latent={named}"])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build_model(config)
    assert "\n" not in str(caught.value)


def test_options_that_the_project_gives_are_refused(read: Read) -> None:
    with pytest.raises(UserError, match=r"model\.latent\.options\.hidden_dim: the project gives hidden_dim"):
        build_model(read("my_latent", overrides=["model.latent.options={hidden_dim: 3}"]))


def test_a_world_of_another_shape_is_refused(read: Read) -> None:
    with pytest.raises(UserError, match=r"frames of C, H, W = \(1, 16, 16\), the config describes \(3, 16, 16\)"):
        make_source(read("my_world", overrides=["data.channels=3"]))


def test_a_module_without_its_own_forward_lacks_it() -> None:
    class Blank(torch.nn.Module):
        num_features = 3

    with pytest.raises(UserError, match="the class lacks forward"):
        parts.check_members("model.encoder.name", "mine:Blank", Blank(), ["forward", "num_features"])


def test_an_objective_that_needs_a_sphere_gets_one(read: Read, tmp_path: Path) -> None:
    (tmp_path / "modules" / "round.py").write_text(
        "from worldmodel.training.objectives import Byol\n\nclass Round(Byol):\n    needs_sphere = True\n"
        "    def __init__(self, embedding_dim, hidden_dim): super().__init__()\n"
    )
    small = ["objective=round:Round", "model.hidden_dim=32", "model.embedding_dim=16"]
    build_model(read(overrides=small))
    with pytest.raises(UserError, match=r"objective\.name=round:Round needs model\.embedding_norm=sphere"):
        build_model(read(overrides=[*small, "model.embedding_norm=standard"]))


# ----------------------------------------------------------------------------------------------------- commands


def test_the_command_finds_classes_in_the_current_folder_with_the_flag_alone(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read("my_world", overrides=[])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path / "modules"))])
    monkeypatch.chdir(tmp_path / "modules")
    command = ["train", "--config", str(tmp_path / "mine.yaml"), *FEW, "model.encoder.width=0.125"]
    with pytest.raises(SystemExit) as ended:
        main([*command])
    assert ended.value.code == 2 and "data.source=my_world:Drift" in capsys.readouterr().err
    assert str(tmp_path / "modules") not in sys.path
    assert main([*command, "--trust-code"]) == 0
    rollout = ["rollout", "--run", config.run_dir, "--video", "none.mp4", "--out", str(tmp_path / "out.npz")]
    for flags, message in (([], "data.source=my_world:Drift"), (["--trust-code"], "there is no such file")):
        with pytest.raises(SystemExit):
            main([*rollout, *flags])
        assert message in capsys.readouterr().err


def test_an_override_of_a_plan_names_code_with_the_flag_alone(read: Read) -> None:
    tree, overrides = to_dict(read("my_encoder", overrides=[])), ["planning.planner=my_planner:RandomShooting"]
    with pytest.raises(UserError, match=r"planning\.planner\.name=my_planner:RandomShooting"):
        planning_config(tree, overrides, trust_code=False)
    assert planning_config(tree, overrides, trust_code=True).planner.name == "my_planner:RandomShooting"


@pytest.mark.slow
def test_two_processes_train_with_classes_from_outside(read: Read, tmp_path: Path) -> None:
    config = read(*NETWORKS, "my_world", overrides=FEW)
    (tmp_path / "mine.yaml").write_text(to_yaml(config), encoding="utf-8")
    path = {"PYTHONPATH": f"{REPO}:{tmp_path / 'modules'}"}
    run_processes(
        2, "-m", "worldmodel", "train", "--config", str(tmp_path / "mine.yaml"), "--trust-code", environment=path
    )
    assert load(config.run_dir, trust_code=True).state["step"] == 2


def test_weights_that_do_not_fit_a_changed_class_are_one_line(read: Read, tmp_path: Path) -> None:
    run = train(read("my_world", "my_encoder", overrides=FEW))
    path = tmp_path / "modules" / "my_encoder.py"
    path.write_text(FILES["my_encoder"].replace("nn.GELU(), ", "nn.GELU(), nn.BatchNorm2d(width), "), encoding="utf-8")
    del sys.modules["my_encoder"]
    invalidate_caches()
    with pytest.raises(UserError, match=r"does not fit its config\.yaml: it holds .* for embedder\.encoder"):
        load(run, trust_code=True)
