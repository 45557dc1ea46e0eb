import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY, normal
from worldmodel import load
from worldmodel.config import Config, load_config
from worldmodel.nets.vit import VIT_SIZES, Block, VitEncoder, VitSize, sincos_positions
from worldmodel.training.loop import train

SMALL = VitSize(dim=24, num_blocks=2, num_heads=3)
VIDEOS = REPO.parent / "shared" / "data" / "videos"
VIT = ("model.encoder=vit_tiny", "model.encoder.patch_px=32")


def encoder(num_frames: int = 2, channels: int = 1, size_px: int = 32, checkpointed: bool = False) -> VitEncoder:
    torch.manual_seed(0)
    return VitEncoder(SMALL, channels, num_frames, size_px, 8, checkpointed)


def clip(batch: int = 2, frames: int = 2, channels: int = 1, size_px: int = 32) -> Tensor:
    return torch.rand(batch, frames, channels, size_px, size_px, generator=torch.Generator().manual_seed(0))


def swap_patches(video: Tensor, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
    """Two patches of 8 px, by row and column, change places in all frames."""
    swapped = video.clone()
    (a, b), (c, d) = [[slice(8 * i, 8 * i + 8) for i in place] for place in (first, second)]
    swapped[..., a, b], swapped[..., c, d] = video[..., c, d], video[..., a, b]
    return swapped


@pytest.mark.parametrize(("frames", "places"), [(1, 1), (2, 1), (3, 3), (4, 2)])
@pytest.mark.parametrize(("channels", "size_px"), [(1, 32), (3, 224)])
def test_a_mean_over_space_for_each_place_in_time(frames: int, places: int, channels: int, size_px: int) -> None:
    vit = encoder(frames, channels, size_px).eval()
    video = clip(2, frames, channels, size_px)
    features = vit(video)
    tokens = vit.tokens(video)
    assert features.shape == (2, vit.num_features) and vit.num_features == 24 * places
    assert tokens.shape == (2, places * (size_px // 8) ** 2, 24)
    torch.testing.assert_close(features, tokens.unflatten(1, (places, -1)).mean(dim=2).flatten(1))


@pytest.mark.parametrize(("name", "millions"), [("vit_small", 22), ("vit_base", 86), ("vit_large", 307)])
def test_parameters_are_as_many_as_published(name: str, millions: float) -> None:
    """DeiT tells 22 and 86 millions (arXiv 2012.12877, table 1), ViT 307 (arXiv 2010.11929, table 1), with a class
    token, learned positions and 1000 classes, which are not here."""
    with torch.device("meta"):
        vit = VitEncoder(VIT_SIZES[name], 3, 1, 224, 16)
    dim = VIT_SIZES[name].dim
    not_here = dim + (1 + 14 * 14) * dim + 1000 * (dim + 1)
    assert sum(p.numel() for p in vit.parameters()) + not_here == pytest.approx(millions * 1e6, rel=0.01)


def test_a_block_is_the_librarys_layer_with_the_same_weights() -> None:
    torch.manual_seed(0)
    block = Block(24, 3)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    with torch.no_grad():
        for own, theirs in [
            (block.queries_keys_values.weight, layer.self_attn.in_proj_weight),
            (block.queries_keys_values.bias, layer.self_attn.in_proj_bias),
            (block.attention_out.weight, layer.self_attn.out_proj.weight),
            (block.attention_out.bias, layer.self_attn.out_proj.bias),
        ]:
            theirs.copy_(own)
    layer.norm1, layer.norm2 = block.attention_norm, block.mlp_norm
    layer.linear1, layer.linear2 = block.mlp[0], block.mlp[2]  # type: ignore[assignment]
    tokens = normal(0, 2, 7, 24)
    torch.testing.assert_close(block(tokens), layer(tokens), atol=1e-5, rtol=1e-5)


def test_a_token_is_a_patch_through_two_frames() -> None:
    """The linear map of patches is a strided convolution over space and time."""
    vit = encoder(num_frames=4, channels=3)
    vit.blocks, vit.norm = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]
    kernel = vit.patches.weight.unflatten(1, (2, 3, 8, 8)).transpose(1, 2)
    video = clip(2, 4, 3)
    maps = nn.functional.conv3d(2 * video.transpose(1, 2) - 1, kernel, vit.patches.bias, stride=(2, 8, 8))
    expected = maps.flatten(2).transpose(1, 2) + vit.positions
    torch.testing.assert_close(vit.tokens(video), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [24, 192, 1024])
def test_positions_are_sines_and_cosines_of_time_row_and_column(dim: int) -> None:
    positions = sincos_positions(3, 4, 5, dim).unflatten(0, (3, 4, 5))
    third = 2 * math.ceil(dim / 6)
    parts = positions.split([third, third, dim - 2 * third], dim=-1)
    place = (2, 1, 4)
    for axis, part in enumerate(parts):
        half = part.shape[-1] // 2
        angles = [place[axis] / 10_000 ** (i / half) for i in range(half)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(part[place], torch.tensor(expected))
        # The part of one axis is the same wherever one goes along the others.
        assert (part - part.movedim(axis, 0)[:, :1, :1].movedim(0, axis)).abs().max() == 0
    assert len(positions.flatten(0, 2).unique(dim=0)) == 60


def test_without_positions_it_is_blind_to_the_order_of_patches() -> None:
    vit = encoder().eval()
    video = clip()
    swapped = swap_patches(video, (0, 1), (3, 2))
    assert not torch.allclose(vit(video), vit(swapped), atol=1e-3)
    vit.positions.zero_()
    torch.testing.assert_close(vit(video), vit(swapped), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [2, 3])
def test_features_tell_the_order_of_frames(frames: int) -> None:
    vit = encoder(frames).eval()
    assert not torch.allclose(vit(clip(frames=frames)), vit(clip(frames=frames).flip(1)), atol=1e-3)


def test_checkpointed_activations_give_the_same_gradients_and_are_not_kept() -> None:
    gradients, kept = [], []
    for checkpointed in (False, True):
        vit = encoder(checkpointed=checkpointed)
        saved: list[int] = []

        def pack(values: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(values.numel())
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            loss = vit(clip()).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in vit.parameters()])
        kept.append(sum(saved))
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.encoder.patch_px=24"], "data.size_px=64 must be a multiple of model.encoder.patch_px=24"),
        (["model.encoder.width=0.5"], "unknown key model.encoder.width=0.5; allowed here: name, patch_px, c"),
        (["model.encoder.freeze=true"], "unknown key model.encoder.freeze=True; allowed here: name, patch_px"),
        (["model.encoder=pretrained"], "model.encoder=pretrained needs model.encoder.path: a folder of safetensors"),
        (
            ["model.encoder=conv3d", "model.encoder.checkpoint_activations=true"],
            "unknown key model.encoder.checkpoint_activations=True; allowed here: name, width",
        ),
        (
            ["model.encoder.checkpoint_activations=1"],
            "model.encoder.checkpoint_activations=1: input should be a valid boolean",
        ),
        (["model.encoder=vit_huge"], "model.encoder.name='vit_huge'"),
    ],
)
def test_a_senseless_encoder_is_refused_in_a_sentence(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(REPO / "configs" / "objectives.yaml", [*VIT, *overrides])
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_it_trains_and_resumes_with_activations_checkpointed(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(*VIT, "train.steps=2", "train.eval_every=2")
    folder = train(config)
    assert (
        train(
            tiny_config(*VIT, "train.steps=2", "model.encoder.checkpoint_activations=true", "train.eval_every=2"),
            resume=True,
        )
        == folder
    )
    with pytest.raises(UserError, match=r"was trained with another config: model.encoder.patch_px=32, now 64$"):
        train(tiny_config(*VIT, "train.steps=2", "model.encoder.patch_px=64", "train.eval_every=2"), resume=True)
    rows = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert load(folder).rollout(clip(2, 3, 1, 64), 2, 3).isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(not VIDEOS.is_dir(), reason="the real video is not on this machine")
def test_the_shipped_config_trains_on_real_video(tmp_path: Path) -> None:
    """configs/video_vit.yaml at 224 px, with the smallest transformer, large patches and few clips."""
    small = [
        "model.encoder=vit_tiny",
        "model.encoder.patch_px=56",
        "data.batch_size=4",
        "train.steps=2",
    ]
    few = ["evaluation.queries=4", "evaluation.fit_clips=4", "evaluation.selection_clips=4"]
    where = [f"data.root={VIDEOS}", f"run_dir={tmp_path / 'run'}"]
    run = train(load_config(REPO / "configs" / "video_vit.yaml", [*TINY, *small, *few, *where]))
    assert load(run).encode(clip(2, 4, 3, 224)).shape == (2, 16)
