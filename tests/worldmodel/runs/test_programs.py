"""Programs of torch.export: they compute as the networks do, in a process without this package."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipelines.errors import UserError
from tests.conftest import run_python
from worldmodel.build import build_model
from worldmodel.config import Config
from worldmodel.runs.programs import EncoderProgram, write_programs

CASES = {
    "conv3d": ["model.encoder=conv3d", "model.encoder.width=0.125", "model.action_dim=2"],
    "vit_tiny": ["model.encoder=vit_tiny", "model.latent.prior_components=1"],
    "deviation": ["model.encoder=deviation"],
    "objects": ["model.encoder=objects"],
}
QUICK = ("conv3d", "objects")
SLOW = ("vit_tiny", "deviation")

CHECK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
for folder in map(Path, sys.argv[1:]):
    expected = load_file(folder / "expected.safetensors")
    encode, step = (torch.export.load(folder / f"{name}.pt2").module() for name in ("encoder", "rollout_step"))
    for size in (1, 5):
        state = encode(expected["clip"][:size])
        assert torch.allclose(state, expected["state"][:size], atol=1e-5), folder
        torch.manual_seed(size)
        following = step(state, *([expected["action"][:size]] if "action" in expected else []))
        assert torch.allclose(following, expected[f"next_{size}"], atol=1e-5), folder
assert "worldmodel" not in sys.modules
"""


@pytest.mark.parametrize("names", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
@torch.no_grad()
def test_programs_compute_as_the_model_does(
    names: tuple[str, ...], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    for name in names:
        config = tiny_config(*CASES[name])
        torch.manual_seed(0)
        model = build_model(config).eval()
        data = config.data
        clip = torch.rand(5, data.num_frames, data.channels, data.size_px, data.size_px)
        expected = {"clip": clip, "state": model.observe(clip)}
        if model.action_dim:
            expected["action"] = torch.rand(5, model.action_dim)
        for size in (1, 5):
            state, action = expected["state"][:size], expected["action"][:size] if model.action_dim else None
            torch.manual_seed(size)
            expected[f"next_{size}"] = model.edit(state, model.sample(state, action=action), action)
        assert not torch.allclose(expected["next_1"], expected["next_5"][:1], atol=1e-3), "r is drawn"
        (tmp_path / name).mkdir()
        write_programs(tmp_path / name, model, data)
        save_file(expected, tmp_path / name / "expected.safetensors")
    done = run_python("-c", CHECK, *(str(tmp_path / name) for name in names), cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


def test_networks_that_cannot_be_traced(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: EncoderProgram, clip: torch.Tensor) -> torch.Tensor:
        return self.model.observe(clip) * len(clip)

    config = tiny_config()
    monkeypatch.setattr(EncoderProgram, "forward", forward)
    with pytest.raises(UserError, match=r"^these networks cannot be exported as encoder.pt2: "):
        write_programs(tmp_path, build_model(config), config.data)
