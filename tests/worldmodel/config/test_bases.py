"""A config file may name another one as its base."""

from pathlib import Path

import pytest

from data_pipelines.errors import UserError
from worldmodel.config import load_config
from worldmodel.runs.opening import load_run_config


def write(folder: Path, **files: str) -> Path:
    """Write NAME.yaml of each text; return the path of the last one."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def test_bases_are_nested_and_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, ground="run_dir: r\nseed: 1\ntrain: {steps: 7, lr: 0.5}\nobjective: {beta: 0.1}\n")
    middle = write(tmp_path / "inner", middle="base: ../ground.yaml\nseed: 2\ntrain: {lr: 0.25}\n")
    top = write(
        tmp_path, top="base: inner/middle.yaml\nrun_dir: 007\ntrain: {warmup_steps: 3}\nobjective: {beta: null}\n"
    )
    config = load_config(top, ["train.steps=8"])
    assert (config.run_dir, config.seed, config.objective.beta) == ("007", 2, None)
    assert (config.train.steps, config.train.lr, config.train.warmup_steps) == (8, 0.25, 3)
    assert load_config(middle).run_dir == "r"


def test_a_choice_of_another_name_drops_the_keys_that_do_not_belong(tmp_path: Path) -> None:
    base = "run_dir: r\nmodel:\n  encoder: {name: conv3d, width: 0.5, pooling: moments}\n  latent: {dim: 5}\n"
    top = write(
        tmp_path,
        ground=base + "objective: {name: vicreg, beta: 0.5, vicreg_weights: [1, 2, 3]}\n",
        top="base: ground.yaml\nmodel: {encoder: vit_tiny, latent: {prior: flow}}\nobjective: {name: sigreg}\n",
    )
    config = load_config(top)
    assert config.model.encoder.name == "vit_tiny" and config.model.latent.dim == 5  # type: ignore[union-attr]
    assert config.objective.name == "sigreg" and config.objective.beta == 0.5


def test_a_base_may_be_in_the_flat_format(tmp_path: Path) -> None:
    flat = "run_dir: r\nmodel: {encoder: conv3d, width: 0.5, latent_dim: 5}\n"
    config = load_config(
        write(tmp_path, flat=flat, top="base: flat.yaml\nmodel: {encoder: resnet, latent: {dim: 6}}\n")
    )
    assert config.model.encoder.name == "resnet" and config.model.encoder.width == 0.5  # type: ignore[union-attr]
    assert config.model.latent.dim == 6  # type: ignore[union-attr]


def test_circles_and_mistakes_are_refused_in_one_line(tmp_path: Path) -> None:
    circle = write(tmp_path, a="base: b.yaml\n", b="base: a.yaml\nrun_dir: r\n")
    with pytest.raises(UserError, match=r"is its own base: b.yaml -> a.yaml -> b.yaml") as caught:
        load_config(circle)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"is its own base: self.yaml -> self.yaml"):
        load_config(write(tmp_path, self="base: ./self.yaml\n"))
    with pytest.raises(UserError, match=r"base=3 must be the name of a config file"):
        load_config(write(tmp_path, number="base: 3\n"))
    with pytest.raises(UserError, match=r"cannot read config .*none.yaml: No such file"):
        load_config(write(tmp_path, lost="base: none.yaml\n"))
    with pytest.raises(UserError, match="must be the name of a config file"):
        load_config(write(tmp_path, odd='base: "a\\0b"\n'))
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is its own base"):
        load_config(write(tmp_path, link="base: folder/link.yaml\n"))


def test_the_config_of_a_run_folder_reads_no_other_file(tmp_path: Path) -> None:
    write(tmp_path, ground="run_dir: r\n", config="base: ground.yaml\nrun_dir: r\n")
    with pytest.raises(UserError, match=r"unknown key base='ground.yaml'"):
        load_run_config(tmp_path)


@pytest.mark.parametrize("base", ["x" * 100_000, "x" * 256, "a/" * 2000, "null", "[a.yaml]"])
def test_a_base_that_is_not_a_name_is_one_short_line(tmp_path: Path, base: str) -> None:
    with pytest.raises(UserError, match=r"must be the name of a config file, relative to this one$") as caught:
        load_config(write(tmp_path, top=f"base: {base}\n"))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_long_chain_of_bases_is_refused(tmp_path: Path) -> None:
    files = {f"c{number}": f"base: c{number + 1}.yaml\n" for number in range(3000)}
    write(tmp_path, **files)
    with pytest.raises(UserError, match="is the base of 8 others, one above the other"):
        load_config(tmp_path / "c0.yaml")
