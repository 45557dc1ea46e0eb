from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel.evaluation.recalibration import (
    Recalibrated,
    Recalibration,
    fit_recalibration,
    load_recalibrations,
    save_recalibration,
)
from worldmodel.evaluation.scores import energy_score
from worldmodel.runs.folder import RunFolder
from worldmodel.sources.source import ClipPlaces

QUERIES, SAMPLES = 600, 48


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw)


class World:
    """Futures y = m + noise of standard deviation 1 in two dimensions, m of 3 is known to the model; two steps."""

    def __init__(self, seed: int = 0, count: int = QUERIES) -> None:
        self.draw = generator(seed)
        self.known = 3 * normal(self.draw, count, 2, 2)
        self.future = self.known + normal(self.draw, count, 2, 2)
        self.moments = 10**0.5 * normal(self.draw, count, SAMPLES, 2, 2)

    def forecast(self, *, std: float, centre: Tensor | None = None, samples: int = SAMPLES) -> Tensor:
        """Samples around what the model knows, or around another centre."""
        centre = self.known if centre is None else centre
        return centre[:, None] + std * normal(self.draw, len(centre), samples, 2, 2)


def score(samples: Tensor, observed: Tensor) -> float:
    return float(energy_score(samples[:, :, 0], observed[:, None, 0]).mean())


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_a_planted_spread_is_found(factor: float) -> None:
    world = World()
    fitted = fit_recalibration(world.forecast(std=1 / factor), world.moments, world.future, 600)
    for spread, weight in zip(fitted.spread, fitted.weight, strict=True):
        assert spread == pytest.approx(factor, rel=0.2)  # a step of the grid is 19%
        assert weight < 0.08


def test_a_forecast_that_knows_nothing_becomes_climatology() -> None:
    world = World()
    imagined = 3 * normal(world.draw, QUERIES, 2, 2)  # sure of something that has nothing to do with the future
    forecast = world.forecast(std=0.5, centre=imagined)
    fitted = fit_recalibration(forecast, world.moments, world.future, 600)
    assert min(fitted.weight) > 0.9
    test = World(1)
    raw = test.forecast(std=0.5, centre=3 * normal(test.draw, QUERIES, 2, 2))
    recalibrated = fitted(raw, test.moments, test.draw)
    climatology = score(test.moments, test.future)
    assert score(raw, test.future) > 1.2 * climatology
    assert score(recalibrated, test.future) == pytest.approx(climatology, rel=0.02)


def test_the_weight_is_the_share_of_futures_that_the_model_does_not_know() -> None:
    world = World(count=1500)
    unknown = torch.rand(1500, generator=world.draw) < 0.4
    future = torch.where(unknown[:, None, None], 10**0.5 * normal(world.draw, 1500, 2, 2), world.future)
    fitted = fit_recalibration(world.forecast(std=1.0), world.moments, future, 10_000)
    assert fitted.weight == pytest.approx([0.4, 0.4], abs=0.06)
    assert fitted.spread == pytest.approx([1.0, 1.0], rel=0.2)


def test_no_other_spread_or_weight_scores_lower_on_the_clips_of_the_fit() -> None:
    """An independent computation: pools are drawn and scored as any forecast."""
    world = World()
    forecast = world.forecast(std=0.4, centre=0.8 * world.known + 0.8 * normal(world.draw, QUERIES, 2, 2))
    fitted = fit_recalibration(forecast, world.moments, world.future, 10**9)

    def drawn(spread: float, weight: float) -> float:
        other = Recalibration((spread,) * 2, (weight,) * 2)
        return score(other(forecast, world.moments, generator(7)), world.future)

    best = drawn(fitted.spread[0], fitted.weight[0])
    assert best < drawn(1.0, 0.0) - 0.05
    for spread in (0.5, 0.7, 1.4, 2.0):
        assert drawn(spread * fitted.spread[0], fitted.weight[0]) > best - 0.01
    for weight in (0.0, 0.25, 0.5, 1.0):
        assert drawn(fitted.spread[0], weight) > best - 0.01


def test_few_blocks_shrink_towards_climatology() -> None:
    world = World()
    forecast = world.forecast(std=1.0)
    weights = [fit_recalibration(forecast, world.moments, world.future, blocks).weight[0] for blocks in (1, 4, 600)]
    assert weights[0] > weights[1] > weights[2] and weights[0] > 0.5 and weights[2] < 0.05


def test_a_model_of_a_single_future_is_pooled() -> None:
    world = World()
    centre = world.known + normal(world.draw, QUERIES, 2, 2)
    single = world.forecast(std=0.0, centre=centre, samples=1)
    fitted = fit_recalibration(single, world.moments, world.future, 600)
    assert fitted.spread == (1.0, 1.0) and 0.2 < min(fitted.weight) < 0.8
    pooled = fitted(single, world.moments, world.draw)
    assert pooled.shape == (QUERIES, SAMPLES, 2, 2)
    assert score(pooled, world.future) < score(single, world.future) - 0.1


@pytest.mark.parametrize("num_samples", [1, 2, 8])
def test_few_samples_are_scaled_around_the_mean_of_many(num_samples: int) -> None:
    """Around their own mean, the deviations of S samples are too small by a factor of sqrt(1 - 1 / S)."""
    count = 2000
    samples = normal(generator(), count, num_samples, 1, 1)
    places = ClipPlaces(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64), 1)
    space = Recalibrated(Recalibration((2.0,), (0.0,)), torch.zeros(20, 1, 1), replace(places, video=places.video[:20]))
    changed = space(samples, torch.zeros(count, 1, 1, 1), places, generator())
    assert changed.shape == samples.shape
    assert changed.std().item() == pytest.approx(2, rel=0.05)


def test_samples_keep_their_identity() -> None:
    world = World(count=4)
    forecast = world.forecast(std=1.0)
    assert torch.equal(Recalibration((1.0, 1.0), (0.0, 0.0))(forecast, world.moments, generator()), forecast)
    assert torch.equal(Recalibration((3.0, 3.0), (1.0, 1.0))(forecast, world.moments, generator()), world.moments)
    found = Recalibration((2.0, 2.0), (0.3, 0.6))(forecast, world.moments, generator())
    replaced = (found == world.moments).all(dim=3)
    assert not (replaced[:, :, 0] & ~replaced[:, :, 1]).any()  # climatology stays climatology
    shares = replaced.float().mean(dim=(0, 1))
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.6]), atol=0.1, rtol=0)
    mean = forecast.mean(dim=1, keepdim=True)
    wide = mean + 2 * (forecast - mean)
    torch.testing.assert_close(found[~replaced], wide[~replaced])


def test_climatology_is_of_the_video_of_a_clip() -> None:
    past = torch.arange(40.0)[:, None, None].expand(-1, 2, 3)
    places = ClipPlaces(torch.tensor([5] * 20 + [6] * 20), torch.arange(40), 1)
    space = Recalibrated(Recalibration((1.0, 1.0), (1.0, 1.0)), past, places)
    asked = ClipPlaces(torch.tensor([6, 5, 99]), torch.zeros(3, dtype=torch.int64), 1)
    found = space(torch.zeros(3, 30, 2, 3), torch.zeros(3, 1, 2, 3), asked, generator())
    assert (found[0] >= 20).all() and (found[1] < 20).all()
    assert (found[2] < 20).any() and (found[2] >= 20).any()
    assert torch.equal(found[:, :, 0], found[:, :, 1])  # a moment is a whole future


def test_a_recalibration_is_stored_for_one_checkpoint(tmp_path: Path) -> None:
    assert load_recalibrations(tmp_path, 7) == {}
    places = ClipPlaces(torch.arange(5), torch.zeros(5, dtype=torch.int64), 1)
    spaces = {
        "embedding": Recalibrated(Recalibration((1.5, 2.0), (0.25, 0.5)), torch.rand(5, 2, 8), places),
        "quantity": Recalibrated(Recalibration((1.0, 0.5), (0.0, 1.0)), torch.rand(5, 2, 1), places),
    }
    save_recalibration(tmp_path, spaces, 7)
    loaded = load_recalibrations(tmp_path, 7)
    assert set(loaded) == {"embedding", "quantity"}
    for name, space in spaces.items():
        assert loaded[name].fitted == space.fitted
        assert torch.equal(loaded[name].past, space.past) and torch.equal(loaded[name].places.video, places.video)
    with pytest.raises(UserError, match="fitted at step 7, but the loaded checkpoint is from step 8"):
        load_recalibrations(tmp_path, 8)
    path = RunFolder(tmp_path).recalibration
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"recalibration.safetensors is damaged, evaluate the run again"):
        load_recalibrations(tmp_path, 7)
