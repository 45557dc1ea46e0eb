"""Video models, and pooling by attention, with models of tiny size and random weights that are saved to a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipelines.errors import UserError
from worldmodel import load
from worldmodel.config import Config
from worldmodel.nets.attentive import NUM_QUERIES, AttentivePool
from worldmodel.nets.encoders import Embedder
from worldmodel.nets.pretrained import PretrainedEncoder
from worldmodel.nets.teacher import Teacher
from worldmodel.runs.checkpoint import load_checkpoint
from worldmodel.training.loop import train
from worldmodel.training.sharding import layers

DIM = 24
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vjepa2/, videomae/ (with the decoder of its training), dinov2/ and dinov3/, of the same sizes."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    predictor = {"pred_hidden_size": DIM, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    vjepa2 = transformers.VJEPA2Config(**sizes, **predictor, crop_size=32, frames_per_clip=8, pred_num_mask_tokens=2)
    transformers.VJEPA2Model(vjepa2).save_pretrained(root / "vjepa2")
    decoder = {"decoder_hidden_size": DIM, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    videomae = transformers.VideoMAEConfig(**sizes, **decoder, image_size=32, num_frames=4, intermediate_size=48)
    transformers.VideoMAEForPreTraining(videomae).save_pretrained(root / "videomae")
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=32)).save_pretrained(root / "dinov2")
    dinov3 = transformers.DINOv3ViTConfig(**sizes, image_size=32, intermediate_size=48, num_register_tokens=4)
    transformers.DINOv3ViTModel(dinov3).save_pretrained(root / "dinov3")
    return root


def segment(batch: int = 2, frames: int = 4, channels: int = 3, size_px: int = 32) -> Tensor:
    return torch.rand(batch, frames, channels, size_px, size_px, generator=torch.Generator().manual_seed(0))


def normalised(video: Tensor) -> Tensor:
    return ((video.movedim(2, -1) - MEAN) / STD).movedim(-1, 2)


# ------------------------------------------------------------------------------------------------------- video models


@pytest.mark.parametrize("size_px", [32, 64])
def test_v_jepa_2_reads_a_segment_at_its_own_size(models: Path, transformers: Any, size_px: int) -> None:
    """The features are the means of transformers' own vision features over space, with positions of this size."""
    reference = transformers.VJEPA2Model.from_pretrained(models / "vjepa2", crop_size=size_px).eval()
    video = segment(2, 4, 3, size_px)
    tokens = reference.get_vision_features(normalised(video))
    expected = tokens.unflatten(1, (2, (size_px // 8) ** 2)).mean(dim=2).flatten(1)
    encoder = PretrainedEncoder(str(models / "vjepa2"), 3, 4, size_px).eval()
    assert encoder.num_features == 2 * DIM
    torch.testing.assert_close(encoder(video), expected, atol=1e-5, rtol=1e-5)
    other_order = encoder(video.flip(1)).unflatten(1, (2, DIM)).flip(1).flatten(1)
    assert not torch.allclose(other_order, encoder(video), atol=1e-3)  # its tokens know of time


def test_the_predictor_of_v_jepa_2_is_neither_kept_nor_trained(models: Path) -> None:
    encoder = PretrainedEncoder(str(models / "vjepa2"), 3, 2, 32)
    assert any("predictor" in key for key in load_file(models / "vjepa2" / "model.safetensors"))
    assert not any("predictor" in key for key in encoder.state_dict())
    encoder(segment(2, 2)).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in encoder.parameters())
    names = [type(layer).__name__ for layer in layers(nn.ModuleDict({"encoder": encoder}))]
    assert names == ["VJEPA2Layer", "VJEPA2Layer"]


def test_checkpointed_activations_of_v_jepa_2_give_the_same_gradients(models: Path) -> None:
    gradients = []
    for checkpointed in (False, True):
        encoder = PretrainedEncoder(str(models / "vjepa2"), 3, 2, 32, checkpoint_activations=checkpointed)
        encoder(segment(2, 2)).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_videomae_reads_the_segments_that_it_was_trained_with(models: Path, transformers: Any) -> None:
    reference = transformers.VideoMAEModel.from_pretrained(models / "videomae").eval()
    video = segment(2, 4)
    expected = reference(normalised(video)).last_hidden_state.unflatten(1, (2, 16)).mean(dim=2).flatten(1)
    encoder = PretrainedEncoder(str(models / "videomae"), 3, 4, 32)
    torch.testing.assert_close(encoder.eval()(video), expected, atol=1e-5, rtol=1e-5)
    encoder(video).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_segments_are_normalised_as_the_video_preprocessor_says(models: Path, tmp_path: Path) -> None:
    for file in (models / "vjepa2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    own = PretrainedEncoder(str(tmp_path), 1, 2, 32).eval()
    video = segment(2, 2, 1)
    shifted = torch.cat([(video - m) / s for m, s in zip(*settings.values(), strict=True)], dim=2)
    (tmp_path / "video_preprocessor_config.json").unlink()
    plain = PretrainedEncoder(str(tmp_path), 3, 2, 32).eval()
    torch.testing.assert_close(own(video), plain(shifted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "frames", "size_px", "message"),
    [
        ("vjepa2", 3, 32, "reads 2 frames at a time: data.num_frames=3 must be a multiple of that"),
        ("vjepa2", 2, 4, "takes no frames of data.size_px=4"),
        ("videomae", 6, 32, "takes 4 frames: set data.num_frames to it, not to 6"),
        ("videomae", 4, 64, "takes no frames of data.size_px=64"),
    ],
)
def test_segments_that_a_model_cannot_read_are_told(
    models: Path, name: str, frames: int, size_px: int, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        PretrainedEncoder(str(models / name), 3, frames, size_px)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(models / name) in str(caught.value)


def test_other_video_models_are_refused(transformers: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.VivitConfig(**sizes, image_size=16, num_frames=2, tubelet_size=[2, 8, 8])
    transformers.VivitModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a VivitModel, is not supported: of video models, V-JEPA 2 and VideoMAE are"):
        PretrainedEncoder(str(tmp_path), 3, 2, 16)


def test_dinov3_has_its_registers_left_out(models: Path, transformers: Any) -> None:
    reference = transformers.DINOv3ViTModel.from_pretrained(models / "dinov3").eval()
    images = segment(2, 1)
    tokens = reference(normalised(images)[:, 0]).last_hidden_state
    assert tokens.shape == (2, 1 + 4 + 16, DIM)
    encoder = PretrainedEncoder(str(models / "dinov3"), 3, 1, 32).eval()
    torch.testing.assert_close(encoder(images), tokens[:, 5:].mean(dim=1), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- pooling by attention


def test_attention_is_that_of_torch() -> None:
    """The pool equals torch's MultiheadAttention with the same weights, on normalised tokens with their positions."""
    torch.manual_seed(0)
    dim, times, patches = 128, 3, 4
    pool = AttentivePool(dim, times, patches)
    reference = nn.MultiheadAttention(dim, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([pool.to_queries.weight, pool.keys_values.weight]))
        reference.in_proj_bias.copy_(torch.cat([pool.to_queries.bias, pool.keys_values.bias]))
    reference.out_proj = pool.out  # type: ignore[assignment]
    tokens = torch.randn(5, times, patches, dim)
    positions = pool.times.expand(-1, patches, -1) + pool.places
    placed = (pool.norm(tokens) + positions).reshape(5, times * patches, dim)
    expected, _ = reference(pool.queries.expand(5, -1, -1), placed, placed)
    assert pool.num_heads == 2 and pool.num_features == NUM_QUERIES * dim
    torch.testing.assert_close(pool(tokens), expected.flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moved", ["time", "place"])
def test_attention_knows_time_and_place_where_the_mean_does_not(moved: str) -> None:
    torch.manual_seed(0)
    pool, tokens = AttentivePool(DIM, 2, 4), torch.randn(3, 2, 4, DIM)
    permuted = tokens.flip(1 if moved == "time" else 2)
    torch.testing.assert_close(permuted.mean(dim=(1, 2)), tokens.mean(dim=(1, 2)))
    assert not torch.allclose(pool(permuted), pool(tokens), atol=1e-3)


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "vjepa2", "videomae"])
def test_only_the_pooling_of_a_frozen_model_learns(models: Path, name: str) -> None:
    encoder = PretrainedEncoder(str(models / name), 3, 4, 32, freeze=True, pooling="attention")
    embedder = Embedder(encoder, [16], 8, "sphere").train()
    teacher = Teacher(embedder)
    backbone = {key: value.clone() for key, value in encoder.backbone.state_dict().items()}
    assert encoder.pool is not None
    followed: Any = teacher.embedder.encoder
    before = [p.clone() for p in followed.pool.parameters()]
    learning = [p for p in embedder.parameters() if p.requires_grad]
    assert len(learning) == sum(len(list(part.parameters())) for part in (encoder.pool, embedder.projector))
    optimizer = torch.optim.AdamW(learning, 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        embedder(segment(4)).sum().backward()
        assert all(p.grad is not None for p in learning)
        assert all(p.grad is None for p in encoder.backbone.parameters())
        optimizer.step()
    teacher.update(embedder, 0.5)
    assert all(torch.equal(value, backbone[key]) for key, value in encoder.backbone.state_dict().items())
    assert all(not torch.equal(a, b) for a, b in zip(before, followed.pool.parameters(), strict=True))


def test_the_mean_draws_no_random_number(models: Path) -> None:
    """So that the weights after the encoder are those that a seed gave before there was a choice."""
    torch.manual_seed(5)
    PretrainedEncoder(str(models / "dinov2"), 3, 1, 32)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("freeze", ["true", "false"])
@pytest.mark.parametrize("name", ["vjepa2", "dinov3"])
def test_it_trains_from_pixels(
    name: str, freeze: str, pooling: str, models: Path, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config(
        "model.encoder=pretrained", f"model.encoder.path={models / name}", f"model.encoder.freeze={freeze}",
        f"model.encoder.pooling={pooling}", "data.num_frames=2", "data.size_px=32", "train.steps=2",
        "train.eval_every=2",
    )  # fmt: skip
    run = train(config)
    checkpoint = load_checkpoint(run)
    assert checkpoint is not None
    assert any("encoder.backbone" in key for key in checkpoint.optimizer) == (freeze == "false")
    assert any("encoder.pool." in key for key in checkpoint.optimizer) == (pooling == "attention")
    stored = load_file(models / name / "model.safetensors")
    key = next(key for key in stored if key.endswith("layer.0.norm1.weight") and "predictor" not in key)
    [trained] = [value for name, value in checkpoint.model.items() if name.endswith(key)]
    assert torch.equal(trained, stored[key]) == (freeze == "true")
    assert load(run).encode(segment(2, 2, 1)).shape == (2, 16)


def test_a_wrong_number_of_frames_ends_training_with_one_line(models: Path, tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"reads 2 frames at a time: data.num_frames=3 must be a multiple of that"):
        train(tiny_config("model.encoder=pretrained", f"model.encoder.path={models / 'vjepa2'}"))
