import re
from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from tests.conftest import REPO, videos_of
from worldmodel.config import ResNetConfig, cautions, flatten, load_config, to_dict, to_yaml, validate

FOLDERS = (REPO / "configs", REPO / "configs" / "causal")  # configs/accelerate holds Accelerate's own
CONFIGS = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("name", "twin_name"), [("objectives", "demo_byol"), ("paper", "paper_byol"), ("kicked", "kicked_no_latent")]
)
def test_twins_differ_only_in_the_latent(name: str, twin_name: str) -> None:
    config = flatten(to_dict(load_config(REPO / "configs" / f"{name}.yaml")))
    twin = flatten(to_dict(load_config(REPO / "configs" / f"{twin_name}.yaml")))
    differing = {key for key in {**config, **twin} if config.get(key) != twin.get(key)}
    assert {key for key in differing if not key.startswith("model.latent.")} <= {"run_dir", "objective.beta"}
    assert twin["model.latent.name"] == "none"


@pytest.mark.parametrize(
    ("overrides", "norm"),
    [
        ([], "sphere"),
        (["objective.name=infonce"], "sphere"),
        (["objective.name=jepa"], "standard"),
        (["objective.name=jepa", "model.embedding_norm=sphere"], "sphere"),
        (["objective.name=vicreg", "model.embedding_norm=white"], "white"),
    ],
)
def test_the_objective_chooses_the_normalisation_of_embeddings(overrides: list[str], norm: str) -> None:
    config = load_config("paper", overrides)
    assert config.model.embedding_norm == norm
    assert validate(to_dict(config), source="a copy") == config


def test_overrides_replace_values_and_numbers_may_have_exponents(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: here\ntrain:\n  lr: 1e-3\n")
    config = load_config(
        path, ["train.steps=7", "objective.beta=5e-4", "data.clip_step=null", "data.decoder=pyav", "data.fps=10"]
    )
    assert (config.train.lr, config.train.steps, config.objective.beta) == (1e-3, 7, 5e-4)
    data = videos_of(config)
    assert data.clip_step is None and data.decoder == "pyav" and data.fps == 10.0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.stepz=5", ["unknown key train.stepz=5 (did you mean train.steps?)"]),
        ("nothing=5", ["unknown key", "nothing", "run_dir", "train"]),
        ("train.steps=many", ["train.steps", "'many'", "integer"]),
        ("train.steps=2.5", ["train.steps", "2.5"]),
        ("train.steps=true", ["train.steps", "True"]),
        ("train.steps=0", ["train.steps", "0", "greater than 0"]),
        ("train.lr=fast", ["train.lr", "'fast'"]),
        ("model.latent=gausian", ["model.latent", "'gausian'", "'gaussian'", "'none'"]),
        ("data.fps=0", ["data.fps=0", "greater than 0"]),
        ("data.decoder=ffmpeg", ["data.decoder", "'ffmpeg'", "'auto'", "'pyav'", "'decord'", "'torchcodec'"]),
        ("data.channels=2", ["data.channels=2", "1 or 3"]),
        ("data.augment.crop_min_scale=0", ["data.augment.crop_min_scale=0", "greater than or equal to 0.05"]),
        ("data.augment.crop_min_scale=.nan", ["data.augment.crop_min_scale=nan"]),
        ("data.augment.flip=true", ["data.augment.flip='true'", "'none', 'horizontal', 'vertical' or 'both'"]),
        ("data.augment.hue=0.7", ["data.augment.hue=0.7", "less than or equal to 0.5"]),
        ("data.augment.blur=1e3", ["data.augment.blur=1000.0", "less than or equal to 16"]),
        ("data.augment.noise=-1", ["data.augment.noise=-1", "greater than or equal to 0"]),
        ("data.augment.zoom=2", ["unknown key data.augment.zoom=2", "crop_min_scale, flip, brightness"]),
        ("data.augment.position_labels=[a]", ["data.augment.position_labels=['a']", "dictionary"]),
        ("data.augment.position_labels.a=[0, 1]", ["data.augment.position_labels.a"]),
        ("data.augment.position_labels.a=[0, 1, .inf, 0]", ["data.augment.position_labels.a", "finite number"]),
        ("objective.ema_momentum=1.5", ["objective.ema_momentum", "1.5", "less than or equal to 1"]),
        ("data=5", ["data", "5"]),
        ("data.batch_size=100", ["data.batch_size=100", "data.num_lanes=32"]),
        ("train.steps", ["train.steps", "key=value"]),
        ("model.editor=sum", ["model.editor=sum", "model.latent.dim=8", "model.embedding_dim=256"]),
        ("model.encoder=mlp", ["model.encoder=mlp", "data.source=videos", "causal"]),
        ("run_dir.deeper=1", ["run_dir"]),
        ("run_dir=", ["run_dir is empty"]),
        ("data.root=", ["data.root is empty"]),
        (f"run_dir={'x' * 300}", ["run_dir='xxx", "at most 255 bytes"]),
        ("model.hidden_dim=1000000000", ["model.hidden_dim=1000000000", "less than or equal to 16384"]),
        ("model.embedding_dim=1000000000000000000", ["model.embedding_dim=", "less than or equal to 16384"]),
        ("model.encoder.width=1e300", ["model.encoder.width=1e+300", "less than or equal to 64"]),
        ("data.size_px=100000", ["data.size_px=100000", "less than or equal to 4096"]),
        ("train.timeout_s=1e300", ["train.timeout_s=1e+300", "less than or equal to 10000000"]),
        (f"train.steps={'9' * 5000}", ["train.steps='9999", "valid integer"]),
        ("train.steps=0x" + "f" * 5000, ["train.steps='0xff", "valid integer"]),
        ("train.steps=0x_", ["train.steps='0x_'", "valid integer"]),
        ("train.steps=2001-99-99", ["train.steps='2001-99-99'", "valid integer"]),
        ("train.lr=1e999", ["train.lr=inf", "finite number"]),
        ("objective.ema_momentum=.nan", ["objective.ema_momentum=nan", "finite number"]),
        ("train.steps=&a 5", ["train.steps=&a 5", "valid YAML"]),
        ("train.steps=!!int 5", ["train.steps=!!int 5", "valid YAML"]),
        (f"train.steps={'[' * 3000}", ["train.steps=[[[", "valid YAML"]),
        (
            f"objective={{name: vicreg, vicreg_weights: [{'1, ' * 9000}]}}",
            ["objective.vicreg_weights=[1, 1", "not 9000"],
        ),
        ("objective={name: byol, rollout_steps: 2, step_weights: [1.0e+308, 1.0e+308]}", ["a finite sum above 0"]),
        (f"objective.step_weights=[{'1, ' * 9000}]", ["objective.step_weights=[1.0, 1.0", "for each of"]),
        ("data={size_px: 8, size_px: 9}", ["size_px", "valid YAML"]),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_is_allowed(override: str, told: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(REPO / "configs" / "objectives.yaml", [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.step=5", "train.steps"),
        ("steps=5", "train.steps"),
        ("lr=1", "train.lr or planning.planner.lr"),
        ("trainn.steps=5", "train"),
        ("train.batch_size=8", "data.batch_size"),
        ("horizon=3", "evaluation.horizon or planning.horizon"),
        ("model.encoder.widht=1", "model.encoder.width"),
        ("latent_dim=4", "model.latent.dim"),
        ("model.latent=gausian", "gaussian"),
        ("model.encoder.name=resnett", "resnet"),
        ("model={latent: spars}", "sparse"),
        ("data.source=video", "videos"),
        ("data.decoder=pyavv", "pyav"),
        ("objective=infonc", "infonce"),
    ],
)
def test_a_misspelt_override_is_named_with_what_may_be_meant(override: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(REPO / "configs" / "objectives.yaml", ["seed=3", override, "train.log_every=7"])
    message = str(caught.value)
    assert message.startswith(f"override '{override}': ") and "objectives.yaml" not in message
    assert f"(did you mean {meant}?)" in message and "\n" not in message


def test_each_mistake_is_that_of_the_file_or_of_an_override(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "run_dir: r\ndata: {batch_size: 7}\ntrain: {step: 4, lr: 0}\nobjective: {beta: -1}\n"
        "model: {latent: {name: gausian}}\n"
    )
    overrides = ["train.lr=-1", "objective=infonce", "train.log_every=0", "train.log_every=-1", "model.latent.dim=3"]
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    owners = dict.fromkeys(re.findall(r"(?:^|; )(\S+mine\.yaml|override '.*?'): ([\w. ]+)", str(caught.value)))
    assert set(owners) == {
        (str(path), "model.latent.name"),  # and objective.beta, in the same words
        ("override 'train.lr=-1'", "train.lr"),
        ("override 'train.log_every=-1'", "train.log_every"),
        (str(path), "unknown key train.step"),
    }
    assert "; objective.beta=-1: " in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "owner"), [("", "override 'data.num_lanes=5'"), ("data: {num_lanes: 5}\n", "mine.yaml")]
)
def test_a_contradiction_is_that_of_the_override_that_makes_it(lines: str, owner: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"run_dir: r\n{lines}")
    with pytest.raises(UserError, match=f"{owner}: data.batch_size=128 must be a multiple of data.num_lanes=5"):
        load_config(path, ["train.steps=5", *([] if lines else ["data.num_lanes=5"])])


def test_a_key_that_resembles_none_has_no_hint() -> None:
    for override in ("nothing=5", "train." + "steps" * 100 + "=5", "data.decoder=5"):
        with pytest.raises(UserError) as caught:
            load_config(REPO / "configs" / "objectives.yaml", [override])
        assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model.latent=sparse", "model.latent.prior=flow"],
            "unknown key model.latent.prior='flow'; allowed here: name",
        ),
        (["objective.name=byol", "model.embedding_norm=standard"], "objective.name=byol compares directions only"),
        (["data.batch_size=32", "train.grad_accumulation=17"], "data.batch_size=32 is too small for train.grad_acc"),
        (["data.source=causal"], "model.encoder=conv3d does not fit data.source=causal: mlp is for causal"),
        (["model.scene_dim=4"], "model.scene_dim=4 is learned in refinement: it needs train.refine_steps"),
        (["model.scene_dim=4", "train.refine_steps=1", "model.editor=low_rank"], "takes no scene code"),
        (["model.distance_dim=4"], "model.distance_dim=4 is learned in refinement: it needs train.refine_steps"),
        (
            ["train.refine_energy_of=dimensions"],
            "train.refine_energy_of=dimensions is a choice of score: it needs train.refine_energy_weight",
        ),
        (["objective.distance_error_weight=1"], "objective.distance_error_weight weighs errors by a distance"),
        (
            ["data.augment.hue=0.1", "data.augment.saturation=0.1", "data.channels=1"],
            "data.augment.saturation and data.augment.hue: colour needs data.channels=3, not 1",
        ),
        (
            ["data.augment.position_labels={a: [1, 1, 0, 2]}"],
            "data.augment.position_labels: 'a' has the same value at two opposite edges of the frame",
        ),
        (
            ["model.action_dim=2", "data.augment.flip=both", "data.frame_stride=1"],
            "data.augment.flip=both mirrors the frames but not the actions, the label 'action': list the label in "
            "data.augment.position_labels if it holds positions in the frame, otherwise set data.augment.flip=none",
        ),
        (
            ["model.latent=oracle", "data.augment.crop_min_scale=0.5"],
            "data.augment moves pixels but not the r of model.latent=oracle, the label 'velocity_change': list",
        ),
        (
            ["data.source=moving_mnist", "data.augment.noise=0.1"],
            "unknown key data.augment={'noise': 0.1}; allowed here: source, mnist_dir",
        ),
        (["planning.distance=steps"], "planning.distance=steps plans by a distance in steps"),
        (["model.latent=oracle", "train.refine_horizon=2"], "knows the r of one step"),
        (
            ["data.source=moving_mnist", "train.refine_horizon=2"],
            "train.refine_horizon and evaluation.horizon must be 1",
        ),
    ],
)
def test_a_senseless_combination_is_refused_in_a_sentence(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(REPO / "configs" / "objectives.yaml", overrides)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_all_contradictions_are_told_at_once_five_of_them_in_words() -> None:
    faults = ["model.scene_dim=4", "model.distance_dim=4", "objective.inverse_dynamics_weight=1", "data.batch_size=100"]
    with pytest.raises(UserError) as caught:
        load_config(REPO / "configs" / "objectives.yaml", [*faults, "model.editor=sum"])
    message = str(caught.value)
    for told in ("data.num_lanes=32", "takes no scene code", "model.latent.dim=8", "model.scene_dim=4 is learned"):
        assert told in message
    assert message.endswith("; and 1 more") and message.count("; ") == 5 and "\n" not in message


def test_what_makes_sense_is_not_refused() -> None:
    for overrides in (
        ["objective.name=byol", "train.grad_accumulation=2"],
        ["objective.name=vicreg", "model.embedding_norm=standard"],
        ["model.latent=gaussian", "model.latent.prior=flow"],
        ["model.editor=sum", "model.latent=none"],
        ["data.augment={flip: both, crop_min_scale: 1, noise: 0}", "data.channels=1"],
        ["data.augment.brightness=1", "data.augment.contrast=0.5", "model.latent=oracle"],
        ["model.action_dim=2", "data.augment={flip: both, position_labels: {action: [0, 512, 0, 512]}}"],
    ):
        load_config(REPO / "configs" / "objectives.yaml", overrides)


@pytest.mark.parametrize(("size_px", "small"), [(64, True), (127, True), (128, False), (224, False)])
def test_an_encoder_for_large_frames_is_advised_against_for_small_ones(size_px: int, small: bool) -> None:
    config = load_config(REPO / "configs" / "video.yaml", ["model.encoder=resnet", f"data.size_px={size_px}"])
    told = f"model.encoder=resnet is meant for frames of 128 px and more, but data.size_px={size_px}: "
    assert [caution.startswith(told) for caution in cautions(config)] == [True] * small
    assert f"for frames of {ResNetConfig.least_px} px and more" in (ResNetConfig.__doc__ or "")


@pytest.mark.parametrize(("embedding_dim", "many"), [(64, False), (65, True), (256, True)])
def test_relations_to_a_batch_are_advised_against_for_more_dimensions_than_they_determine(
    embedding_dim: int, many: bool
) -> None:
    overrides = ["data.batch_size=128", f"model.embedding_dim={embedding_dim}"]
    config = load_config(REPO / "configs" / "objectives.yaml", ["objective.name=ressl", *overrides])
    told = "objective.name=ressl compares a prediction with the other 127 clips of a batch, which do not determine "
    assert [caution.startswith(told) for caution in cautions(config)] == [True] * many
    assert not list(cautions(load_config(REPO / "configs" / "objectives.yaml", overrides)))


def test_a_warm_up_that_does_not_end_is_advised_against() -> None:
    overrides = ["train.steps=50", "train.warmup_steps=200"]
    [caution] = cautions(load_config(REPO / "configs" / "objectives.yaml", overrides))
    assert caution.startswith("train.warmup_steps=200 is more than train.steps=50: ") and "0.25 of train.lr" in caution


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_nothing_speaks_against_a_shipped_config(path: Path) -> None:
    assert not list(cautions(load_config(path)))


def test_moving_mnist_has_fixed_frames() -> None:
    with pytest.raises(UserError, match=r"unknown key data.size_px=32; allowed here: source, mnist_dir"):
        load_config(REPO / "configs" / "paper.yaml", ["data.size_px=32"])


def test_a_missing_key_and_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing key run_dir"):
        validate({}, source="here")
    with pytest.raises(UserError, match=r"cannot read config .*No such file"):
        load_config(tmp_path / "no.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(broken)
