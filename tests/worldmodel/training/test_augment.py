"""Augmentation: one draw for a clip, the same for any number of processes, and labels that follow their pixels."""

import colorsys
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from tests.worldmodel.training.test_refine import embedded
from worldmodel import build_model
from worldmodel.build import clip_layout
from worldmodel.config import AugmentConfig, Config, validate
from worldmodel.data import training_inputs
from worldmodel.evaluation.embed import Networks, embed_split
from worldmodel.sources import make_source
from worldmodel.training.augment import YIQ, Draws, augmented, blur_weights, change, draw, mean_luma
from worldmodel.training.loop import train
from worldmodel.training.optimisation import AUGMENT, step_generator

CPU = torch.device("cpu")
SIZE = 8
GEOMETRY: dict[str, Any] = {"crop_min_scale": 0.5, "flip": "both"}
COLOUR: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.6, "hue": 0.2}
EVERYTHING: dict[str, Any] = {**GEOMETRY, **COLOUR, "blur": 1.0, "noise": 0.1}
NO_LAW = "data.channels=3"
"""The law of a written world holds for one channel."""


def config_of(seed: int = 0, action_dim: int = 0, **augment: Any) -> Config:
    data = {"size_px": 16, "batch_size": SIZE, "num_lanes": 1, "augment": augment}
    return validate({"run_dir": "r", "seed": seed, "data": data, "model": {"action_dim": action_dim}}, "here")


def random_video(clips: int = SIZE, frames: int = 9, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (clips, frames, channels, size, size), generator=generator, dtype=torch.uint8)


def batch_of(video: torch.Tensor, rows: torch.Tensor | None = None, **labels: torch.Tensor) -> Batch:
    rows = torch.arange(len(video)) if rows is None else rows
    return {"video": video, "clip_id": rows, "row": rows, "labels": labels}


def shown(config: Config, batch: Batch, step: int = 0) -> torch.Tensor:
    return augmented(batch, config, step, CPU)["video"]


# ------------------------------------------------------------------------------------------------------- one draw each


def test_without_augmentation_a_batch_is_left_as_it_is() -> None:
    batch = batch_of(random_video())
    assert augmented(batch, config_of(), 0, CPU) is batch
    listed = config_of(position_labels={"position": [0.0, 1.0, 0.0, 1.0]})
    assert augmented(batch, listed, 0, CPU) is batch


def test_all_frames_of_a_clip_are_changed_alike() -> None:
    still = random_video(frames=1).expand(-1, 9, -1, -1, -1)
    quiet = shown(config_of(**{**EVERYTHING, "noise": 0.0}), batch_of(still))
    assert torch.equal(quiet, quiet[:, :1].expand_as(quiet))
    assert (quiet - still / 255).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1, "each clip is changed"


def test_noise_differs_between_pixels_and_frames_and_has_the_drawn_deviation() -> None:
    config = config_of(noise=0.1)
    grey = torch.full((SIZE, 30, 3, 16, 16), 0.5)
    noise = shown(config, batch_of(grey)) - 0.5
    std = draw(config.data.augment, 0, 0, SIZE).noise
    torch.testing.assert_close(noise.std(dim=(1, 2, 3, 4)), std, rtol=0.03, atol=0)
    assert 0 < std.min() < std.max() < 0.1
    flat = noise.flatten(2).flatten(0, 1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.25, "no frame has the noise of another"


def test_a_draw_is_a_function_of_seed_step_and_place() -> None:
    same = random_video(clips=1).expand(SIZE, -1, -1, -1, -1)
    settings = [(seed, step) for seed in (0, 1) for step in (0, 1)]
    seen = {at: shown(config_of(at[0], **EVERYTHING), batch_of(same), at[1]) for at in settings}
    again = {at: shown(config_of(at[0], **EVERYTHING), batch_of(same), at[1]) for at in settings}
    assert all(torch.equal(seen[at], again[at]) for at in settings)
    clips = torch.cat(list(seen.values()))
    for one in range(len(clips)):
        for other in range(one):
            assert not torch.allclose(clips[one], clips[other], atol=0.01), (one, other)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[5, 2], [7], [0, 1, 3]]])
def test_processes_change_their_clips_as_one_process_would_bit_for_bit(rows: list[list[int]], channels: int) -> None:
    """In shares of any size. A clip that does not decode leaves a gap."""
    strengths = EVERYTHING if channels == 3 else {**EVERYTHING, "saturation": 0.0, "hue": 0.0}
    config = config_of(**strengths)
    video = random_video(channels=channels, size=17)
    whole = shown(config, batch_of(video))
    for share in map(torch.tensor, rows):
        assert torch.equal(shown(config, batch_of(video[share], share)), whole[share])


def test_one_more_change_leaves_the_draws_of_the_others() -> None:
    one, both = (draw(AugmentConfig(**keys), 3, 4, SIZE) for keys in (GEOMETRY, EVERYTHING))
    assert torch.equal(one.scale, both.scale) and torch.equal(one.shift, both.shift)


def test_a_process_without_clips_gets_none() -> None:
    """The error is reported where all processes learn of it."""
    empty = augmented(batch_of(random_video()[:0]), config_of(**EVERYTHING), 0, CPU)
    assert len(empty["video"]) == 0


def test_the_draws_differ_from_those_of_the_networks() -> None:
    of_step, of_augmentation = (step_generator(0, 5, CPU, *purpose) for purpose in ((), (AUGMENT,)))
    assert not torch.equal(torch.rand(4, generator=of_step), torch.rand(4, generator=of_augmentation))


def test_strengths_bound_uniform_draws() -> None:
    draws = draw(AugmentConfig(**EVERYTHING), 0, 0, 20_000)
    side = draws.scale.abs()
    assert torch.equal(side[:, 0], side[:, 1]), "a crop is square"
    assert 0.5 < side.min() < 0.51 and 0.99 < side.max() <= 1
    assert float(side.mean()) == pytest.approx(0.75, abs=0.01)
    assert (side + draws.shift.abs()).max() <= 1 + 1e-6, "a crop lies within the frame"
    assert (draws.shift / (1 - side).clamp_min(0.01)).std(dim=0) == pytest.approx([1 / math.sqrt(3)] * 2, abs=0.02)
    mirrored = draws.scale < 0
    assert mirrored.double().mean(dim=0) == pytest.approx([0.5, 0.5], abs=0.02)
    assert float((mirrored[:, 0] == mirrored[:, 1]).double().mean()) == pytest.approx(0.5, abs=0.02)
    for flip, axes in (("none", []), ("horizontal", [0]), ("vertical", [1])):
        scale = draw(AugmentConfig(flip=flip), 0, 0, 100).scale  # type: ignore[arg-type]
        assert [axis for axis in (0, 1) if (scale[:, axis] < 0).any()] == axes
    only_brighter = draw(AugmentConfig(brightness=0.4), 0, 0, 20_000)
    assert 0.6 <= only_brighter.gain.min() < 0.61 and 1.39 < only_brighter.gain.max() < 1.4
    assert not only_brighter.lift.any()


# ------------------------------------------------------------------------------------- against independent computations


def drawn(**augment: Any) -> tuple[AugmentConfig, Draws]:
    settings = AugmentConfig(**augment)
    return settings, draw(settings, 0, 0, SIZE)


def test_a_flip_mirrors_the_frames() -> None:
    settings = AugmentConfig(flip="both")
    draws, video = draw(settings, 0, 0, 32), random_video(32) / 255
    for clip, changed, scale in zip(video, change(video, settings, draws), draws.scale, strict=True):
        axes = [axis for axis, mirrors in ((3, scale[0] < 0), (2, scale[1] < 0)) if mirrors]
        torch.testing.assert_close(changed, clip.flip(axes), rtol=0, atol=1e-4)
    assert len({tuple((scale < 0).tolist()) for scale in draws.scale}) == 4


def test_crop_and_resize_interpolate_as_scipy_does() -> None:
    settings, draws = drawn(**GEOMETRY)
    video = random_video(frames=2, size=20) / 255
    changed = change(video, settings, draws)
    centres = (np.arange(20) + 0.5) / 20 * 2 - 1
    for clip in range(SIZE):
        (x, y), (left, top) = draws.scale[clip].tolist(), draws.shift[clip].tolist()
        columns, lines = (((s * centres + o) + 1) / 2 * 20 - 0.5 for s, o in ((x, left), (y, top)))
        at = np.meshgrid(lines, columns, indexing="ij")
        for frame in range(2):
            expected = ndimage.map_coordinates(video[clip, frame, 1].numpy(), at, order=1, mode="nearest")
            np.testing.assert_allclose(changed[clip, frame, 1].numpy(), expected, atol=1e-4)


def test_the_blur_is_that_of_scipy() -> None:
    settings, draws = drawn(blur=2.0)
    assert settings.blur * 3 == draws.blur.shape[1] - 1
    video = random_video(frames=2) / 255
    changed = change(video, settings, draws)
    weights = draws.blur
    stds = (0.5 / (weights[:, 0] / weights[:, 1]).log()).sqrt()  # the first two differ by the factor exp(1 / (2 std^2))
    assert stds.max() < 2 and (stds > 0.5).sum() >= 4
    for clip, std in enumerate(stds.tolist()):
        expected = video[clip, 1, 2].numpy().astype(float)
        for axis in (0, 1):
            expected = ndimage.gaussian_filter1d(expected, max(std, 0.1), axis, mode="nearest", radius=6)
        np.testing.assert_allclose(changed[clip, 1, 2].numpy(), expected, atol=1e-4)


def test_a_blur_of_no_width_keeps_all() -> None:
    assert blur_weights(torch.zeros(1), 3).tolist() == [[1, 0, 0, 0]]
    weights = blur_weights(torch.tensor([0.7, 2.0]), 6)
    torch.testing.assert_close(2 * weights.sum(dim=1) - weights[:, 0], torch.ones(2))


def test_saturation_and_hue_are_those_of_yiq() -> None:
    """colorsys computes in the same coordinates. Values near grey, so that none is clipped."""
    settings, draws = drawn(saturation=0.5, hue=0.1)
    video = 0.4 + 0.2 * random_video(frames=1) / 255
    changed = change(video, settings, draws)
    to_yiq = torch.tensor(YIQ)
    for clip in range(SIZE):
        turned = to_yiq @ draws.chroma[clip] @ to_yiq.inverse()
        strength, angle = float(turned[1:, 1].norm()), math.atan2(turned[2, 1], turned[1, 1])
        assert 0.5 <= strength <= 1.5 and abs(angle) <= 0.2 * math.pi
        for at in ((0, 0), (3, 9), (15, 2)):
            y, i, q = colorsys.rgb_to_yiq(*video[clip, 0, :, *at].tolist())
            colour = strength * complex(i, q) * complex(math.cos(angle), math.sin(angle))
            assert colorsys.rgb_to_yiq(*changed[clip, 0, :, *at].tolist()) == pytest.approx(
                (y, colour.real, colour.imag), abs=1e-3
            )


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_is_about_the_mean_luma_of_the_clip_and_brightness_about_black(channels: int) -> None:
    video = 0.4 + 0.2 * random_video(channels=channels) / 255
    red, green, blue = video.unbind(dim=2) if channels == 3 else [video[:, :, 0]] * 3
    luma = (0.3 * red + 0.59 * green + 0.11 * blue).mean(dim=(1, 2, 3))
    torch.testing.assert_close(mean_luma(video), luma)
    middle = luma[:, None, None, None, None]
    settings, draws = drawn(contrast=0.4)
    gain = draws.gain[:, None, None, None, None]
    assert 0.6 <= gain.min() < 0.9 and 1.1 < gain.max() <= 1.4
    torch.testing.assert_close(change(video, settings, draws), middle + gain * (video - middle))
    settings, draws = drawn(brightness=0.3)
    torch.testing.assert_close(change(video, settings, draws), draws.gain[:, None, None, None, None] * video)


def test_colour_changes_follow_one_another() -> None:
    """Brightness, contrast, then saturation and hue. Each is drawn with the others' strengths at 0, and so alike."""
    video = 0.4 + 0.1 * random_video() / 255
    one_by_one = video
    for keys in ({"brightness": 0.3}, {"contrast": 0.4}, {"saturation": 0.4, "hue": 0.1}):
        one_by_one = change(one_by_one, *drawn(**keys))
    at_once = change(video, *drawn(brightness=0.3, contrast=0.4, saturation=0.4, hue=0.1))
    torch.testing.assert_close(at_once, one_by_one)


def test_crops_and_blurs_at_the_edges_do_not_darken() -> None:
    settings = AugmentConfig(crop_min_scale=0.9, flip="both", blur=1.0)
    white = torch.ones(64, 2, 3, 16, 16)
    torch.testing.assert_close(change(white, settings, draw(settings, 0, 0, 64)), white)


def test_values_stay_between_black_and_white() -> None:
    changed = shown(config_of(brightness=1.0, contrast=1.0, noise=1.0), batch_of(random_video()))
    assert changed.min() == 0 and changed.max() == 1


# --------------------------------------------------------------------------------------------------------------- labels


def spot(place: torch.Tensor, size: int) -> torch.Tensor:
    """A bright dot at pixel x, y of each frame: [B, T, 2] -> [B, T, 1, size, size]."""
    along = torch.arange(size, dtype=torch.float32)
    x, y = (((along - place[..., axis, None]) / 1.5).square() for axis in (0, 1))
    return torch.exp(-(x[..., None, :] + y[..., :, None]))[:, :, None]


def found(video: torch.Tensor) -> torch.Tensor:
    """The centre of mass of each frame [B, T, 1, H, W], in pixels x, y: [B, T, 2]."""
    frames = video[:, :, 0]
    along = torch.arange(frames.shape[-1], dtype=torch.float32)
    mass = frames.sum(dim=(-1, -2))
    return torch.stack([frames.sum(dim=-2) @ along, frames.sum(dim=-1) @ along], dim=-1) / mass[..., None]


EDGES = {
    "px": [-0.5, 63.5, -0.5, 63.5],
    "unit": [0.0, 1.0, 0.0, 1.0],
    "upwards": [-1.0, 1.0, 1.0, -1.0],
    "source_px": [79.5, 559.5, -0.5, 479.5],  # the middle of a 640 x 480 video
}


@pytest.mark.parametrize("unit", EDGES)
def test_labels_of_positions_follow_the_dot(unit: str) -> None:
    """Dots near the middle, which no crop cuts: found again within half a pixel of where the label says."""
    config = config_of(crop_min_scale=0.7, flip="both", position_labels={"dot": EDGES[unit]})
    left, right, top, bottom = EDGES[unit]
    low, span = torch.tensor([left, top]), torch.tensor([right - left, bottom - top])
    place = 25 + 14 * torch.rand(SIZE, 6, 2, generator=torch.Generator().manual_seed(2))
    label = low + (place + 0.5) / 64 * span
    batch = augmented(batch_of(spot(place, 64), dot=label, other=label), config, 0, CPU)
    moved = (batch["labels"]["dot"] - low) / span * 64 - 0.5
    inside = ((moved > 6) & (moved < 57)).all(dim=-1)
    assert inside.double().mean() > 0.7
    off = (found(batch["video"]) - moved).norm(dim=-1)[inside]
    assert off.max() < 0.5, off.max()
    assert (moved - place).norm(dim=-1).mean() > 3, "dots move"
    assert torch.equal(batch["labels"]["other"], label)


def test_several_positions_and_labels_of_videos_move_too() -> None:
    edges = [-0.5, 15.5, -0.5, 15.5]
    config = config_of(flip="horizontal", position_labels={"pair": edges, "of_video": edges})
    labels = {"pair": torch.tensor([[[1, 2, 3, 4]]]).repeat(SIZE, 9, 1), "of_video": torch.tensor([[1, 2]] * SIZE)}
    moved = augmented(batch_of(random_video(), **labels), config, 0, CPU)["labels"]
    for clip, mirrored in enumerate(draw(config.data.augment, 0, 0, SIZE).scale[:, 0] < 0):
        expected = [14, 2, 12, 4] if mirrored else [1, 2, 3, 4]
        torch.testing.assert_close(moved["pair"][clip], torch.tensor([expected] * 9, dtype=torch.float32))
        torch.testing.assert_close(moved["of_video"][clip], torch.tensor(expected[:2], dtype=torch.float32))


def test_actions_that_are_positions_move_before_a_model_is_given_them() -> None:
    """They were refused otherwise."""
    with pytest.raises(UserError, match="mirrors the frames but not the actions, the label 'action'"):
        config_of(action_dim=2, flip="horizontal")
    config = config_of(action_dim=2, flip="horizontal", position_labels={"action": [0.0, 1.0, 0.0, 1.0]})
    batch = batch_of(random_video(), action=torch.full((SIZE, 9, 2), 0.25))
    actions = training_inputs(augmented(batch, config, 0, CPU), clip_layout(config), 1, CPU).actions
    assert actions.shape == (SIZE, 1, 6)
    for clip, mirrored in enumerate(draw(config.data.augment, 0, 0, SIZE).scale[:, 0] < 0):
        assert actions[clip].tolist() == [pytest.approx([0.75 if mirrored else 0.25, 0.25] * 3)]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({}, "these videos have no label 'dot': they have none"),
        ({"a": torch.zeros(SIZE, 9, 2)}, "these videos have no label 'dot': they have a"),
        ({"dot": torch.zeros(SIZE, 9, 3)}, "'dot' holds 3 numbers, not pairs of x and y"),
        ({"dot": torch.zeros(SIZE)}, "'dot' holds 1 numbers, not pairs of x and y"),
    ],
)
def test_a_label_that_cannot_be_a_position_is_refused(labels: dict[str, torch.Tensor], told: str) -> None:
    config = config_of(noise=0.1, position_labels={"dot": [0.0, 1.0, 0.0, 1.0]})
    with pytest.raises(UserError, match=told):
        augmented(batch_of(random_video(), **labels), config, 0, CPU)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_world_with_a_known_law_is_refused_before_the_first_step(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("data.augment.flip=horizontal", "data.augment.noise=0.1")
    told = r"data.augment.flip=horizontal, data.augment.noise=0.1: .*moving_mnist has a known law"
    with pytest.raises(UserError, match=told):
        train(config)


def test_evaluation_and_refinement_see_the_clips_as_they_are(tiny_config: Callable[..., Config]) -> None:
    strengths = "data.augment={flip: both, crop_min_scale: 0.3, brightness: 1.0, noise: 0.5}"
    plain, changed = (
        tiny_config(NO_LAW, "train.refine_clips=12", "train.refine_steps=1", *more) for more in ([], [strengths])
    )
    torch.manual_seed(0)
    model = build_model(plain).eval()
    for config in (plain, changed):
        assert bool(config.data.augment.active) == (config is changed)
    refined = [embedded(config, model, model.embedder).own for config in (plain, changed)]
    assert torch.equal(*refined)
    splits = [
        embed_split(Networks(model, model.embedder, CPU, make_source(config), clip_layout(config)), "test", 12, seed=0)
        for config in (plain, changed)
    ]
    assert torch.equal(splits[0].state, splits[1].state) and torch.equal(splits[0].targets, splits[1].targets)


# ------------------------------------------------------------------------------------------------------------- cameras


@pytest.mark.parametrize("channels", [1, 3])
def test_all_cameras_of_a_clip_are_changed_alike_and_each_as_if_it_were_alone(channels: int) -> None:
    chroma = COLOUR if channels == 3 else {key: COLOUR[key] for key in ("brightness", "contrast")}
    settings, draws = drawn(**GEOMETRY, **chroma, blur=1.0)
    video = random_video(channels=2 * channels) / 255
    video[:, :, :channels] *= 0.3  # a dark camera: contrast is about the mean luma of each
    both = change(video, settings, draws, num_cameras=2)
    for camera in (slice(channels), slice(channels, None)):
        assert torch.equal(both[:, :, camera], change(video[:, :, camera].contiguous(), settings, draws))
    noisy, plain = (drawn(noise=strength)[0] for strength in (0.2, 0.0))
    noise = change(video, noisy, drawn(noise=0.2)[1], num_cameras=2) - change(video, plain, draws, num_cameras=2)
    assert not torch.equal(noise[:, :, :channels], noise[:, :, channels:]), "each pixel has noise of its own"


def test_a_batch_of_two_cameras_is_changed_camera_by_camera() -> None:
    data = {"size_px": 16, "batch_size": SIZE, "num_lanes": 1, "camera": ["a", "b"], "augment": {**GEOMETRY, **COLOUR}}
    config = validate({"run_dir": "r", "data": data}, "here")
    video = random_video(channels=6)
    expected = [shown(config_of(**GEOMETRY, **COLOUR), batch_of(half)) for half in video.split(3, dim=2)]
    assert torch.equal(shown(config, batch_of(video)), torch.cat(expected, dim=2))


def test_colour_of_gray_cameras_is_refused_however_many_they_are() -> None:
    data = {"channels": 1, "camera": ["a", "b", "c"], "augment": {"hue": 0.1}}
    with pytest.raises(UserError, match=r"data.augment.hue: colour needs data.channels=3, not 1"):
        validate({"run_dir": "r", "data": data}, "here")
