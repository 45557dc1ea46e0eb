"""Encoders: clip -> features -> embedding.

Legend: B clips, T frames, C channels, H = W pixels, F features, D embedding dimensions, I images, M numbers per map.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldmodel.config import Kernels, Norm, Pooling
from worldmodel.nets.convolutions import Conv2d, Conv3d
from worldmodel.nets.parallel import all_gather

NUM_MOMENTS = {"mean": 1, "moments": 6}
"""Numbers that pooling keeps per feature map. The mean loses a feature's position. First moments, of the pixels'
coordinates weighted by the map, give its position, and second moments its extent."""


class Conv3dEncoder(nn.Module):
    """The video encoder of AdaSSL (arXiv 2602.02381, appendix D.5): five convolutions, each with BN and ReLU.

    Channels 32, 64, 128, 128, 256 times `width`; kernels space, space, time, time, space; spatial strides 2, 2, 1, 1,
    2. The number of frames is kept. Pooling over height and width gives F = channels * moments * T features.

    Args:
        kernels: "space" has all kernels in space, and encodes each frame by itself.
    """

    CHANNELS = (32, 64, 128, 128, 256)
    SPACE, TIME = (1, 3, 3), (3, 1, 1)
    KERNELS: Mapping[Kernels, Sequence[tuple[int, int, int]]] = {
        "space_time": (SPACE, SPACE, TIME, TIME, SPACE),
        "space": (SPACE,) * 5,
    }
    STRIDES = (2, 2, 1, 1, 2)

    def __init__(
        self,
        channels: int,
        num_frames: int,
        width: float,
        pooling: Pooling = "mean",
        kernels: Kernels = "space_time",
    ) -> None:
        super().__init__()
        self.pooling = pooling
        layers: list[nn.Module] = []
        for base, kernel, stride in zip(self.CHANNELS, self.KERNELS[kernels], self.STRIDES, strict=True):
            out_channels = _scaled(base, width)
            layers += [
                Conv3d(channels, out_channels, kernel, stride),
                nn.BatchNorm3d(out_channels),
                nn.ReLU(inplace=True),
            ]
            channels = out_channels
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.num_features = channels * NUM_MOMENTS[pooling] * num_frames

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1]: features [B, F]."""
        volume = rearrange(video, "b t c h w -> b c t h w").contiguous(memory_format=torch.channels_last_3d)
        pooled = _pooled(rearrange(self.layers(volume), "b c t h w -> (b t) c h w"), self.pooling)
        return rearrange(pooled, "(b t) c -> b (c t)", b=video.shape[0])


class ResNetEncoder(nn.Module):
    """An encoder for larger frames (128 px and up): a residual network on each frame, then a convolution over time.

    Four stages of two basic blocks (He et al., arXiv 1512.03385, table 1, ResNet-18) at channels 64, 128, 256, 512
    times `width`, total stride 32. Pooling over height and width gives channels * moments numbers per frame. One
    convolution over time mixes the frames. F = channels * T features.
    """

    CHANNELS = (64, 128, 256, 512)

    def __init__(self, channels: int, num_frames: int, width: float, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.pooling = pooling
        first = _scaled(self.CHANNELS[0], width)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, first, 7, 2, 3, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = first
        for stage, base in enumerate(self.CHANNELS):
            out_channels = _scaled(base, width)
            layers += [
                _BasicBlock(channels, out_channels, stride=1 if stage == 0 else 2),
                _BasicBlock(out_channels, out_channels, stride=1),
            ]
            channels = out_channels
        self.frames = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.time = nn.Sequential(
            nn.Conv1d(channels * NUM_MOMENTS[pooling], channels, 3, padding=1, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
        )
        self.num_features = channels * num_frames

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W] in [0, 1]: features [B, F]."""
        images = rearrange(video, "b t c h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        pooled = _pooled(self.frames(images), self.pooling)
        return self.time(rearrange(pooled, "(b t) c -> b c t", b=video.shape[0])).flatten(1)


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Conv2d(in_channels, out_channels, 3, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same = stride == 1 and in_channels == out_channels
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(Conv2d(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.residual(images) + self.shortcut(images))


class MlpEncoder(nn.Module):
    """An encoder for vector observations, clips [B, T, C, 1, 1]: three layers of 256 times `width` units."""

    def __init__(self, channels: int, num_frames: int, width: float) -> None:
        super().__init__()
        self.num_features = _scaled(256, width)
        # Leaky, and without batch norm: the function continues linearly outside the range of training.
        dims = [channels * num_frames, self.num_features, self.num_features, self.num_features]
        layers = [layer for pair in pairwise(dims) for layer in (nn.Linear(*pair), nn.LeakyReLU(0.2))]
        self.layers = nn.Sequential(*layers)

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, 1, 1]: features [B, F]."""
        return self.layers(video.flatten(1))


class Encoder(Protocol):
    """A network from a clip to features: an nn.Module with these members.

    To add one to the project, write its class in a file of this folder, and its entry in `EncoderConfig`
    (worldmodel/config/model.py). Classes are offered channels=C, num_frames=T and size_px=H (worldmodel/parts.py).

    num_features: F.

    One that learns by a loss of its own is also a `SelfTaught`.
    """

    num_features: int

    def forward(self, video: Tensor) -> Tensor:
        """Encode video [B, T, C, H, W], frames in [0, 1] or factors: features [B, F]."""


@runtime_checkable
class SelfTaught(Protocol):
    """An encoder with a loss of its own, which is added to the others in training (worldmodel/nets/objects.py)."""

    def with_loss(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode video [B, T, C, H, W]: features [B, F], and the encoder's own loss of each clip [B]."""


def mlp(
    dims: Sequence[int], *, final_norm: bool = False, learned_scale: bool = True, norm: Norm = "batch"
) -> nn.Sequential:
    """Build an MLP [B, dims[0]] -> [B, dims[-1]].

    Between its Linear layers are BN and ReLU (norm="batch"), LN and GELU ("layer"), or ReLU alone ("none"). A Linear
    layer before BN has no bias, which BN would cancel.

    Args:
        final_norm: end in BN instead of a bare Linear layer.
        learned_scale: the final BN learns a scale and a shift. Otherwise they are 1 and 0.
    """
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(dims)):
        last = index == len(dims) - 2
        layers.append(nn.Linear(fan_in, fan_out, bias=not final_norm if last else norm != "batch"))
        if last:
            layers += [nn.BatchNorm1d(fan_out, affine=learned_scale)] if final_norm else []
        elif norm == "batch":
            layers += [nn.BatchNorm1d(fan_out), nn.ReLU(inplace=True)]
        elif norm == "layer":
            layers += [nn.LayerNorm(fan_out), nn.GELU()]
        else:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Embedder(nn.Module):
    """Encoder and projector: clip -> embedding.

    Args:
        encoder: any module with the members of `Encoder`.
        hidden_dims: sizes of the projector's hidden layers. None: no projector, and D = F.
        embedding_dim: D.
        norm: "sphere" gives every embedding the length sqrt(D). "standard" ends in batch norm, "white" in `Whitening`.
        learned_scale: as in `mlp`.

    A cosine determines an embedding only up to its length. On the sphere, the embeddings of encoder, teacher and editor
    therefore have one length. That keeps coordinates of order 1 and lets a prediction be fed back.
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden_dims: Sequence[int] | None,
        embedding_dim: int,
        norm: Literal["sphere", "standard", "white"],
        learned_scale: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = cast(int, encoder.num_features)
        self.embedding_dim = embedding_dim
        self.norm = norm
        self.projector = nn.Sequential()
        if hidden_dims is not None:
            dims = [self.num_features, *hidden_dims, embedding_dim]
            self.projector = mlp(dims, final_norm=norm != "white", learned_scale=learned_scale)
        elif norm != "white":
            self.projector.append(nn.BatchNorm1d(embedding_dim, affine=False))
        if norm == "white":
            self.projector.append(Whitening(embedding_dim))

    def forward(self, video: Tensor) -> Tensor:
        """Embed video [B, T, C, H, W] in [0, 1]: float32 [B, D]."""
        return self.project(self.features(video))

    def features(self, video: Tensor) -> Tensor:
        """Return the encoder's features [B, F] of video [B, T, C, H, W] in [0, 1], before the projector."""
        return self.encoder(video)

    def features_and_loss(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `features`, and the loss of the encoder's own of each clip [B]; None if it has none."""
        if isinstance(self.encoder, SelfTaught):
            return self.encoder.with_loss(video)
        return self.features(video), None

    def project(self, features: Tensor) -> Tensor:
        """Embed the encoder's features [B, F]: float32 [B, D]."""
        return self.normalise(self.projector(features).float())

    def normalise(self, embedding: Tensor) -> Tensor:
        """Bring embeddings, or predictions of them, [..., D] to the length sqrt(D), if `norm` is "sphere"."""
        return normalise(embedding) if self.norm == "sphere" else embedding


class Whitening(nn.Module):
    """Batch norm that also decorrelates: y = L^-1 (x - mean), L L^T the covariance (Huang et al., arXiv 1804.08450).

    Training uses batch statistics of the ambient `global_batch` (worldmodel/nets/parallel.py), evaluation running ones.
    Without whitening, a linear layer before the loss can undo any constant metric on the embedding.
    """

    def __init__(self, dim: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.running_mean: Tensor
        self.running_covariance: Tensor
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_covariance", torch.eye(dim))

    def forward(self, values: Tensor) -> Tensor:
        """Whiten [B, D]: float32 [B, D]."""
        with torch.autocast(values.device.type, enabled=False):
            values = values.float()
            if self.training:
                batch = all_gather(values)
                mean = batch.mean(dim=0)
                centred = batch - mean
                covariance = centred.T @ centred / len(batch)
                with torch.no_grad():
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_covariance.lerp_(covariance, self.momentum)
            else:
                mean, covariance = self.running_mean, self.running_covariance
            # Relative to the mean variance: an untrained network's embeddings may be tiny.
            floor = 1e-4 * covariance.diagonal().mean() + 1e-12
            stable = covariance + floor * torch.eye(len(mean), device=mean.device)
            factor = torch.linalg.cholesky_ex(stable).L  # unlike cholesky, no GPU is synchronised for an error code
            return torch.linalg.solve_triangular(factor, (values - mean).T, upper=False).T


def normalise(embedding: Tensor) -> Tensor:
    """Scale [..., D] to Euclidean length sqrt(D): float32 [..., D]."""
    return F.normalize(embedding.float(), dim=-1) * embedding.shape[-1] ** 0.5


def _pooled(maps: Tensor, pooling: Pooling) -> Tensor:
    """Pool maps [I, C, H, W] by a product with the pixels' weights: [I, C * M], M = NUM_MOMENTS[pooling].

    The gradient of the product is dense and channels-last. That of `Tensor.mean` is an expanded scalar, with which the
    layers below take a quarter of a CPU step longer.
    """
    num_pixels = maps.shape[2] * maps.shape[3]
    weights = pixel_weights(maps.shape[2], maps.shape[3], pooling, maps.device)
    pixels = rearrange(maps, "n c h w -> n (h w) c")
    if pooling == "mean":
        sums = weights.to(maps).expand(maps.shape[0], -1, -1) @ pixels
        return rearrange(sums / num_pixels, "n k c -> n (c k)")
    # In bf16 a position would be a tenth of a pixel off.
    with torch.autocast(maps.device.type, enabled=False):
        mass, moments = (weights.expand(maps.shape[0], -1, -1) @ pixels.float()).split([1, len(weights) - 1], dim=1)
        pooled = torch.cat([mass / num_pixels, moments / (mass + EMPTY_MASS)], dim=1)
        return rearrange(pooled, "n k c -> n (c k)")


EMPTY_MASS = 0.05
"""Added to the sum of a map, which is never negative, so that the centre of an empty map is in the middle."""


def pixel_weights(height: int, width: int, pooling: Pooling, device: torch.device) -> Tensor:
    """Return the weights of pixels in each number that pooling keeps: [M, H * W].

    They are 1, and with "moments" also x, y, x^2, x y, y^2; x and y run from -1 to 1.
    """
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width, device=device).expand(height, width)
    ones = torch.ones(height, width, device=device)
    return torch.stack([ones] if pooling == "mean" else [ones, x, y, x * x, x * y, y * y]).flatten(1)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
