import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.clips import ClipSpec
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.splits import Split
from data_pipelines.worlds import game_law, games
from data_pipelines.worlds.game_law import GameLaw
from data_pipelines.worlds.games import GAMES, Recording, make_simulator, version_of, write_game
from data_pipelines.worlds.written import read_world
from tests.conftest import REPO
from tests.data_pipelines.streams import read_clips
from worldmodel.commands import videos
from worldmodel.commands.main import main
from worldmodel.config import load_config
from worldmodel.evaluation.scores import energy_score
from worldmodel.sources import make_source

NUM_FRAMES = 40
HORIZON, FRAMES, STRIDE = 2, 3, 2  # of clips
STEPS = HORIZON * FRAMES * STRIDE
COUNTS: dict[Split, int] = {"train": 1, "selection": 1, "test": 1}


@pytest.fixture
def short_burn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(games, "MAX_BURN_IN", 60)


SLOW_GAMES = ("freeway", "breakout")  # the tests of pong cover their simulator, too


@pytest.fixture(params=[pytest.param(game, marks=[pytest.mark.slow] * (game in SLOW_GAMES)) for game in GAMES])
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(GAMES[request.param].package.replace("-", "_"))
    return request.param


def recording_of(name: str) -> Recording:
    return Recording(name, NUM_FRAMES, seed=3, version=version_of(name))


def law_of(name: str, root: Path) -> GameLaw:
    return GameLaw(root, recording_of(name), "test", FRAMES, STRIDE, channels=1)


def labels_of(name: str, episode: int, starts: list[int]) -> dict[str, torch.Tensor]:
    """Labels of clips of 1 + HORIZON segments, as a batch has them."""
    _, row = games.play_episode(make_simulator(name), recording_of(name), "test", episode)
    frames = [[start + STRIDE * i for i in range((1 + HORIZON) * FRAMES)] for start in starts]
    of_frames = {key: torch.tensor(row[key])[torch.tensor(frames)] for key in ("frame", "position")}
    return {"episode": torch.full((len(starts),), episode), **of_frames}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recorded_chance(name: str, episode: int, starts: list[int]) -> torch.Tensor:
    burn_in, chance = recording_of(name).chance_of("test", episode)
    first = [burn_in + start + (FRAMES - 1) * STRIDE for start in starts]  # the chance that leads to the next frame
    return torch.from_numpy(np.stack([chance[row : row + STEPS] for row in first]))[:, None]


def test_the_recorded_chance_gives_the_recorded_future(name: str, tmp_path: Path) -> None:
    starts = [0, 17, 5]
    law, labels = law_of(name, tmp_path), labels_of(name, 1, starts)
    chance = recorded_chance(name, 1, starts)
    torch.testing.assert_close(law.measure(labels, chance)[:, 0], law.truth(labels, HORIZON), atol=1e-3, rtol=0)
    frames, _ = games.play_episode(make_simulator(name), recording_of(name), "test", 1)
    rendered = (law.render(labels, chance) * 255).round().byte()[:, 0, :, 0]
    for start, shown in zip(starts, rendered, strict=True):
        ahead = start + STRIDE * (np.arange(HORIZON * FRAMES) + FRAMES)
        assert np.array_equal(shown.numpy(), frames[ahead])


def test_restoring_goes_back_to_the_whole_state(name: str) -> None:
    simulator, rng = make_simulator(name), np.random.default_rng(0)
    before, after, detour = (rng.random((n, GAMES[name].num_chances), dtype=np.float32) for n in (30, 20, 35))

    def played(chance: np.ndarray) -> list[tuple[list[float], bytes]]:
        seen = []
        for row in chance:
            simulator.step(row)
            memory = simulator.ale.getRAM().tobytes() if hasattr(simulator, "ale") else b""
            seen.append((simulator.labels()["position"], simulator.picture().tobytes() + memory))
        return seen

    simulator.restart()
    played(before)
    state = simulator.save()
    straight = played(after)
    played(detour)
    simulator.restore(state)
    assert played(after) == straight
    simulator.restart()
    played(before)
    assert played(after) == straight


@pytest.mark.slow
@pytest.mark.usefixtures("short_burn_in")
def test_two_sets_of_draws_have_one_law_and_the_truth_is_one_more_draw(name: str, tmp_path: Path) -> None:
    """The score of the truths of many clips is that of other draws, within four standard errors; that of draws for
    other clips is far larger."""
    starts = [0, 8, 16]
    law, num_samples = law_of(name, tmp_path), 24
    parts = [labels_of(name, episode, starts) for episode in range(8)]
    labels = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    first, second = (law.measure(labels, law.sample(labels, HORIZON, num_samples, generator(n))) for n in (1, 2))
    truth = law.truth(labels, HORIZON)[:, None]
    for step in range(HORIZON):
        own = energy_score(first[:, :, step], second[:, :, step])
        reverse = energy_score(second[:, :, step], first[:, :, step])
        of_truth = energy_score(first[:, :, step], truth[:, :, step])
        for other in (reverse, of_truth):
            error = (other - own).std() / len(own) ** 0.5
            assert abs((other - own).mean()) < 4 * error + 1e-3
        elsewhere = energy_score(first.roll(len(starts), dims=0)[:, :, step], second[:, :, step])
        assert elsewhere.mean() > 2 * own.mean()
    assert first.std(dim=1).mean() > 0.3  # px: chance matters


def test_draws_are_kept_beside_the_videos(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law, labels = law_of(name, tmp_path), labels_of(name, 0, [2, 9])
    drawn = law.sample(labels, HORIZON, 3, generator(0))
    values = law.measure(labels, drawn)
    [kept] = (tmp_path / game_law.DRAWS_NAME).iterdir()

    def refuse(*arguments: object) -> None:
        raise AssertionError("played again")

    with monkeypatch.context() as patch:
        patch.setattr(game_law, "play_futures", refuse)
        torch.testing.assert_close(law.measure(labels, drawn), values, atol=0, rtol=0)
        with pytest.raises(AssertionError, match="played again"):
            law.measure(labels, law.sample(labels, HORIZON, 3, generator(1)))
    for damage in (b"", kept.read_bytes()[:-40], b"PK\x03\x04 not a file"):
        kept.write_bytes(damage)
        torch.testing.assert_close(law.measure(labels, drawn), values, atol=0, rtol=0)


def test_queries_in_any_order_and_in_processes_get_their_own_futures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(game_law, "QUERIES_PER_JOB", 2)
    parts = [labels_of(name, episode, starts) for episode, starts in ((2, [9, 1, 5]), (0, [3]), (2, [0]))]
    labels = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    law = law_of(name, tmp_path)
    drawn = law.sample(labels, HORIZON, 2, generator(0))
    together = law.measure(labels, drawn)
    for row in range(5):
        alone = {key: values[row : row + 1] for key, values in labels.items()}
        torch.testing.assert_close(law.measure(alone, drawn[row : row + 1])[0], together[row], atol=0, rtol=0)


def test_a_simulator_that_plays_differently_is_an_error(name: str, tmp_path: Path) -> None:
    law, labels = law_of(name, tmp_path), labels_of(name, 0, [4])
    labels["position"][:, FRAMES - 1] += 1
    with pytest.raises(UserError, match=r"does not repeat the recording .* frame 8 of test episode 0"):
        law.measure(labels, law.sample(labels, HORIZON, 2, generator(0)))


def test_constant_velocity_goes_on_from_the_last_two_frames(tmp_path: Path) -> None:
    law = GameLaw(tmp_path, Recording("freeway", NUM_FRAMES, 0, "1"), "test", FRAMES, STRIDE, channels=1)
    position = torch.tensor([[[9.0], [5.0], [6.5]]])
    ahead = law.extrapolate({"position": position}, torch.zeros(1, 3, 1, 64, 64), 2)
    assert ahead.tolist() == [[[11.0], [15.5]]]


def test_draws_in_damaged_files_are_drawn_again(tmp_path: Path) -> None:
    """Flipped bytes of the compressed data; then members that need a password or another method."""
    path = tmp_path / "draws.npz"
    values = np.random.default_rng(0).random((4, 8, 3, 2), np.float32).round(1)
    game_law._keep_draws(path, values)
    good = path.read_bytes()
    kept = game_law._read_draws(path, values.shape)
    assert kept is not None and np.array_equal(kept, values)
    [central] = [place for place in range(len(good)) if good[place : place + 4] == b"PK\x01\x02"]
    begin = 30 + int.from_bytes(good[26:28], "little") + int.from_bytes(good[28:30], "little")
    damages = [{int(np.random.default_rng(seed).integers(begin, central)): 255} for seed in range(12)]
    damages += [{6: 1, central + 8: 1}, {8: 64, central + 10: 64}]  # encrypted; compressed in another way
    for damage in damages:
        content = bytearray(good)
        for place, bits in damage.items():
            content[place] ^= bits
        path.write_bytes(content)
        assert game_law._read_draws(path, values.shape) is None, damage


def test_a_recording_is_what_another_process_plays_again(name: str, tmp_path: Path) -> None:
    """Workers record; this process plays the same episodes, and compares decoded pixels and labels frame by frame."""
    root, counts = tmp_path / "game", COUNTS | {"train": 2}
    write_game(root, name, counts, num_frames=NUM_FRAMES, seed=3, num_processes=1)
    world = read_world(root)
    assert world is not None and world["world"] == name and world["counts"] == counts
    [batch] = read_clips(
        load_videos(root / "train"), ClipSpec(1, NUM_FRAMES), size_px=None, channels=1, batch_size=4, decoder="pyav"
    )
    assert batch["labels"]["episode"].tolist() == [0, 1]
    for episode, video in enumerate(batch["video"]):
        frames, row = games.play_episode(make_simulator(name), Recording.of_world(world), "train", episode)
        assert np.abs(video[:, 0].numpy().astype(int) - frames).max() <= 2  # the conversion to YUV rounds
        for label in ("frame", "position"):
            torch.testing.assert_close(batch["labels"][label][episode], torch.tensor(row[label]), check_dtype=False)
    rows = [
        json.loads(line)
        for split in ("train", "selection", "test")
        for line in (root / split / "metadata.jsonl").read_text().splitlines()
    ]
    assert len({json.dumps(row["position"]) for row in rows}) == 4
    assert not {"action", "actions"} & rows[0].keys()


@pytest.mark.parametrize(
    ("overrides", "has_law"),
    [
        (["data.channels=1"], True),
        (["data.channels=3", "data.frame_stride=2", "data.num_frames=2", "data.clip_step=1"], True),
        (["data.size_px=32"], False),
        (["data.fps=10"], False),
    ],
)
def test_the_source_finds_the_law_by_the_file_beside_the_videos(
    tmp_path: Path, overrides: list[str], has_law: bool
) -> None:
    world = {"world": "pong", "num_frames": 9, "seed": 0, "version": "1", "counts": {}}
    (tmp_path / "world.json").write_text(json.dumps(world))
    config = load_config(REPO / "configs" / "video.yaml", [f"data.root={tmp_path}", *overrides])
    law = make_source(config).known_law("test", 4)
    assert (law is not None) == has_law
    if law is not None:
        assert law.quantity == GAMES["pong"].quantity
        assert isinstance(law, GameLaw) and law.num_frames == config.data.num_frames


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    monkeypatch.delitem(sys.modules, "data_pipelines.worlds.atari", raising=False)
    with pytest.raises(UserError, match=r"pong needs ale-py, .*: pip install 'worldmodel\[games\]'"):
        write_game(tmp_path / "out", "pong", COUNTS, num_processes=1)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="num_frames=1 must be at least 2"):
        write_game(tmp_path, "pong", COUNTS, num_frames=1, num_processes=1)
    with pytest.raises(SystemExit, match="2"):
        main(["videos", "pong", "--out", str(tmp_path), "--borders", "crop"])
    assert "--borders crop is not an option of pong" in capsys.readouterr().err


def test_the_games_that_help_shows_are_those_of_the_library() -> None:
    assert tuple(GAMES) == videos.GAMES
