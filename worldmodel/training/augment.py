"""Augmentation: random changes of training clips, on the device (the section `data.augment`).

A clip is changed as a whole: one draw holds for all of its segments and frames, so that neither motion nor the meaning
of r changes within it. Noise alone differs between pixels and frames, as that of a camera does. The draw of a clip is a
function of (seed, step, its place in the global batch). It depends neither on the number of processes nor on resumes.

The segments of image pairs (`data.source: images`) are unlike those of a video: each has a draw of its own, that of its
place among all segments of the global batch.

The changes of a clip follow one another as in a camera: geometry, blur, colour, noise. Several cameras of a clip are
changed alike; the mean luma and the colours are those of each camera.

Legend: N places of the global batch, B clips of this process, T frames of a clip, C channels, H = W pixels, K numbers
of a label. Places in the frame are (x, y) from -1 at the left and top edge to 1 at the right and bottom edge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from data_pipelines.transforms import on_device, to_float
from worldmodel.config import AugmentConfig, Config, ImagesConfig, VideosConfig, num_cameras
from worldmodel.sources.source import Source
from worldmodel.training.optimisation import AUGMENT, step_generator

YIQ = ((0.30, 0.59, 0.11), (0.599, -0.2773, -0.3217), (0.213, -0.5251, 0.3121))
"""Luma and the two coordinates of colour from R, G and B, as in Python's colorsys."""
RADIUS_STDS = 3
"""Standard deviations after which the Gaussian of a blur is cut off."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Draws:
    """The drawn changes of N clips, float32 on the CPU.

    scale, shift: [N, 2], per axis: what is shown at p in the new frame comes from scale * p + shift of the old one.
        A mirrored axis has a negative scale.
    blur: [N, radius + 1], the weights of a pixel and of its neighbours on either side, along each axis.
    gain: [N], the factor of all values.
    lift: [N], the part of the clip's mean luma that is added.
    chroma: [N, 3, 3], the matrix of saturation and hue, which leaves greys as they are.
    noise: [N], the standard deviation of the noise.
    noise_seed: int64 [N].
    """

    scale: Tensor
    shift: Tensor
    blur: Tensor
    gain: Tensor
    lift: Tensor
    chroma: Tensor
    noise: Tensor
    noise_seed: Tensor

    def of(self, rows: Tensor) -> "Draws":
        """Return the draws of the clips at `rows` [B] of the global batch."""
        return Draws(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})


def augmented(batch: Batch, config: Config, step: int, device: torch.device) -> Batch:
    """Return a training batch with each clip, and its labels of positions, changed at random.

    The clips are then float32 in [0, 1] on the device. Without augmentation the batch is returned as it is.

    Raises:
        UserError: a label of `data.augment.position_labels` is missing, or does not hold pairs.
    """
    settings, rows = config.data.augment, batch["row"].cpu()
    if not settings.active or not len(rows):
        return batch
    # Of image pairs, each segment is changed as a clip of its own.
    apart = config.data.num_segments if isinstance(config.data, ImagesConfig) else 1
    places = (rows[:, None] * apart + torch.arange(apart)).flatten()
    draws = draw(settings, config.seed, step, config.data.batch_size * apart).of(places)
    labels = dict(batch["labels"])
    for name, edges in settings.position_labels.items():
        if name not in labels:
            has = ", ".join(sorted(labels)) or "none"
            raise UserError(f"data.augment.position_labels: these videos have no label {name!r}: they have {has}")
        moved_label = move_positions(name, _segments_apart(labels[name], apart), draws, edges)
        labels[name] = moved_label.reshape(labels[name].shape)
    video = to_float(on_device(batch["video"], device))
    changed = change(_segments_apart(video, apart), settings, draws, num_cameras(config.data))
    return {**batch, "video": changed.reshape(video.shape), "labels": labels}


def _segments_apart(values: Tensor, count: int) -> Tensor:
    """Return the frames of B clips, [B, T, ...], as those of B * count clips: [B * count, T / count, ...].

    Labels of whole clips, [B], are returned as they are.
    """
    return values if count == 1 or values.ndim < 3 else values.reshape(len(values) * count, -1, *values.shape[2:])


def check_augmentation(source: Source, config: Config) -> None:
    """Check that the training clips of a source may be changed, if the config asks for it.

    Raises:
        UserError: they are not pictures, or have a known law, which holds for unchanged clips.
    """
    active = config.data.augment.active
    if not active:
        return
    keys = ", ".join(f"data.augment.{key}={value}" for key, value in active.items())
    if source.content != "frames":
        raise UserError(f"{keys}: data.source={config.data.source} has no pictures to change: leave these keys out")
    if source.known_law("train", config.evaluation.horizon) is not None:
        place = config.data.place if isinstance(config.data, VideosConfig) else config.data.source
        raise UserError(f"{keys}: {place} has a known law, which holds for unchanged clips: leave these keys out")


# ---------------------------------------------------------------------------------------------------------- the draws


def draw(settings: AugmentConfig, seed: int, step: int, size: int) -> Draws:
    """Draw the changes of all `size` clips of the global batch of a step."""
    generator = step_generator(seed, step, CPU, AUGMENT)
    uniform = torch.rand(10, size, generator=generator, dtype=torch.float32)
    noise_seed = torch.randint(2**62, (size,), generator=generator)
    crop, left, top, mirror_x, mirror_y, bright, contrast, saturation, hue, blur = uniform
    side = 1 - (1 - settings.crop_min_scale) * crop
    mirrors = settings.flip in ("horizontal", "both"), settings.flip in ("vertical", "both")
    sign = torch.stack([1 - 2 * (drawn < 0.5) * on for drawn, on in zip((mirror_x, mirror_y), mirrors, strict=True)])
    brightness, contrasts, saturations = (
        1 + strength * (2 * drawn - 1)
        for strength, drawn in (
            (settings.brightness, bright),
            (settings.contrast, contrast),
            (settings.saturation, saturation),
        )
    )
    noise = torch.rand(size, generator=generator, dtype=torch.float32)
    return Draws(
        scale=(side * sign).T,
        shift=((1 - side) * (2 * torch.stack([left, top]) - 1)).T,
        blur=blur_weights(settings.blur * blur, math.ceil(RADIUS_STDS * settings.blur)),
        gain=brightness * contrasts,
        lift=brightness * (1 - contrasts),
        chroma=chroma_matrix(saturations, 2 * math.pi * settings.hue * (2 * hue - 1)),
        noise=settings.noise * noise,
        noise_seed=noise_seed,
    )


def blur_weights(std: Tensor, radius: int) -> Tensor:
    """Return the weights of Gaussians with standard deviations `std` [N] at the offsets 0 to radius: [N, radius + 1].

    Those of both sides sum to one.
    """
    weights = torch.exp(-0.5 * (torch.arange(radius + 1) / std.clamp_min(1e-3)[:, None]) ** 2)
    return weights / (2 * weights.sum(dim=1, keepdim=True) - weights[:, :1])


def chroma_matrix(saturation: Tensor, angle: Tensor) -> Tensor:
    """Return the matrices on R, G and B that scale colour by `saturation` [N] and turn it by `angle` [N]: [N, 3, 3].

    The plane of colour is that of I and Q in YIQ. Luma is left as it is.
    """
    to_yiq = torch.tensor(YIQ, dtype=torch.float32)
    cosine, sine = saturation * angle.cos(), saturation * angle.sin()
    turn = angle.new_zeros(len(angle), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cosine, -sine, sine, cosine
    return to_yiq.inverse() @ turn @ to_yiq


# -------------------------------------------------------------------------------------------------------- the changes


def change(video: Tensor, settings: AugmentConfig, draws: Draws, num_cameras: int = 1) -> Tensor:
    """Return clips [B, T, C, H, W] with values in [0, 1], changed by the draws of B clips.

    The cameras of a clip are changed alike, each from its own C / num_cameras channels. Each clip is computed from
    itself alone, in operations that do not depend on B.
    """
    if settings.changes_geometry:
        video = moved(video, draws)
    if settings.blur:
        video = blurred(video, on_device(draws.blur, video.device))
    if settings.brightness or settings.contrast or settings.changes_chroma:
        cameras = video.chunk(num_cameras, dim=2)
        changed = [recoloured(camera, draws, mixes=settings.changes_chroma) for camera in cameras]
        video = changed[0] if num_cameras == 1 else torch.cat(changed, dim=2)
    if settings.noise:
        video = noisy(video, draws)
    return video


def moved(video: Tensor, draws: Draws) -> Tensor:
    """Crop, resize and mirror clips [B, T, C, H, W] by bilinear interpolation."""
    height, width = video.shape[-2:]
    scale, shift = (on_device(values, video.device) for values in (draws.scale, draws.shift))
    x, y = (
        scale[:, axis, None] * _centres(size, video.device) + shift[:, axis, None]
        for axis, size in enumerate((width, height))
    )
    shape = len(video), height, width
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    frames = F.grid_sample(video.flatten(1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return frames.view_as(video)


def _centres(size: int, device: torch.device) -> Tensor:
    """Return the places of the centres of `size` pixels along an axis: [size]."""
    return (2 * torch.arange(size, device=device, dtype=torch.float32) + 1) / size - 1


def blurred(video: Tensor, weights: Tensor) -> Tensor:
    """Blur clips [B, T, C, H, W] along both axes by weights [B, radius + 1] on either side. Edges are continued."""
    frames, radius = video.flatten(1, 2), weights.shape[1] - 1
    columns = weights[:, :, None, None, None].unbind(dim=1)
    for axis, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = frames.shape[axis]
        wide = F.pad(frames, padding, mode="replicate")
        frames = columns[0] * wide.narrow(axis, radius, size)
        for offset in range(1, radius + 1):
            both = wide.narrow(axis, radius - offset, size) + wide.narrow(axis, radius + offset, size)
            frames.addcmul_(columns[offset], both)
    return frames.view_as(video)


def recoloured(video: Tensor, draws: Draws, *, mixes: bool) -> Tensor:
    """Change brightness and contrast of clips [B, T, C, H, W], and with `mixes` their saturation and hue."""
    gain, lift, chroma = (
        on_device(values, video.device) for values in (draws.gain, draws.lift, draws.chroma * draws.gain[:, None, None])
    )
    changed = _mixed(video, chroma) if mixes else video * gain[:, None, None, None, None]
    return changed.add_((lift * mean_luma(video))[:, None, None, None, None]).clamp_(0, 1)


def _mixed(video: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the channels of each pixel of [B, T, 3, H, W] by a matrix [B, 3, 3]."""
    columns = matrix[:, None, :, :, None, None].unbind(dim=3)
    mixed = columns[0] * video[:, :, :1]
    for channel in (1, 2):
        mixed.addcmul_(columns[channel], video[:, :, channel : channel + 1])
    return mixed


def mean_luma(video: Tensor) -> Tensor:
    """Return the mean luma of each clip [B, T, C, H, W]; that of other than three channels is their mean: [B]."""
    channels = video.shape[2]
    weights = YIQ[0] if channels == 3 else (1 / channels,) * channels
    # The order of a sum may depend on B. In double precision that is lost in rounding to float32.
    of_channels = video.mean(dim=(3, 4)).double().mean(dim=1).unbind(dim=1)
    parts = [weight * values for weight, values in zip(weights, of_channels, strict=True)]
    return torch.stack(parts).sum(dim=0).to(torch.float32)


def noisy(video: Tensor, draws: Draws) -> Tensor:
    """Add Gaussian noise to clips [B, T, C, H, W], of its own at each pixel."""
    generator = torch.Generator(video.device)
    noise = torch.empty_like(video)
    for clip, seed in zip(noise, draws.noise_seed.tolist(), strict=True):
        clip.normal_(generator=generator.manual_seed(seed))
    std = on_device(draws.noise, video.device)[:, None, None, None, None]
    return noise.mul_(std).add_(video).clamp_(0, 1)


# --------------------------------------------------------------------------------------------------------- the labels


def move_positions(name: str, values: Tensor, draws: Draws, edges: Sequence[float]) -> Tensor:
    """Return the positions [B, ..., K] of a label after the geometric changes of B clips, float32.

    Args:
        edges: the label's values at the left, right, top and bottom edge of a frame.

    Raises:
        UserError: the label does not hold pairs of x and y.
    """
    if values.ndim < 2 or values.shape[-1] % 2:
        count = values.shape[-1] if values.ndim > 1 else 1
        raise UserError(f"data.augment.position_labels: {name!r} holds {count} numbers, not pairs of x and y")
    left, right, top, bottom = edges
    middle, half = torch.tensor([left + right, top + bottom]) / 2, torch.tensor([right - left, bottom - top]) / 2
    scale, shift = (each.view(len(values), *[1] * (values.ndim - 1), 2) for each in (draws.scale, draws.shift))
    places = (values.float().unflatten(-1, (-1, 2)) - middle) / half
    return ((places - shift) / scale * half + middle).flatten(-2)
