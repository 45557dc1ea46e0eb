"""Pretrained encoders of images and videos from Hugging Face's transformers (the extra `pretrained`).

Legend: B clips, T frames, C channels, H = W pixels, I = B * T images, G times (frames, or tubelets of a video model), P
patches of one time, E dimensions of a token, F features.
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
from worldmodel.config import TokenPooling
from worldmodel.nets.attentive import AttentivePool

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INPUTS = ("pixel_values", "pixel_values_videos")
"""Names of the inputs of models that see pictures alone: images, or videos."""
VJEPA2 = "vjepa2"
"""The type of a V-JEPA 2 model in its config. It also holds a predictor, which is not used."""


class PretrainedEncoder(nn.Module):
    """An image model on each frame of a segment, or a video model on the whole segment; then pooling.

    Frames are normalised as the model's preprocessor config says, or by ImageNet's mean and standard deviation. A
    single channel is repeated to three. Dropout is switched off. Code that comes with a model is never run, and nothing
    is unpickled.

    A video model, such as V-JEPA 2 or VideoMAE, sees all frames of a segment at once, and has one time for each
    `tubelet_size` of them. T must be a multiple of it: a repeated frame would look like things that stand still. Of
    V-JEPA 2 the encoder alone is kept; its positions are those of the frames' size, whatever size it was trained with.

    Args:
        path: the name of a model on the Hugging Face hub, or a folder with config.json and model.safetensors.
        freeze: keep the weights fixed and the model in evaluation mode. The pooling still learns.
        pooling: "mean" over the patches, or the pixels of the last feature maps, of each time: F = G * E. "attention":
            learned queries read all tokens of the segment (worldmodel/nets/attentive.py).
        checkpoint_activations: recompute its layers in the backward pass instead of storing them.

    Raises:
        UserError: transformers is not installed; the model does not exist or is damaged; its inputs are not images or
            videos, or are of another size or number; it cannot recompute its layers.
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
        pooling: TokenPooling = "mean",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        assert channels in (1, 3), "the config is checked for this"
        self.freeze = freeze
        self.backbone, missing = _load(path, size_px)
        self.tubelet_frames = _tubelet_frames(self.backbone, path, num_frames)
        self._options = _options(self.backbone)
        mean, std = _normalisation(path, is_video=self.tubelet_frames is not None)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        num_patches, dim = self._probe(path, num_frames, size_px, missing)
        num_times = num_frames // (self.tubelet_frames or 1)
        self.pool = AttentivePool(dim, num_times, num_patches) if pooling == "attention" else None
        self.num_features = self.pool.num_features if self.pool else num_times * dim
        if freeze:
            self.backbone.requires_grad_(False)
        if checkpoint_activations:
            _checkpoint_activations(self.backbone, path)
        self.train()

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1], or its `frozen_part` [B, G, P, E]: features [B, F]."""
        tokens = video if video.ndim == 4 else self.tokens(video)
        return self.pool(tokens) if self.pool else tokens.mean(dim=2).flatten(1)

    def frozen_part(self, video: Tensor) -> Tensor:
        """Return what pooling needs of video [B, T, C, H, W] in [0, 1], for a cache: [B, G, P, E].

        For attention these are all tokens in fp16, otherwise their mean over space in fp32, with P = 1.
        """
        tokens = self.tokens(video)
        return tokens.half() if self.pool else tokens.mean(dim=2, keepdim=True).float()

    def tokens(self, video: Tensor) -> Tensor:
        """Return the backbone's last tokens [B, G, P, E] of video [B, T, C, H, W] in [0, 1]: G times of P patches."""
        normalised = (video.expand(-1, -1, 3, -1, -1) - self.mean) / self.std
        if self.tubelet_frames:
            last = self._last(normalised)
            return last.unflatten(1, (video.shape[1] // self.tubelet_frames, -1))
        last = self._last(normalised.flatten(0, 1))
        if last.ndim == 4:
            last = rearrange(last, "i e h w -> i (h w) e")
        # Class and register tokens precede the patches. A hierarchical model has none of them, and fewer patches.
        patch_px = getattr(self.backbone.config, "patch_size", 1)
        patch_px = patch_px if isinstance(patch_px, int) else 1
        num_patches = (video.shape[3] // patch_px) * (video.shape[4] // patch_px)
        return last[:, -num_patches:].unflatten(0, video.shape[:2])

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self

    def _last(self, inputs: Tensor) -> Tensor:
        return self.backbone(**{self.backbone.main_input_name: inputs}, **self._options).last_hidden_state

    def _probe(self, source: str, num_frames: int, size_px: int, missing: set[str]) -> tuple[int, int]:
        """Encode a short segment to find P and E, and freeze the weights that do not affect the tokens.

        Such weights, for example a pooling layer's, may be missing in the files. They have no gradient, for which DDP
        would wait.
        """
        knows_one_length = hasattr(self.backbone.config, "num_frames")
        length = num_frames if knows_one_length else self.tubelet_frames or 1
        try:
            tokens = self.tokens(torch.zeros(1, length, 3, size_px, size_px))
        except (AttributeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"model.encoder.path={source} takes no frames of data.size_px={size_px}: {_first_line(error)}"
            ) from error
        names, weights = zip(*self.backbone.named_parameters(), strict=True)
        gradients = torch.autograd.grad(tokens.sum(), weights, allow_unused=True)
        for name, weight, gradient in zip(names, weights, gradients, strict=True):
            if gradient is None:
                weight.requires_grad_(False)
            elif name in missing:
                raise UserError(f"model.encoder.path={source} lacks the weight {name}: it holds another model")
        return tokens.shape[2], tokens.shape[3]


def _load(source: str, size_px: int) -> tuple[Any, set[str]]:
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
        if config.model_type == VJEPA2:
            config.crop_size = size_px  # it fixes the positions of patches, and no weight
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
    if backbone.main_input_name not in INPUTS:
        raise UserError(
            f"model.encoder.path={source} is a {type(backbone).__name__}, which takes {backbone.main_input_name}: "
            "give a model of images or of videos alone"
        )
    if config.model_type == VJEPA2:
        backbone.predictor = None
    return backbone, set(info["missing_keys"])


def _switch_dropout_off(config: Any) -> None:
    """Set every dropout rate to zero. With dropout, a step would depend on the number of processes and on resumes."""
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):  # a nested config
            _switch_dropout_off(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _tubelet_frames(backbone: Any, source: str, num_frames: int) -> int | None:
    """Return how many frames a token of a video model spans; None for an image model.

    Raises:
        UserError: the model does not take segments of `num_frames` frames.
    """
    config = backbone.config
    tubelet = getattr(config, "tubelet_size", None)
    if tubelet is None:
        return None
    named = f"model.encoder.path={source}, a {type(backbone).__name__},"
    if not isinstance(tubelet, int):
        raise UserError(f"{named} is not supported: of video models, V-JEPA 2 and VideoMAE are")
    if num_frames % tubelet:
        raise UserError(
            f"{named} reads {tubelet} frames at a time: data.num_frames={num_frames} must be a multiple of that"
        )
    if num_frames != getattr(config, "num_frames", num_frames):
        raise UserError(f"{named} takes {config.num_frames} frames: set data.num_frames to it, not to {num_frames}")
    return tubelet


def _options(backbone: Any) -> dict[str, Any]:
    """Return the arguments of a model's forward pass besides its input."""
    if backbone.config.model_type == VJEPA2:
        return {"skip_predictor": True}
    # Some models interpolate position encodings of another size than the frames' only with this option.
    has_option = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
    return {"interpolate_pos_encoding": True} if has_option else {}


def _normalisation(source: str, *, is_video: bool) -> tuple[list[float], list[float]]:
    """Read mean and standard deviation per channel from the preprocessor's config. The default is ImageNet's."""
    names = ["preprocessor_config.json"]
    settings = _read_settings(source, ["video_preprocessor_config.json", *names] if is_video else names)
    if not settings.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return list(settings.get("image_mean", IMAGENET_MEAN)), list(settings.get("image_std", IMAGENET_STD))


def _read_settings(source: str, names: list[str]) -> dict[str, Any]:
    """Read the first of these JSON files that a model has; {} if it has none."""
    import huggingface_hub

    for name in names:
        path = Path(source) / name
        try:
            if not Path(source).is_dir():
                path = Path(huggingface_hub.hf_hub_download(source, name))
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, huggingface_hub.errors.EntryNotFoundError):
            pass
        except ValueError as error:
            raise UserError(f"model.encoder.path={source}: {path} is not valid JSON") from error
    return {}


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
