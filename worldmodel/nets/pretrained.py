"""Pretrained image encoders from Hugging Face's transformers (the extra `pretrained`), applied frame by frame.

Legend: B clips, T frames, C channels, H = W pixels, I = B * T images, E features of an image, F = T * E features.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from data_pipelines.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PretrainedEncoder(nn.Module):
    """An image model on each frame: the mean over its last patch tokens, or over the pixels of its last feature maps.

    Frames are normalised as the model's preprocessor_config.json says, or by ImageNet's mean and standard deviation. A
    single channel is repeated to three. Dropout is switched off. Code that comes with a model is never run, and nothing
    is unpickled.

    Args:
        path: the name of a model on the Hugging Face hub, or a folder with config.json and model.safetensors.
        freeze: keep the weights fixed and the model in evaluation mode.
        checkpoint_activations: recompute its layers in the backward pass instead of storing them.

    Raises:
        UserError: transformers is not installed; the model does not exist or is damaged; its inputs are not images, or
            images of another size; it cannot recompute its layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        path: str,
        channels: int,
        num_frames: int,
        size_px: int,
        freeze: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        assert channels in (1, 3), "the config is checked for this"
        self.freeze = freeze
        self.backbone, missing = _load(path)
        mean, std = _normalisation(path)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self._probe(path, size_px, missing)
        self.num_features = self.num_image_features * num_frames
        if freeze:
            self.requires_grad_(False)
        if checkpoint_activations:
            _checkpoint_activations(self.backbone, path)
        self.train()

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1] frame by frame: features [B, F]."""
        images = rearrange(video, "b t c h w -> (b t) c h w")
        return rearrange(self.image_features(images), "(b t) e -> b (t e)", b=video.shape[0])

    def image_features(self, images: Tensor) -> Tensor:
        """Encode images [I, C, H, W] in [0, 1]: features [I, E]."""
        normalised = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        last = self.backbone(normalised, **self._options).last_hidden_state
        if last.ndim == 4:
            return last.mean(dim=(2, 3))
        # Class and register tokens precede the patches. A hierarchical model has none of them, and fewer patches.
        patch_px = getattr(self.backbone.config, "patch_size", 1)
        patch_px = patch_px if isinstance(patch_px, int) else 1
        num_patches = (images.shape[2] // patch_px) * (images.shape[3] // patch_px)
        return last[:, -num_patches:].mean(dim=1)

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self

    def _probe(self, source: str, size_px: int, missing: set[str]) -> None:
        """Encode one image to find the number of features, and freeze the weights that do not affect them.

        Such weights, for example a pooling layer's, may be missing in the files. They have no gradient, for which DDP
        would wait.
        """
        # Some models interpolate position encodings of another size than the frames' only with this option.
        has_option = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        self._options: dict[str, Any] = {"interpolate_pos_encoding": True} if has_option else {}
        try:
            features = self.image_features(torch.zeros(1, 3, size_px, size_px))
        except (AttributeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"model.encoder.path={source} takes no frames of data.size_px={size_px}: {_first_line(error)}"
            ) from error
        names, weights = zip(*self.backbone.named_parameters(), strict=True)
        gradients = torch.autograd.grad(features.sum(), weights, allow_unused=True)
        for name, weight, gradient in zip(names, weights, gradients, strict=True):
            if gradient is None:
                weight.requires_grad_(False)
            elif name in missing:
                raise UserError(f"model.encoder.path={source} lacks the weight {name}: it holds another model")
        self.num_image_features = features.shape[1]


def _load(source: str) -> tuple[Any, set[str]]:
    """Load the model in fp32. Returns it and the names of weights that are missing in its files."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "model.encoder=pretrained needs the package transformers: pip install 'worldmodel[pretrained]'"
        ) from error
    messages = transformers.utils.logging
    messages.disable_progress_bar()
    verbosity = messages.get_verbosity()
    messages.set_verbosity_error()  # otherwise it prints a table of unused head weights
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        _switch_dropout_off(config)
        backbone, info = transformers.AutoModel.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(
            f"model.encoder.path={source} cannot be loaded: give a folder with config.json and "
            f"model.safetensors, or the name of a model on the Hugging Face hub ({_first_line(error)})"
        ) from error
    finally:
        messages.set_verbosity(verbosity)
    if backbone.main_input_name != "pixel_values":
        raise UserError(
            f"model.encoder.path={source} is a {type(backbone).__name__}, which takes {backbone.main_input_name}: "
            "give a model of images alone"
        )
    return backbone, set(info["missing_keys"])


def _switch_dropout_off(config: Any) -> None:
    """Set every dropout rate to zero. With dropout, a step would depend on the number of processes and on resumes."""
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):  # a nested config
            _switch_dropout_off(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _normalisation(source: str) -> tuple[list[float], list[float]]:
    """Read mean and standard deviation per channel from preprocessor_config.json. The default is ImageNet's."""
    import huggingface_hub

    path, settings = Path(source) / "preprocessor_config.json", {}
    try:
        if not Path(source).is_dir():
            path = Path(huggingface_hub.hf_hub_download(source, path.name))
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, huggingface_hub.errors.EntryNotFoundError):
        pass
    except ValueError as error:
        raise UserError(f"model.encoder.path={source}: {path} is not valid JSON") from error
    if not settings.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return list(settings.get("image_mean", IMAGENET_MEAN)), list(settings.get("image_std", IMAGENET_STD))


def _checkpoint_activations(backbone: Any, source: str) -> None:
    # Recomputing a batch norm would count its batch twice in the running statistics.
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())
    if has_batch_norm or not backbone.supports_gradient_checkpointing:
        raise UserError(
            f"model.encoder.checkpoint_activations: model.encoder.path={source}, a {type(backbone).__name__}, cannot "
            "recompute its layers: remove this key"
        )
    backbone.activation_checkpointing_enable({"use_reentrant": False})


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
