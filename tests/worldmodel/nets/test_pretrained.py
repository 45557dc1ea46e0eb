"""Image models of tiny size with random weights, saved to a folder and read from there."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipelines.errors import UserError
from tests.conftest import REPO
from worldmodel import load
from worldmodel.config import Config, load_config
from worldmodel.nets.encoders import Embedder
from worldmodel.nets.pretrained import PretrainedEncoder
from worldmodel.nets.teacher import Teacher
from worldmodel.runs.checkpoint import load_checkpoint
from worldmodel.training.loop import train
from worldmodel.training.optimisation import parameter_groups


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def small_vit(transformers: Any, **changes: Any) -> Any:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    return transformers.ViTConfig(**sizes, **{"image_size": 32, "patch_size": 8} | changes)


@pytest.fixture(scope="module")
def models(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vit/ (a classifier, so that it has a head and no pooling layer), dinov2/ (the same sizes) and resnet/."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = small_vit(transformers)
    transformers.ViTForImageClassification(config).save_pretrained(root / "vit")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(root / "dinov2")
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(resnet).save_pretrained(root / "resnet")
    return root


def clip(batch: int = 2, frames: int = 3, channels: int = 3, size_px: int = 32) -> Tensor:
    return torch.rand(batch, frames, channels, size_px, size_px, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "num_features"), [("vit", 24), ("dinov2", 24), ("resnet", 12)])
@pytest.mark.parametrize(("channels", "frames", "size_px"), [(3, 3, 32), (1, 2, 64)])
def test_features_of_each_frame_alone(
    models: Path, name: str, num_features: int, channels: int, frames: int, size_px: int
) -> None:
    encoder = PretrainedEncoder(str(models / name), channels, frames, size_px).eval()
    video = clip(2, frames, channels, size_px)
    features = encoder(video).unflatten(1, (frames, -1))
    assert encoder.num_features == frames * num_features == features.shape[1] * features.shape[2]
    for frame in range(frames):
        torch.testing.assert_close(features[:, frame], encoder(video[:, frame : frame + 1]), atol=1e-5, rtol=1e-5)


def test_a_transformers_features_are_the_mean_of_its_patches(models: Path, transformers: Any) -> None:
    model = transformers.AutoModel.from_pretrained(models / "vit").eval()
    images = clip(2, 1)[:, 0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    tokens = model(((images.movedim(1, -1) - mean) / std).movedim(-1, 1)).last_hidden_state
    assert tokens.shape == (2, 17, 24)
    encoder = PretrainedEncoder(str(models / "vit"), 3, 1, 32).eval()
    torch.testing.assert_close(encoder(images[:, None]), tokens[:, 1:].mean(dim=1), atol=1e-5, rtol=1e-5)


def test_frames_are_normalised_as_the_model_says_and_grey_is_repeated(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for file in (models / "vit").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    own = PretrainedEncoder(str(folder), 1, 1, 32).eval()
    images = clip(2, 1, 1)[:, 0]
    shifted = torch.cat([(images - m) / s for m, s in zip(*settings.values(), strict=True)], dim=1)
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}')
    plain = PretrainedEncoder(str(folder), 3, 1, 32).eval()
    torch.testing.assert_close(own(images[:, None]), plain(shifted[:, None]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(own(images[:, None]), plain(images[:, None]), atol=1e-2)


def test_every_weight_that_learns_has_a_gradient(models: Path) -> None:
    """DDP waits for all of them: a pooling layer that the files lack and a token of masks are none."""
    for name in ("vit", "dinov2", "resnet"):
        encoder = PretrainedEncoder(str(models / name), 3, 2, 32)
        encoder(clip(2, 2)).square().sum().backward()
        learning = {key: p for key, p in encoder.named_parameters() if p.requires_grad}
        assert learning and all(p.grad is not None for p in learning.values())
        assert not any("pooler" in key or "mask_token" in key for key in learning)


def test_dropout_and_stochastic_depth_are_off(transformers: Any, tmp_path: Path) -> None:
    sizes = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 1], "image_size": 32, "patch_size": 4, "window_size": 4}
    noise = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    swin = transformers.SwinModel(transformers.SwinConfig(**sizes, **noise)).train()
    images = clip(4)[:, 0]
    assert not torch.equal(*(swin(images).last_hidden_state for _ in range(2)))
    swin.save_pretrained(tmp_path)
    encoder = PretrainedEncoder(str(tmp_path), 3, 3, 32).train()
    assert torch.equal(encoder(clip()), encoder(clip()))


def test_a_frozen_encoder_stays_as_it_is(models: Path) -> None:
    encoder = PretrainedEncoder(str(models / "resnet"), 3, 2, 32, freeze=True)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    embedder = Embedder(encoder, [16], 8, "sphere").train()
    teacher = Teacher(embedder)
    assert encoder.training and not any(module.training for module in encoder.backbone.modules())
    optimizer = torch.optim.AdamW(parameter_groups(embedder, 0.1), 0.1)
    followed = sum(len(group["params"]) for group in optimizer.param_groups)
    assert followed == len(list(embedder.projector.parameters()))
    for _ in range(2):
        embedder(clip(4, 2)).sum().backward()
        optimizer.step()
    moved = [p.clone() for p in teacher.parameters()]
    teacher.update(embedder, 0.5)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(next(teacher.embedder.encoder.parameters()), next(encoder.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(moved, teacher.parameters(), strict=True))


def test_checkpointed_activations_give_the_same_gradients(models: Path) -> None:
    gradients = []
    for checkpointed in (False, True):
        encoder = PretrainedEncoder(str(models / "vit"), 3, 2, 32, checkpoint_activations=checkpointed)
        calls: list[bool] = []
        encoder.backbone.layers[0].layernorm_before.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(True)
        )
        encoder(clip(2, 2)).square().sum().backward()
        assert len(calls) == 1 + checkpointed
        gradients.append([p.grad for p in encoder.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)
    with pytest.raises(UserError, match=r"a ResNetModel, cannot recompute its layers: remove this key"):
        PretrainedEncoder(str(models / "resnet"), 3, 2, 32, checkpoint_activations=True)


def test_what_cannot_be_loaded_is_told(models: Path, transformers: Any, tmp_path: Path) -> None:
    def told(folder: Path, size_px: int = 32) -> str:
        with pytest.raises(UserError) as caught:
            PretrainedEncoder(str(folder), 3, 1, size_px)
        message = str(caught.value)
        assert "\n" not in message and str(folder) in message
        return message

    assert "give a folder with config.json and model.safetensors" in told(tmp_path / "none")
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "config.json").write_text((models / "vit" / "config.json").read_text())
    weights = load_file(models / "vit" / "model.safetensors")
    gone = next(key for key in weights if "layernorm_before.weight" in key)
    save_file({key: value for key, value in weights.items() if key != gone}, lacking / "model.safetensors")
    assert "lacks the weight" in told(lacking) and "layernorm_before.weight" in told(lacking)
    (lacking / "model.safetensors").write_bytes(b"damaged")
    assert "cannot be loaded" in told(lacking)
    text = tmp_path / "text"
    bert = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(bert).save_pretrained(text)
    assert "is a BertModel, which takes input_ids: give a model of images or of videos alone" in told(text)
    assert "takes no frames of data.size_px=4" in told(models / "vit", size_px=4)


def test_pickled_weights_and_code_of_others_are_never_run(models: Path, tmp_path: Path) -> None:
    class Mark:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "pickled"
    folder.mkdir()
    config = json.loads((models / "vit" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(Mark(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        PretrainedEncoder(str(folder), 3, 1, 32)
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "other.Other", "AutoModel": "other.Other"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "other.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        PretrainedEncoder(str(folder), 3, 1, 32)
    assert not (tmp_path / "ran").exists()


def test_without_the_package_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'worldmodel\[pretrained\]'"):
        PretrainedEncoder("anything", 3, 1, 32)


def test_activations_of_a_frozen_encoder_are_not_checkpointed() -> None:
    overrides = [
        "model.encoder=pretrained",
        "model.encoder.path=name",
        "model.encoder.freeze=true",
    ]
    with pytest.raises(UserError, match=r"saves nothing with model.encoder.freeze"):
        load_config(REPO / "configs" / "objectives.yaml", [*overrides, "model.encoder.checkpoint_activations=true"])


@pytest.mark.parametrize("freeze", ["true", "false"])
def test_it_trains_end_to_end(freeze: str, models: Path, tiny_config: Callable[..., Config]) -> None:
    source = f"model.encoder.path={models / 'dinov2'}"
    config = tiny_config(
        "model.encoder=pretrained", source, f"model.encoder.freeze={freeze}", "train.steps=2",
        "train.eval_every=2",
    )  # fmt: skip
    run = train(config)
    checkpoint = load_checkpoint(run)
    assert checkpoint is not None
    name = "layer.0.norm1.weight"
    [before] = [value for key, value in load_file(models / "dinov2" / "model.safetensors").items() if name in key]
    for tensors in (checkpoint.model, checkpoint.teacher):
        [after] = [value for key, value in tensors.items() if name in key]
        assert torch.equal(before, after) == (freeze == "true")
    assert any("backbone" in key for key in checkpoint.optimizer) == (freeze == "false")
    assert load(run).encode(clip(2, 3, 1, 64)).shape == (2, 16)
