"""The history: which segments a state remembers, and what its summary depends on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import normal
from tests.worldmodel.nets.test_world_model import training
from worldmodel.nets.history import FULL_SHARE, NoHistory, SegmentHistory
from worldmodel.nets.parallel import global_batch
from worldmodel.nets.world_model import Embedded, WorldModel

DIM, ACTION_DIM = 6, 2


def history(num_segments: int = 3) -> SegmentHistory:
    torch.manual_seed(0)
    return SegmentHistory(DIM, ACTION_DIM, num_segments).eval()


def model(num_segments: int, action_dim: int = 0) -> WorldModel:
    """A small model with 16 dimensions and a history."""
    return training(data_changes={"history_segments": num_segments}, action_dim=action_dim).model.eval()


def test_a_short_history_is_padded_and_a_long_one_forgets_the_earliest() -> None:
    remembered, embeddings, actions = history(), normal(1, 4, 5, DIM), normal(2, 4, 5, ACTION_DIM)
    present = torch.ones(4, 5, 1)
    entries = torch.cat([embeddings, actions, present], dim=-1)
    short = remembered.of(embeddings[:, :2], actions[:, :2]).unflatten(1, (3, -1))
    assert torch.equal(short[:, 0], torch.zeros(4, DIM + ACTION_DIM + 1)) and torch.equal(short[:, 1:], entries[:, :2])
    step_by_step = torch.zeros(4, remembered.num_values)
    for at in range(5):
        step_by_step = remembered.advance(step_by_step, embeddings[:, at], actions[:, at])
        last = slice(max(0, at - 2), at + 1)
        assert torch.equal(step_by_step, remembered.of(embeddings[:, last], actions[:, last]))


@torch.no_grad()
def test_segments_that_are_not_present_have_no_influence() -> None:
    remembered, embedding = history(), normal(3, 4, DIM)
    embeddings, actions = normal(1, 4, 3, DIM), normal(2, 4, 3, ACTION_DIM)
    is_present = torch.tensor([[False, True, True]]).expand(4, -1)
    summary = remembered(embedding, remembered.of(embeddings, actions, is_present))
    other = torch.cat([normal(9, 4, 1, DIM), embeddings[:, 1:]], dim=1)
    assert torch.equal(summary, remembered(embedding, remembered.of(other, actions, is_present)))
    assert torch.equal(summary, remembered(embedding, remembered.of(embeddings[:, 1:], actions[:, 1:])))
    # The mask alone does this: entries without their flag are not attended to.
    unflagged = remembered.of(embeddings, actions).unflatten(1, (3, -1)).clone()
    unflagged[:, 0, -1] = 0
    torch.testing.assert_close(summary, remembered(embedding, unflagged.flatten(1)))
    for at in (1, 2):
        changed = embeddings.clone()
        changed[:, at] += 1
        assert (remembered(embedding, remembered.of(changed, actions, is_present)) - summary).abs().max() > 1e-4
        changed = actions.clone()
        changed[:, at] += 1
        assert (remembered(embedding, remembered.of(embeddings, changed, is_present)) - summary).abs().max() > 1e-4


@torch.no_grad()
def test_without_segments_the_summary_is_that_of_the_context_alone() -> None:
    """With one token, attention passes on its value, whatever the query and the key."""
    remembered, embedding = history(), normal(3, 4, DIM)
    token = remembered.context(embedding) + remembered.places[-1]
    blocks: Any = remembered.blocks
    for block in blocks:
        value = block.queries_keys_values(block.attention_norm(token)).chunk(3, dim=-1)[2]
        token = token + block.attention_out(value)
        token = token + block.mlp(block.mlp_norm(token))
    summary = remembered(embedding, torch.zeros(4, remembered.num_values))
    torch.testing.assert_close(summary, remembered.norm(token), rtol=1e-4, atol=1e-5)


def test_the_order_of_segments_counts() -> None:
    remembered, embeddings, actions = history(), normal(1, 4, 3, DIM), normal(2, 4, 3, ACTION_DIM)
    in_order = remembered(embeddings[:, 0], remembered.of(embeddings, actions))
    swapped = remembered(embeddings[:, 0], remembered.of(embeddings.flip(1), actions.flip(1)))
    assert (in_order - swapped).abs().max() > 1e-3


def test_histories_are_shortened_from_the_earliest_on_by_the_place_of_a_clip() -> None:
    remembered, count = history(), 4000
    whole = remembered.of(normal(1, count, 3, DIM), normal(2, count, 3, ACTION_DIM))

    def shortened(rows: slice) -> torch.Tensor:
        with global_batch(torch.arange(count)[rows], count):
            return remembered.shortened(whole[rows], torch.Generator().manual_seed(0))

    kept = shortened(slice(None)).unflatten(1, (3, -1))
    is_kept = kept[..., -1] == 1
    assert torch.equal(kept, whole.unflatten(1, (3, -1)) * is_kept[..., None])
    lengths = is_kept.sum(dim=1)
    assert torch.equal(is_kept, torch.arange(3) >= 3 - lengths[:, None])
    shares = [(lengths == length).float().mean() for length in range(4)]
    torch.testing.assert_close(torch.stack(shares), torch.tensor([0.25 / 3] * 3 + [FULL_SHARE]), rtol=0, atol=0.02)
    assert torch.equal(shortened(slice(1000, 3000)), kept.flatten(1)[1000:3000])


@pytest.mark.parametrize("num_segments", [0, 2])
def test_a_model_reads_embedding_summary_and_action(num_segments: int) -> None:
    built = model(num_segments, action_dim=1)
    state, action = normal(1, 4, 16 + 2 * (16 + 3 + 1) if num_segments else 16), normal(2, 4, 3)
    embedding, past = state[:, :16], state[:, 16:]
    assert isinstance(built.history, SegmentHistory if num_segments else NoHistory)
    parts = [embedding, built.history(embedding, past), action] if num_segments else [state, action]
    assert torch.equal(built.context(state, action), torch.cat(parts, dim=1))
    r = normal(3, 4, 3)
    edited = built.editor(embedding, torch.cat([r, *parts[1:]] if num_segments else [r, action], dim=1))
    following = built.edit(state, r, action)
    assert torch.equal(built.embedding_of(following), built.embedder.normalise(edited.float()))
    assert following.shape == state.shape


@torch.no_grad()
def test_a_rollout_remembers_its_own_last_predictions() -> None:
    built, actions = model(2, action_dim=1), normal(2, 4, 5, 3)
    first = built.observe(torch.rand(4, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert not first[:, 16:].any()
    states = [first, *built.steps(first, actions, built.prior_mean)]
    predicted = torch.stack([built.embedding_of(state) for state in states], dim=1)
    for at in range(1, 6):
        since = slice(max(0, at - 2), at)
        expected = built.history.of(predicted[:, since], actions[:, since])
        assert torch.equal(states[at][:, 16:], expected)
        followed = built.follow(states[at - 1], actions[:, at - 1], states[at])
        assert torch.equal(followed, built.remember(states[at], predicted[:, since], actions[:, since]))


def test_training_predicts_from_the_segments_after_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    built = training("gaussian", step_weights=(1.0, 1.0), data_changes={"history_segments": 2}).eval()
    monkeypatch.setattr(SegmentHistory, "shortened", lambda self, history, generator: history)
    clips = torch.rand(4, 6, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoded = [built.model.encode(clips[:, at]) for at in range(6)]
        embedded = built.model.embed(clips, 2, None)
        _, states = built.model.predict(embedded, torch.empty(4, 0), torch.empty(4, 4, 0))
    torch.testing.assert_close(embedded.before, torch.stack(encoded[:2], dim=1))
    torch.testing.assert_close(embedded.real, torch.stack(encoded[2:5], dim=1))
    torch.testing.assert_close(embedded.seen, torch.stack(encoded[4:6], dim=1))
    context = built.model.remember(built.model.observe(clips[:, 2]), embedded.before, torch.empty(4, 2, 0))
    torch.testing.assert_close(states[:, 0], context)
    assert torch.equal(built.targets_of(clips), torch.cat([clips[:, 3], clips[:, 4]]))


def test_the_posterior_alone_learns_while_the_forecast_is_fixed() -> None:
    built = training("gaussian", data_changes={"history_segments": 1})
    parameters = list(built.history.parameters())
    with built.fixed_forecast():
        assert not any(parameter.requires_grad for parameter in parameters)
    assert parameters and all(parameter.requires_grad for parameter in parameters)
    assert not [name for name in training().state_dict() if name.startswith("history")]


@pytest.mark.slow
def test_a_history_learns_a_velocity_that_no_segment_shows() -> None:
    """Points move on a circle by 0.3 rad a step, one way or the other.

    From one point alone, the best forecast is that point, at an error of 1 - cos(0.3 k) after k steps.
    """

    def paths(seed: int, count: int, length: int) -> Tensor:
        start, way = normal(seed, 2, count, 1).sign() * normal(seed + 1, 2, count, 1).abs().exp()
        angle = start + 0.3 * way.sign() * torch.arange(length)
        return 2**0.5 * torch.stack([angle.cos(), angle.sin()], dim=-1)

    def errors(num_segments: int) -> Tensor:
        """Train for one step, and return the errors of a rollout of three steps, [3]."""
        data = {"history_segments": num_segments}
        built = training("none", editor="residual", data_changes=data, embedding_dim=2, hidden_dim=64)
        optimizer = torch.optim.Adam(built.parameters(), 3e-3)
        generator = torch.Generator().manual_seed(0)
        for step in range(400):
            clips = paths(10 * step, 128, num_segments + 2)
            before, real = clips.split([num_segments, 2], dim=1)
            embedded = Embedded(before, real, real[:, :1, :0], real[:, 0, :0], torch.zeros(128))
            nothing = torch.empty(128, num_segments + 1, 0)
            predictions, _ = built.model.predict(embedded, nothing[:, 0], nothing, generator)
            loss = built.objective.prediction_error(predictions.edited[:, 0], real[:, 1], real[:, 0]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        built.eval()
        clips = paths(1, 512, num_segments + 4)
        before, real = clips.split([num_segments, 4], dim=1)
        with torch.no_grad():
            state = torch.cat([real[:, 0], built.history.of(before, before[..., :0])], dim=1)
            futures = built.model.rollout_embedding(state, 3, 1, generator)[:, 0]
        return 1 - torch.cosine_similarity(futures, real[:, 1:], dim=-1).mean(dim=0)

    of_one_point = 1 - torch.cos(0.3 * torch.arange(1, 4))
    assert (errors(0) > 0.9 * of_one_point).all()
    assert (errors(1) < 0.1 * of_one_point).all()
