"""Training of a decoder: it learns what an embedding says, in seconds, and reads the clips that it should."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import worldmodel
from data_pipelines.errors import UserError
from tests.conftest import REPO, normal
from worldmodel.build import build_model, clip_layout
from worldmodel.config import Config, load_config
from worldmodel.data import segments_of
from worldmodel.evaluation.embed import Networks
from worldmodel.sources import make_source
from worldmodel.training import decoding
from worldmodel.training.decoding import (
    DecoderSettings,
    DecodingExamples,
    embed_examples,
    fit_decoder,
    resized,
    squared_errors,
    train_decoder,
    transitions_of,
)

SIDE_PX, SQUARE_PX = 16, 3


def moving_squares(count: int, seed: int) -> DecodingExamples:
    """Clips of three segments of one frame. A bright square moves by what the embedding tells, linearly."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randint(-3, 4, (count, 2, 2), generator=generator)
    places = torch.randint(6, SIDE_PX - SQUARE_PX - 6, (count, 1, 2), generator=generator)
    places = torch.cat([places, places + moves.cumsum(dim=1)], dim=1)
    frames = torch.zeros(count, 3, 1, SIDE_PX, SIDE_PX, dtype=torch.uint8)
    for clip, path in enumerate(places.tolist()):
        for t, (x, y) in enumerate(path):
            frames[clip, t, 0, max(0, y) : max(0, y + SQUARE_PX), max(0, x) : max(0, x + SQUARE_PX)] = 255
    return DecodingExamples(moves.float() @ normal(0, 2, 8), frames)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    decoder = train_decoder(moving_squares(512, 1), DecoderSettings(steps=120, clips=512))
    return dict(squared_errors(decoder, moving_squares(64, 2)))  # type: ignore[arg-type]


def test_a_decoder_learns_what_the_embedding_says(errors: dict[str, float]) -> None:
    assert errors["mse"] < 0.5 * errors["mean_picture_mse"]
    assert errors["mse"] < 0.5 * errors["last_frame_mse"] and errors["mse"] < 0.5 * errors["other_embedding_mse"]


def test_errors_of_simple_pictures(errors: dict[str, float]) -> None:
    train, test = moving_squares(512, 1).frames / 255, moving_squares(64, 2).frames / 255
    mean = (test[:, 1:] - train[:, 1:].mean(dim=(0, 1))).square().mean()
    last = (test[:, 1:] - test[:, :-1]).square().mean()
    assert errors["mean_picture_mse"] == pytest.approx(float(mean), rel=1e-5)
    assert errors["last_frame_mse"] == pytest.approx(float(last), rel=1e-5)


def test_the_same_seed_gives_the_same_decoder() -> None:
    examples = moving_squares(32, 1)
    first, same, other = (train_decoder(examples, DecoderSettings(2, 32, seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["drawn.weight"], other["drawn.weight"])


def test_later_transitions_come_after_decoded_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = DecodingExamples(normal(0, 64, 2, 8), moving_squares(64, 1).frames)  # each embedding names its place
    monkeypatch.setattr(decoding, "DECODED_BEFORE_SHARE", 1.0)
    monkeypatch.setattr(decoding, "INPUT_NOISE", 0.0)

    class Constant(torch.nn.Module):
        scale = torch.ones(8)

        def forward(self, embeddings: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
            return torch.full((len(embeddings), 1, 1, SIDE_PX, SIDE_PX), 0.5)

    drawn = decoding.draw_examples(Constant(), examples, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    embeddings, before, frames = drawn
    is_decoded = (before == 0.5).flatten(1).all(dim=1)
    assert 0 < is_decoded.sum() < len(before)
    for embedding, last, target, decoded in zip(embeddings, before, frames, is_decoded, strict=True):
        clip, transition = (examples.embeddings == embedding).all(dim=-1).nonzero()[0].tolist()
        assert decoded == (transition == 1)
        assert decoded or torch.equal(last, examples.frames[clip, transition] / 255)
        assert torch.equal(target[0], examples.frames[clip, transition + 1] / 255)


def test_clips_are_embedded_as_targets(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = worldmodel.load(trained_run)
    test = list(run.source.evaluation_batches("test", 24))
    examples = embed_examples(run.networks, iter(test), 20, "test")
    segments = torch.cat([segments_of(batch, 3, torch.device("cpu")) for batch in test])[:20]
    assert examples.embeddings.shape == (20, 2, 16) and examples.frames.shape == (20, 7, 1, 64, 64)
    assert examples.num_frames == 3
    with torch.no_grad():
        torch.testing.assert_close(examples.embeddings[:, 1], run.target_encoder(segments[:, 2]))
    _, before, frames = examples.at(torch.tensor([4]), torch.tensor([1]))
    assert torch.equal(before[0], segments[4, 1, -1]) and torch.equal(frames[0], segments[4, 2])
    monkeypatch.setattr(decoding, "MAX_PIXEL_BYTES", 5 * 7 * 64 * 64)
    assert len(embed_examples(run.networks, iter(test), 20, "test").embeddings) == 5


def test_frames_are_resized() -> None:
    frames = torch.rand(2, 3, 1, 8, 8)
    assert resized(frames, 8) is frames
    torch.testing.assert_close(resized(torch.full_like(frames, 0.3), 4), torch.full((2, 3, 1, 4, 4), 0.3))


def test_clips_have_two_transitions_if_futures_have_several(tiny_config: Callable[..., Config]) -> None:
    def steps(*overrides: str) -> int:
        config = tiny_config(*overrides)
        return transitions_of(config.data.num_segments, config.evaluation.horizon)

    assert steps() == 1 and steps("evaluation.horizon=2") == 1  # three segments
    two = "data.num_segments=2", "model.latent=none", "objective.beta=null"
    assert steps(*two, "evaluation.horizon=2") == 2 and steps(*two, "evaluation.horizon=1") == 1


def test_a_world_without_frames_is_refused(tmp_path: Path) -> None:
    config = load_config(REPO / "configs" / "causal" / "isotropic.yaml", [f"run_dir={tmp_path / 'run'}"])
    module = torch.nn.Identity()
    networks = Networks(build_model(config), module, torch.device("cpu"), make_source(config), clip_layout(config))
    with pytest.raises(UserError, match="causal world has no frames to decode"):
        fit_decoder(networks, DecoderSettings(1, 1), step=0, horizon=1)
