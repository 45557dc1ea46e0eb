"""A training step of each encoder on the CPU at each size, in a process of its own."""

from pathlib import Path

import pytest
import torch

from data_pipelines.errors import UserError
from tests.conftest import REPO
from tests.worldmodel.nets.encoder_steps import Step, exit_code
from worldmodel.config import choices, load_config
from worldmodel.nets.vit import VIT_SIZES

SIZES_PX = (32, 64, 96, 128, 160, 224, 256)
PRETRAINED = ("pretrained_vit", "pretrained_resnet", "pretrained_vjepa2")
SHAPES = (
    {name: (3, 4) for name in ("conv3d", "resnet", "objects")}
    | {name: (2, 1) for name in VIT_SIZES}
    | {name: (2, 2) for name in PRETRAINED}
)
"""Frames and clips of a batch."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrained_vit/, pretrained_resnet/ and pretrained_vjepa2/, models of tiny size with random weights."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    vit = transformers.ViTConfig(**sizes, image_size=64, patch_size=16)
    transformers.ViTModel(vit).save_pretrained(root / "pretrained_vit")
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(resnet).save_pretrained(root / "pretrained_resnet")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    vjepa2 = transformers.VJEPA2Config(**sizes, **predictor, crop_size=64)
    transformers.VJEPA2Model(vjepa2).save_pretrained(root / "pretrained_vjepa2")
    return root


def step(models: Path, encoder: str, size_px: int, precision: str) -> Step:
    num_frames, batch = SHAPES[encoder]
    name, source = ("pretrained", str(models / encoder)) if encoder in PRETRAINED else (encoder, None)
    return Step(name, size_px, precision, num_frames, batch=batch, pretrained=source)


def test_every_encoder_is_tried() -> None:
    # deviation has no weights to step; test_deviation.py tries its sizes.
    assert set(choices("model.encoder")) == (set(SHAPES) - set(PRETRAINED)) | {"pretrained", "mlp", "deviation"}


@pytest.mark.parametrize(
    "case",
    [
        Step("conv3d", 256, "bf16"),
        Step("conv3d", 64, "bf16", num_frames=2),
        Step("resnet", 256, "bf16"),
        Step("objects", 224, "bf16"),
        Step("resnet", 16, "bf16"),
        Step("resnet", 224, "fp32", width=0.125),
        Step("vit_tiny", 256, "bf16", num_frames=2, batch=1),
    ],
    ids=str,
)
def test_a_step_of_an_encoder(case: Step) -> None:
    assert exit_code(case) == 0


@pytest.mark.parametrize("encoder", ["pretrained_vit", "pretrained_vjepa2"])
def test_a_step_of_a_pretrained_encoder(models: Path, encoder: str) -> None:
    assert exit_code(step(models, encoder, 256, "bf16")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size_px", SIZES_PX)
@pytest.mark.parametrize("encoder", SHAPES)
def test_a_step_of_each_encoder_at_each_size(encoder: str, size_px: int, precision: str, models: Path) -> None:
    assert exit_code(step(models, encoder, size_px, precision)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("width", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("encoder", ["conv3d", "resnet"])
def test_a_step_of_each_width_and_number_of_frames(encoder: str, width: float, num_frames: int, precision: str) -> None:
    assert exit_code(Step(encoder, 160, precision, num_frames, width, batch=8)) == 0


def test_a_crash_is_seen_as_such() -> None:
    assert exit_code(Step("no such encoder", 64, "fp32")) == 1


@pytest.mark.parametrize("encoder", ["conv3d", "resnet", "vit_tiny", "vit_large"])
def test_each_size_is_taken_or_refused_in_one_line(encoder: str) -> None:
    for size_px in range(32, 257):
        overrides = [f"model.encoder={encoder}", f"data.size_px={size_px}"]
        if encoder not in VIT_SIZES or size_px % 16 == 0:
            load_config(REPO / "configs" / "video.yaml", overrides)
            continue
        with pytest.raises(UserError) as refused:
            load_config(REPO / "configs" / "video.yaml", overrides)
        line = f"model.encoder={encoder}: data.size_px={size_px} must be a multiple of model.encoder.patch_px=16"
        assert str(refused.value).endswith(line) and len(str(refused.value).splitlines()) == 1
