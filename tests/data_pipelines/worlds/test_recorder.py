import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from data_pipelines.clips import ClipSpec
from data_pipelines.decoders import read_facts, read_frames
from data_pipelines.errors import UserError
from data_pipelines.formats.registry import load_videos
from data_pipelines.splits import Split
from data_pipelines.worlds import push_t_law
from data_pipelines.worlds.digits import pixel_centroid
from data_pipelines.worlds.push_t import ENV_ID as PUSH_T_ID
from data_pipelines.worlds.recorder import Recording, _policy, offered_policies, record
from data_pipelines.worlds.two_rooms import ENV_ID
from data_pipelines.worlds.two_rooms_law import move, step_of_action
from tests.conftest import REPO, TINY, run_here, run_script, script_environment
from tests.data_pipelines.conftest import DECODERS
from tests.data_pipelines.streams import make_stream, read_clips
from worldmodel.config import load_config
from worldmodel.sources import make_source

ROOMS = f"data_pipelines.worlds.two_rooms:{ENV_ID}"
PUSH_T = f"data_pipelines.worlds.push_t:{PUSH_T_ID}"
COUNTER = "tests.data_pipelines.worlds.tiny_env:tests/Counter-v0"
STEPS = 32
COUNTS: dict[Split, int] = {"train": 1, "selection": 1, "test": 1}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training, 3 selection and 6 test episodes of two rooms in random layouts."""
    root = tmp_path_factory.mktemp("recorded") / "rooms"
    recording = Recording(ROOMS, kwargs={"layout": "random"}, past_end=True, num_steps=STEPS)
    record(root, {"train": 12, "selection": 3, "test": 6}, recording, num_processes=2)
    return root


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def dot_place(video: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, 64, 64] -> [..., 2] px; without what H.264 leaves all over the picture."""
    return pixel_centroid((video[..., 1, :, :].float() - 20).clamp(min=0))


def assert_follows_the_law(labels: dict[str, torch.Tensor]) -> None:
    state, action = labels["state"], labels["action"]
    wall_x, door_y = (labels[name][:, None] for name in ("wall_x_px", "door_y_px"))
    moved = move(state[:, :-1], step_of_action(action[:, :-1]), wall_x, door_y)
    torch.testing.assert_close(moved, state[:, 1:], atol=1e-6, rtol=0)
    assert (state.diff(dim=1).norm(dim=-1) > 0.5).float().mean() > 0.5


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoded_dots_are_where_the_labels_of_their_frames_say(rooms: Path, decoder: str) -> None:
    index = load_videos(rooms / "test")
    spec = ClipSpec(3, 4, clip_step=5)
    [batch] = read_clips(index, spec, size_px=None, channels=3, batch_size=64, decoder=decoder)
    labels = batch["labels"]
    assert batch["video"].shape == (30, 12, 3, 64, 64) and labels["action"].shape == (30, 12, 2)
    off = (dot_place(batch["video"]) - labels["state"]).norm(dim=-1)
    assert off.max() < 0.3 and off.mean() < 0.1
    assert_follows_the_law(labels)
    torch.testing.assert_close(labels["applied_action"], labels["action"])  # all of them are shorter than 1
    columns = batch["video"][:, :, 0].float().mean(dim=(1, 2))
    wall_x = (columns * torch.arange(64)).sum(dim=-1) / columns.sum(dim=-1)
    torch.testing.assert_close(wall_x, labels["wall_x_px"], atol=0.3, rtol=0)


def test_training_batches_carry_actions_and_states(rooms: Path) -> None:
    stream = make_stream(
        load_videos(rooms / "train"), ClipSpec(3, 3, clip_step=1), size_px=64, channels=3,
        batch_size=16, num_lanes=4, pool_clips=32, seed=0,
    )  # fmt: skip
    batches = stream.batches()
    labels = [next(batches)["labels"] for _ in range(4)]
    batches.close()
    for part in labels:
        assert_follows_the_law(part)


def test_evaluation_reads_a_recording_as_videos_without_a_law(rooms: Path) -> None:
    overrides = [*TINY, f"data.root={rooms}", "data.channels=3", "data.num_frames=3", "data.frame_stride=1"]
    overrides.append("model.encoder=conv3d")  # which TINY makes narrower
    config = load_config(REPO / "configs" / "video.yaml", overrides)
    [batch] = make_source(config).evaluation_batches("test", 10)
    assert batch["labels"]["state"].shape == (10, 9, 2)
    assert_follows_the_law(batch["labels"])
    assert make_source(config).known_law("test", 1) is None


def test_the_last_frame_has_no_action(rooms: Path) -> None:
    for row in rows_of(rooms / "test"):
        assert len(row["action"]) == len(row["state"]) == len(row["applied_action"]) == STEPS + 1
        assert row["action"][-1] == row["applied_action"][-1] == [0, 0]
        assert all(any(action) for action in row["action"][:-1])
        assert read_facts(rooms / "test" / row["file_name"]).num_frames == STEPS + 1


def test_episodes_differ_and_cross_the_door(rooms: Path) -> None:
    rows = [row for split in ("train", "selection", "test") for row in rows_of(rooms / split)]
    assert len({row["seed"] for row in rows}) == len({tuple(row["state"][0]) for row in rows}) == 21
    crossed = sum(len({x > row["wall_x_px"] for x, _ in row["state"]}) == 2 for row in rows)
    assert crossed >= 3


def test_slips_are_labelled(tmp_path: Path) -> None:
    recording = Recording(ROOMS, kwargs={"slip": 0.5}, past_end=True, policy="random", seed=2)
    record(tmp_path, {"train": 2, "selection": 1, "test": 1}, recording, num_processes=1)
    rows = [row for split in ("train", "selection", "test") for row in rows_of(tmp_path / split)]
    same = np.mean([a == b for row in rows for a, b in zip(row["action"][:-1], row["applied_action"], strict=False)])
    assert 0.3 < same < 0.7
    for row in rows:
        state, applied = torch.tensor(row["state"]), torch.tensor(row["applied_action"])
        moved = move(state[:-1], step_of_action(applied[:-1]), row["wall_x_px"], row["door_y_px"])
        torch.testing.assert_close(moved, state[1:], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_an_interrupted_recording_goes_on_to_the_same_end(rooms: Path, tmp_path: Path) -> None:
    """Ctrl-C while videos are written; then one that was killed amid a file."""
    out = tmp_path / "rooms"
    arguments = [
        "--env",
        ROOMS,
        "--env-kwargs",
        "layout=random",
        "--past-end",
        "--steps",
        str(STEPS),
        "--out",
        str(out),
    ]
    arguments += ["--train", "12", "--selection", "3", "--test", "6", "--num-processes", "1"]
    with subprocess.Popen(
        [sys.executable, str(REPO / "scripts" / "record_env.py"), *arguments],
        stderr=subprocess.PIPE, text=True, cwd=REPO, env=script_environment(),
        # A shell's background jobs, this test in one of them, ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        for _ in range(3_000):
            if len(list(out.glob("train/*.mp4"))) >= 2 or process.poll() is not None:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert not (out / "test").exists() or not (out / "test" / "metadata.jsonl").exists()
    [kept] = [path for path in out.glob("train/*.mp4") if path.stem == "000000"]
    before = kept.stat().st_mtime_ns
    (out / "train" / "000009.mp4").unlink(missing_ok=True)
    (out / "train" / "000009.partial").write_bytes(b"half a vid")
    again = run_script("record_env.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert "21 episodes in" in again.stdout
    assert kept.stat().st_mtime_ns == before
    files = sorted(path.relative_to(rooms) for path in rooms.rglob("*") if path.is_file() and path.name[0] != ".")
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for path in files:
        assert (out / path).read_bytes() == (rooms / path).read_bytes(), path


def test_any_environment_is_recorded_to_its_end(tmp_path: Path) -> None:
    recording = Recording(COUNTER, num_steps=9)
    record(tmp_path / "a", {"train": 2, "selection": 1, "test": 1}, recording, num_processes=1)
    folder = tmp_path / "a" / "train"
    world = json.loads((tmp_path / "a" / "world.json").read_text())
    assert (world["world"], world["env"], world["policy"], world["num_steps"]) == ("recorded", COUNTER, "random", 9)
    for row in rows_of(folder):
        actions, states = torch.tensor(row["action"]), torch.tensor(row["state"])
        assert actions.shape == (6, 3) and actions.sum(dim=1).tolist() == [1, 1, 1, 1, 1, 0]  # one-hot, then none
        assert states[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        torch.testing.assert_close(states[1:, 1] - states[:-1, 1], (actions[:-1] @ torch.arange(3.0)))
        assert row["luck"] == pytest.approx(states[0, 2].item()) and row["done"] == 0 and row["seed"] >= 0
        assert "text" not in row and "applied_action" not in row
        facts = read_facts(folder / row["file_name"])
        assert (facts.width, facts.height, facts.num_frames) == (21, 15, 6)
        assert facts.duration_s == pytest.approx(6 / 7, abs=0.01)
        frames = np.stack(list(read_frames(folder / row["file_name"], channels=3, size_px=None)))
        expected = torch.stack([40 * states[:, 0], 0 * states[:, 0], 10 * states[:, 1]], dim=-1)
        assert np.abs(frames - expected.numpy()[..., None, None]).max() <= 6


def test_steps_go_on_past_the_end_and_pictures_are_resized(tmp_path: Path) -> None:
    recording = Recording(COUNTER, num_steps=6, past_end=True, size_px=30, policy="uniform")
    record(tmp_path, {"train": 1, "selection": 1, "test": 1}, recording, num_processes=1)
    [row] = rows_of(tmp_path / "test")
    assert len(row["state"]) == 7
    facts = read_facts(tmp_path / "test" / row["file_name"])
    assert (facts.width, facts.height, facts.num_frames) == (42, 30, 7)


def test_a_complete_recording_is_left_alone_and_another_is_refused(rooms: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in rooms.rglob("*.*l*") if path.name != "world.json"}
    recording = Recording(ROOMS, kwargs={"layout": "random"}, past_end=True, num_steps=STEPS)
    counts: dict[Split, int] = {"train": 12, "selection": 3, "test": 6}
    record(rooms, counts, recording, num_processes=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match="holds a world of other parameters"):
        record(rooms, {**counts, "train": 13}, recording, num_processes=1)
    for kwargs in ({"actions": "discrete"}, {}):
        out, other = tmp_path / "counter", Recording(COUNTER, kwargs=kwargs, num_steps=2)
        record(out, COUNTS, other, num_processes=1, overwrite=True)
        assert json.loads((out / "world.json").read_text())["kwargs"] == kwargs


@pytest.mark.parametrize(
    ("wrong", "tells"),
    [
        (lambda: Recording("tests/Nothing-v0"), "environment 'tests/Nothing-v0' cannot be made: .*tests"),
        (lambda: Recording("no_such_module:Env-v0"), "'no_such_module:Env-v0' cannot be made: .*no_such_module"),
        (lambda: Recording(COUNTER, imports=("no_such_module",)), "module 'no_such_module' cannot be imported"),
        (lambda: Recording(COUNTER, kwargs={"colour": 3}), "cannot be made: .*colour"),
        (lambda: Recording(ROOMS, kwargs={"slip": 3}), "slip=3 must be a number within 0..1"),
        (lambda: Recording(COUNTER, kwargs={"pictures": {1, 2}}), "cannot be represented in JSON"),
        (lambda: Recording(COUNTER, kwargs={"pictures": False}), "renders str with render_mode='rgb_array'"),
        (lambda: Recording(COUNTER, kwargs={"actions": "lists"}), r"actions of Sequence\(.* cannot be recorded"),
        (lambda: Recording(COUNTER, policy="own"), "policy 'own' is unknown for .*: use random, drift, uniform"),
        (
            lambda: Recording(ROOMS, policy="own=0.5 wild=0.5"),
            "policy 'wild' is unknown for .*: use own, random, drift",
        ),
        (
            lambda: Recording(COUNTER, policy="random=0.5 drift=0.4"),
            "'random=0.5 drift=0.4' must be a name, or NAME=SHARE",
        ),
        (lambda: Recording(COUNTER, policy="random drift"), "with shares above 0 that add up to 1"),
        (lambda: Recording(COUNTER, policy="random=1.5 drift=-0.5"), "with shares above 0 that add up to 1"),
        (lambda: Recording(COUNTER, num_steps=0), "num_steps=0 must be at least 1"),
        (lambda: Recording(COUNTER, size_px=2), "size_px=2 must be at least 16"),
        (lambda: Recording(COUNTER, size_px=100_000), "size_px=100000: frames of .* would be resized to"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    wrong: Callable[[], Recording], tells: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=tells) as raised:
        record(tmp_path / "out", COUNTS, wrong(), num_processes=1)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_package_that_draws_and_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def render(_: object) -> None:
        raise gymnasium.error.DependencyNotInstalled('pygame is not installed, run `pip install "gymnasium[x]"`')

    monkeypatch.setattr("tests.data_pipelines.worlds.tiny_env.CounterEnv.render", render)
    with pytest.raises(UserError, match="renders no pictures: pygame is not installed, run"):
        record(tmp_path / "out", COUNTS, Recording(COUNTER), num_processes=1)
    assert not (tmp_path / "out").exists()


def test_there_are_episodes_in_every_split_and_processes_to_record_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 test episodes: there must be at least one"):
        record(tmp_path, COUNTS | {"test": 0}, Recording(COUNTER), num_processes=1)
    with pytest.raises(UserError, match="num_processes=0 must be at least 1"):
        record(tmp_path, COUNTS, Recording(COUNTER), num_processes=0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        (["--env", "tests/Nothing-v0"], "tests/Nothing-v0"),
        (
            ["--env", ROOMS, "--env-kwargs", "slip"],
            "argument 'slip' of the environment must read NAME=VALUE",
        ),
        (["--env", ROOMS, "--env-kwargs", "slip=0", "train.lr=1"], "put overrides before the options, or after --"),
        (["--env", ROOMS], "does not hold a world"),
    ],
)
def test_the_script_tells_mistakes_in_one_line(arguments: list[str], tells: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not a recording")
    done = run_here("record_env.py", "--out", str(tmp_path), *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and tells in errors[0], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_pusht_is_recorded_by_several_policies(tmp_path: Path) -> None:
    """The disc is in the pixels where the state has it, and recorded states and actions replay exactly."""
    pytest.importorskip("pymunk")
    arguments = ["--env", PUSH_T, "--policy", "expert=0.5", "weak=0.5", "--steps", "20", "--seed", "3"]
    counts = ["--train", "1", "--selection", "1", "--test", "8", "--num-processes", "1"]
    done = run_here("record_env.py", *arguments, *counts, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "test")
    assert {row["policy"] for row in rows} == {"expert", "weak"}
    assert json.loads((tmp_path / "world.json").read_text())["policy"] == "expert=0.5 weak=0.5"
    index = load_videos(tmp_path / "test")
    [batch] = read_clips(index, ClipSpec(1, 21), size_px=None, channels=3, batch_size=8)
    assert batch["video"].shape == (8, 21, 3, 64, 64)
    blue = (batch["video"][:, :, 2].float() - batch["video"][:, :, 0].float() - 60).clamp(min=0)
    seen = (pixel_centroid(blue) + 0.5) * 8
    states, actions = batch["labels"]["state"].numpy(), batch["labels"]["action"].numpy()
    assert np.abs(seen.numpy() - states[..., :2]).max() < 5
    for way, pushes in zip(states, actions, strict=True):
        state = way[0]
        for push, after in zip(pushes[:-1], way[1:], strict=True):
            state, _ = push_t_law.move(state, push)
            assert (state == after).all()


def test_shares_decide_how_often_a_policy_is_drawn() -> None:
    env = gymnasium.make(ROOMS)
    recording = Recording(ROOMS, policy="own=0.2 drift=0.8")
    drawn = [_policy(env, recording, np.random.default_rng(seed))[0] for seed in range(600)]
    assert drawn.count("drift") / 600 == pytest.approx(0.8, abs=0.05) and set(drawn) == {"own", "drift"}
    assert list(offered_policies(env)) == ["own", "random", "drift", "uniform"]
