"""Configs in the flat format of earlier versions are converted on reading."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipelines.errors import UserError
from tests.conftest import REPO
from worldmodel.config import AugmentConfig, choices, flatten, load_config, to_dict, validate
from worldmodel.config.kinds import keys_of
from worldmodel.config.old import MOVED
from worldmodel.runs.opening import load_run_config

# What an earlier version wrote into run folders: every key, whatever the choices.
RESOLVED = yaml.safe_load("""
run_dir: runs/x
seed: 0
data:
  {source: videos, root: data/videos, camera: null, remote_cache_dir: null, remote_cache_mb: 16384, size_px: 64,
  channels: 3, num_segments: 3, num_frames: 3, frame_stride: 1, clip_step: null, fps: null, batch_size: 128,
  num_lanes: 32, pool_clips: 1024, cache_mb: 0, num_workers: 1, decoder: auto, decode_timeout_s: 60.0,
  max_bad_fraction: 0.1, max_frame_px: 67108864, action_label: action, mnist_dir: null, setting: A,
  change: heteroscedastic}
model:
  {encoder: conv3d, width: 1.0, pooling: mean, patch_px: 16, pretrained: null, freeze_encoder: false,
  checkpoint_activations: false, embedding_dim: 128, embedding_norm: sphere, hidden_dim: 1024, projector_layers: 2,
  latent: gaussian, latent_dim: 2, posterior_sees: later, action_dim: 0, scene_dim: 0, distance_dim: 0,
  oracle_label: velocity_change, prior: mixture, prior_components: 1, editor: mlp, editor_norm: batch}
objective:
  {name: byol, beta: null, beta_warmup_steps: 0, temperature: 0.1, sigreg_weight: 0.1, vicreg_weights: [25, 25, 1],
  smoothness_weight: 0.0, inverse_dynamics_weight: 0.0, time_variance_weight: 0.0, distance_error_weight: 0.0,
  rollout_steps: 1, step_weights: null, ema_momentum: 0.996, ema_schedule: constant}
planning:
  {planner: icem, horizon: 20, candidates: 300, iterations: 5, elites: 30, init_std: 0.5, temperature: 0.3, cost: sum,
  distance: embedding, num_samples: 0, risk_quantile: null, noise_beta: 2.0, action_set: ball}
""")
FORMATS: dict[str, dict[str, Any]] = {
    "moving_mnist": {"data.channels": 1},
    "causal": {"data.channels": 6, "data.num_frames": 1, "model.encoder": "mlp"},
}
# Values that differ from the defaults, as overrides of the flat keys.
CHANGED = {
    "model.width": 0.5,
    "model.patch_px": 8,
    "model.pretrained": "models/x",
    "model.latent_dim": 5,
    "model.posterior_sees": "target",
    "model.oracle_label": "jump",
    "model.prior": "flow",
    "model.prior_components": 3,
    "model.editor_norm": "layer",
    "objective.temperature": 0.3,
    "objective.sigreg_weight": 0.7,
    "objective.vicreg_weights": [1, 2, 3],
    "objective.ema_momentum": 0.9,
    "planning.elites": 7,
    "planning.noise_beta": 1.5,
    "planning.temperature": 0.4,
}
NEW = {"data.format", "model.encoder.kernels"} | {f"data.augment.{key}" for key in keys_of(AugmentConfig)}
NEW |= {
    f"planning.{key}" for key in ("warm_start", "goal_steps", "policy_clips", "policy_updates", "policy_hidden_dim")
}
NEW |= {
    "planning.replan_every",
    "planning.risk.name",
    "data.relation.name",
    "data.relation.label",
    "data.history_segments",
    "train.start_from",
}
NEW_CHOICES = {
    ("data.source", "images"),
    ("model.encoder", "deviation"),
    ("model.encoder", "objects"),
    ("model.editor", "linear"),
    ("model.editor", "blocks"),
} | {("planning.planner", name) for name in ("gradient", "categorical")}
TAGS = {
    "data.source": "data",
    "model.encoder": "model.encoder",
    "model.latent": "model.latent",
    "model.editor": "model.editor",
    "objective.name": "objective",
    "planning.planner": "planning.planner",
}


def flat_config(**changes: Any) -> dict[str, Any]:
    """The resolved config of an earlier version, with changes to its dotted keys."""
    tree = copy.deepcopy(RESOLVED)
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        tree[section][leaf] = value
    return tree


def cases() -> list[dict[str, Any]]:
    """Every name of every choice that earlier versions had."""
    return [
        {tag: name, **(FORMATS.get(name, {}) if tag == "data.source" else {})}
        for tag, key in TAGS.items()
        for name in choices(key)
        if (tag, name) not in NEW_CHOICES and (tag, name) != ("model.encoder", "mlp")  # which is for causal
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_run_of_an_earlier_version_means_the_same(case: dict[str, Any], tmp_path: Path) -> None:
    """Each key of today's config has the value of the key that it was."""
    encoder = case.get("model.encoder", "conv3d")
    changes = dict(CHANGED)
    if encoder not in ("conv3d", "resnet", "mlp"):  # another width was refused there
        del changes["model.width"]
    if encoder != "pretrained":
        del changes["model.pretrained"]
    if case.get("model.editor") == "sum":
        changes["model.latent_dim"] = 128
    tree = flat_config(**changes, **case)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    before = flatten(tree)
    was = {new: old for old, new in MOVED.items()} | {f"{key}.name": key for key in TAGS}
    now = flatten(to_dict(load_run_config(tmp_path)))
    assert now["data.source"] == before["data.source"] and now["planning.planner.name"] == before["planning.planner"]
    compared = {key: value for key, value in now.items() if key.split(".")[0] in RESOLVED and key not in NEW}
    assert len(compared) > 40
    for key, value in compared.items():
        assert value == before[was.get(key, key)], key


def test_a_value_that_was_a_mistake_still_is_one() -> None:
    for changes, told in (
        ({"model.encoder": "vit_tiny", "model.width": 0.5}, "unknown key model.encoder.width=0.5; allowed here: name"),
        (
            {"model.freeze_encoder": True},
            "unknown key model.encoder.freeze=True; allowed here: name, width, pooling, kernels",
        ),
        ({"data.source": "moving_mnist"}, "unknown key data.channels=3; allowed here: source, mnist_dir"),
        ({"model.width": "wide"}, "model.encoder.width='wide'"),
        ({"model.encoder": "vgg"}, "model.encoder.name='vgg'"),
        ({"model.latent": 3}, "model.latent=3"),
    ):
        with pytest.raises(UserError) as caught:
            validate(flat_config(**changes), "here")
        assert told in str(caught.value) and "\n" not in str(caught.value)


def test_observations_of_factors_have_no_size_in_pixels() -> None:
    config = validate(flat_config(**FORMATS["causal"], **{"data.source": "causal", "data.size_px": 32}), "here")
    assert config.data.source == "causal" and config.data.size_px == 1


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_override_of_a_key_that_has_moved_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"^override '{old}=1': {old} is now {new}$"):
        load_config(REPO / "configs" / "objectives.yaml", [f"{old}=1"])


def test_overrides_apply_to_a_flat_file(tmp_path: Path) -> None:
    path = tmp_path / "flat.yaml"
    path.write_text("run_dir: r\nmodel: {encoder: conv3d, width: 0.5, latent: gaussian, latent_dim: 4}\n")
    config = load_config(path, ["model.latent.dim=6", "model.encoder=resnet"])
    assert config.model.encoder == choices("model.encoder")["resnet"](width=0.5)
    assert config.model.latent == choices("model.latent")["gaussian"](dim=6)
