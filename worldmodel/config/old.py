"""The former, flat format: keys of a choice lay next to it, and every choice had the keys of all.

Run folders and files in that format are converted when they are read. A file is in that format if it has a key that has
moved.
"""

from collections.abc import Mapping
from typing import Any

from data_pipelines.text_files import kind_of_key
from worldmodel.config.data import CausalConfig
from worldmodel.config.kinds import keys_of, member_for, members_of
from worldmodel.config.model import ModelConfig
from worldmodel.config.sections import Config, PlanningConfig

MOVED = {
    "model.width": "model.encoder.width",
    "model.pooling": "model.encoder.pooling",
    "model.patch_px": "model.encoder.patch_px",
    "model.pretrained": "model.encoder.path",
    "model.freeze_encoder": "model.encoder.freeze",
    "model.checkpoint_activations": "model.encoder.checkpoint_activations",
    "model.latent_dim": "model.latent.dim",
    "model.posterior_sees": "model.latent.posterior_sees",
    "model.oracle_label": "model.latent.label",
    "model.prior": "model.latent.prior",
    "model.prior_components": "model.latent.prior_components",
    "model.editor_norm": "model.editor.norm",
    "planning.elites": "planning.planner.elites",
    "planning.noise_beta": "planning.planner.noise_beta",
    "planning.temperature": "planning.planner.temperature",
}
"""Old key: new key."""

# Other values of these keys were mistakes where the choice did not use them, and still are.
_ONLY_VALUE = {
    "model.width": 1,
    "model.pooling": "mean",
    "model.pretrained": None,
    "model.freeze_encoder": False,
    "model.checkpoint_activations": False,
}
# Keys that this choice fixes now, and that had any value before.
_UNUSED: dict[type, set[str]] = {CausalConfig: {"size_px", "frame_stride"}}


def converted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return an expanded tree in today's format; a tree that is in it already stays as it is."""
    result = dict(tree)
    is_old = False
    for section, kind in (("model", ModelConfig), ("planning", PlanningConfig)):
        if isinstance(tree.get(section), dict):
            result[section], has_moved = _moved(section, tree[section], kind)
            is_old |= has_moved
    if isinstance(result.get("planning"), dict) and "risk_quantile" in result["planning"]:
        result["planning"] = _with_risk(result["planning"])
    if is_old:
        for section in ("data", "objective"):
            if isinstance(tree.get(section), dict):
                result[section] = _without_foreign(tree[section], kind_of_key(Config, section))
    return result


def _moved(section: str, tree: Mapping[str, Any], kind: type) -> tuple[dict[str, Any], bool]:
    """Return a section with its old keys in their new places, and whether it had any."""
    result = {key: dict(part) if isinstance(part, dict) else part for key, part in tree.items()}
    old = [key for key in tree if f"{section}.{key}" in MOVED]
    for key in old:
        value, name = result.pop(key), f"{section}.{key}"
        _, part, new_key = MOVED[name].split(".")
        choice = result.setdefault(part, {})
        member = member_for(kind_of_key(kind, part), choice) if isinstance(choice, dict) else None
        is_mistake = name in _ONLY_VALUE and value != _ONLY_VALUE[name]
        if member is not None and (new_key in keys_of(member) or is_mistake):
            choice[new_key] = value
    return result, bool(old)


def _with_risk(planning: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section with the key risk_quantile, a level or null, as the choice `risk`."""
    result = dict(planning)
    level = result.pop("risk_quantile")
    return result if level is None else {**result, "risk": {"name": "quantile", "level": level}}


def _without_foreign(tree: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return a choice without keys of other choices; a key whose value the choice fixes stays if it differs."""
    member = member_for(kind, tree)
    if member is None:
        return dict(tree)
    foreign = {key for other in members_of(kind).values() for key in keys_of(other)} - set(keys_of(member))
    fixed = {key: getattr(member, key) for key in foreign - _UNUSED.get(member, set()) if hasattr(member, key)}
    return {key: value for key, value in tree.items() if key not in foreign or value != fixed.get(key, value)}
