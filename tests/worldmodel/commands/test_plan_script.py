"""From recorded videos to plans: scripts/plan.py, its controls, and a model that learns to reach its goals."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipelines.worlds.recorder import Recording, record
from tests.conftest import REPO, TINY, run_here, run_script
from tests.worldmodel.report.samples import undeclared
from worldmodel.config import External, IcemConfig, PlanningConfig, load_config
from worldmodel.evaluation.records import load_records
from worldmodel.planning import goal_conditioned
from worldmodel.planning.controls import PrivilegedPolicy, RandomPolicy
from worldmodel.planning.plan import check_actions
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.planning.planners import Cost, Plan
from worldmodel.planning.protocol import (
    PlanningProtocol,
    evaluate_policy,
    run_episodes,
)
from worldmodel.runs.metrics import value_at
from worldmodel.runs.planning_metrics import Planned
from worldmodel.training.loop import train

ENV = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"
CONFIG = REPO / "configs" / "two_rooms.yaml"


def protocol(episodes: int = 6, seeds: int = 1, budget: int = 50) -> PlanningProtocol:
    return PlanningProtocol(env=ENV, env_kwargs={}, seeds=seeds, episodes=episodes, budget=budget, first_seed=0)


def recording(root: Path, train_episodes: int) -> Path:
    facts = Recording(env=ENV, past_end=True)
    record(root, {"train": train_episodes, "selection": 12, "test": 12}, facts, num_processes=2)
    return root


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few recorded episodes."""
    return recording(tmp_path_factory.mktemp("plan") / "rooms", 16)


def trained_in(rooms: Path, config: Path, run: Path, *overrides: str) -> Path:
    """The folder of a run of six updates."""
    AcceleratorState._reset_state(reset_partial_state=True)
    tiny = [*TINY, "data.num_lanes=4", f"data.root={rooms}", f"run_dir={run}", "data.cache_mb=0", *overrides]
    return train(
        load_config(config, [*tiny, "planning.candidates=16", "planning.planner.elites=4", "planning.horizon=4"])
    )


@pytest.fixture(scope="module")
def planner(rooms: Path) -> Path:
    """A run that is conditioned on actions."""
    return trained_in(rooms, CONFIG, rooms.parent / "run")


@pytest.fixture(scope="module")
def passive(rooms: Path) -> Path:
    """A run with r as a latent action."""
    return trained_in(rooms, REPO / "configs" / "two_rooms_latent.yaml", rooms.parent / "passive")


def test_the_script_prints_and_writes_success_its_controls_and_the_protocol(planner: Path) -> None:
    arguments = ["--run", str(planner), "--env", ENV, "--seeds", "2", "--episodes", "3", "--budget", "4"]
    done = run_script("plan.py", "planning.iterations=2", *arguments, "--vary", "noise=0,60", "background=navy")
    assert done.returncode == 0, done.stderr
    result = json.loads((planner / "planning.json").read_text())
    assert len(result["per_seed"]) == 2 and result["success_rate"] == pytest.approx(np.mean(result["per_seed"]))
    low, high = result["ci95"]
    assert low <= result["success_rate"] <= high and result["ms_per_decision"] > 0
    assert result["protocol"]["budget"] == 4 and result["protocol"]["planning"]["iterations"] == 2
    assert result["protocol"]["planning"]["candidates"] == 16 and result["protocol"]["step"] == 6
    assert {"random_floor", "oracle_ceiling"} <= result.keys()
    assert f"{result['success_rate']:.3f}" in done.stdout and '"budget": 4' in done.stdout
    assert result["protocol"]["protocol"] == "drawn" and not {"replay", "do_nothing"} & result.keys()
    assert "curve" not in result and str(planner / "report.html") in done.stdout
    assert undeclared({"planning": result}) == []
    noise, background = result["factors"]
    assert (noise["factor"], noise["present"], background["present"]) == ("noise", 0, "black")
    assert [entry["value"] for entry in noise["values"]] == [0, 60]
    assert noise["values"][0] == {"value": 0} | {key: result[key] for key in Planned.__annotations__}
    assert noise["values"][1]["ms_per_decision"] != result["ms_per_decision"]
    assert noise["values"][1]["steps"] <= 4 and len(background["values"][0]["per_seed"]) == 2
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if line][:4] == ["policy", "model", "random", "privileged"]
    rows = [" ".join(line[:3]) for line in lines if line[1:2] == ["="]]
    assert rows == ["noise = 0", "noise = 60", "background = navy"]
    page = (planner / "report.html").read_text()
    assert "Factors of variation" in page and "Success against noise, with 95% intervals: 0 " in page


def test_the_guide_acts_in_python(planner: Path) -> None:
    """With the block of docs/planning.md, as it is."""
    page = (REPO / "docs" / "planning.md").read_text(encoding="utf-8").partition("## Actions from Python\n")[2]
    code = page.partition("```python\n")[2].partition("```")[0].replace("runs/two_rooms", str(planner))
    env, executed = protocol().make_env(), []
    env.reset(seed=0)

    def execute(actions: np.ndarray) -> None:
        executed.append(actions)
        for action in actions:
            env.step(action)

    exec(code, {"goal": env.get_wrapper_attr("goal_frame")(), "camera": env.render, "execute": execute})
    assert len(executed) == 10 and {each.shape for each in executed} == {(1, 2)} and np.any(executed)


def test_actions_of_another_range_are_warned_of(
    planner: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(planner / "config.yaml").planning
    check_actions(protocol(), config)
    assert not caplog.records
    env = protocol().make_env()
    env.action_space = gymnasium.spaces.Box(-3, 3, (2,), np.float32)
    monkeypatch.setattr(PlanningProtocol, "make_env", lambda _: env)
    check_actions(protocol(), config)
    assert "plans hold actions in [-1, 1] only" in caplog.text


@pytest.mark.slow
def test_the_report_has_the_planning_by_itself_and_beside_the_forecasts(planner: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(planner, run)
    arguments = ["--run", str(run), "--env", ENV, "--seeds", "1", "--episodes", "6", "--budget", "3"]
    for script, headings in (
        (["plan.py", *arguments, "planning.iterations=1"], ["Planning"]),
        (["evaluate.py", "--run", str(run)], ["Forecasts", "Planning"]),
    ):
        done = run_here(*script)
        assert done.returncode == 0, done.stderr
        page = (run / "report.html").read_text()
        assert [name for name in ("Forecasts", "Planning") if f">{name}</h2>" in page] == headings
        metrics = {"planning": json.loads((run / "planning.json").read_text())}
        shown = re.findall(r'data-metric="(planning\.[^"]*)">([^<]*)<', page)
        assert {"planning.success_rate", "planning.ci95.0", "planning.oracle_ceiling.steps"} <= dict(shown).keys()
        for path, text in shown:
            assert f"{value_at(metrics, path):.{len(text.partition('.')[2])}f}" == text, path
    episodes = load_records(run / "planning.safetensors", PlannedEpisode)
    assert len(episodes) == 4 and not all(episode.success for episode in episodes)
    for episode in episodes:
        assert episode.imagined_px is not None and episode.way_px is not None and episode.goal_px is not None
        steps = len(episode.frames) - 1
        assert episode.frames.shape[1:] == (3, 64, 64) and (steps == 3 or episode.success)
        assert episode.imagined_px.shape == (steps, 1, 4, 2) and np.isfinite(episode.imagined_px).all()
        for frame, place in ((episode.frames[-1], episode.way_px[-1]), (episode.goal, episode.goal_px)):
            y, x = np.unravel_index(frame[1].argmax(), frame[1].shape)  # the dot is green
            assert np.abs(np.array([x, y]) - place).max() <= 0.6


@pytest.mark.slow
def test_several_counts_of_labels_make_a_curve(passive: Path) -> None:
    arguments = ["--run", str(passive), "--env", ENV, "--seeds", "2", "--episodes", "2", "--budget", "2"]
    done = run_here("plan.py", *arguments, "--labels", "40", "20", "--vary", "noise=5", "--checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    result = json.loads((passive / "planning.json").read_text())
    assert undeclared({"planning": result}) == []
    assert [entry["labels"] for entry in result["curve"]] == [40, 20] and result["protocol"]["labels"] == 20
    keys = {"success_rate", "ci95", "per_seed", "ms_per_decision"}
    assert all(entry.keys() == {"labels", *keys} for entry in result["curve"])
    assert [entry["value"] for entry in result["factors"][0]["values"]] == [5]
    assert {key: result["curve"][-1][key] for key in keys} == {key: result[key] for key in keys}
    page = (passive / "report.html").read_text()
    assert "This run, 40 labels" in page and "Success against labels, with 95% intervals: 40 labels" in page
    assert "40 labels" in done.stdout


def test_starts_from_recorded_episodes_have_their_own_floor_and_ceiling(planner: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(planner, run)
    arguments = ["--run", str(run), "--env", ENV, "--protocol", "recorded", "--offset", "12", "--budget", "13"]
    done = run_here(
        "plan.py", *arguments, "--vary", "blur=1", "--seeds", "2", "--episodes", "3", "planning.iterations=1"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "planning.json").read_text())
    assert undeclared({"planning": result}) == []
    assert result["replay"]["success_rate"] == 1 and result["do_nothing"]["success_rate"] == 0
    assert result["replay"]["steps"] <= 12 and result["do_nothing"]["steps"] == 13
    assert result["factors"][0]["values"][0]["value"] == 1
    facts = result["protocol"]
    assert facts["protocol"] == "recorded" and facts["offset"] == 12 and facts["left_out"] >= 0
    page = (run / "report.html").read_text()
    for words in ("Random actions", "Actions of zero", "Privileged planner", "Recorded actions", "left_out"):
        assert words in page
    assert "do nothing" in done.stdout and "recorded actions" in done.stdout and '"offset": 12' in done.stdout


def test_a_run_with_a_stride_decides_on_several_actions_at_once(rooms: Path, tmp_path: Path) -> None:
    run = trained_in(rooms, CONFIG, tmp_path / "run", "data.frame_stride=3")
    arguments = ["--run", str(run), "--env", ENV, "--seeds", "1", "--episodes", "2", "--budget", "7"]
    done = run_here("plan.py", *arguments, "planning.iterations=1")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "planning.json").read_text())["protocol"]["block"] == 3
    for episode in load_records(run / "planning.safetensors", PlannedEpisode):
        steps = len(episode.frames) - 1
        assert episode.imagined_px is not None and episode.imagined_px.shape == (steps, 1, 4, 2)
        assert steps == 7 or episode.success
        plans = [part.tolist() for part in episode.imagined_px]
        assert plans[:3] == plans[:1] * 3 and plans[3:6] == plans[3:4] * 3 and plans[0] != plans[3] != plans[6]


@pytest.mark.parametrize(
    ("labels", "tells"),
    [
        (["100", "0"], "labels=0: at least 20"),
        (["30", "30"], "30 30: a count is given twice"),
        (["9999"], "labels=9999: the training split has"),
    ],
)
def test_counts_of_labels_that_cannot_be(passive: Path, labels: list[str], tells: str) -> None:
    done = run_here("plan.py", "--run", str(passive), "--env", ENV, "--labels", *labels)
    assert done.returncode == 2 and tells in done.stderr, done.stderr


def test_a_learned_policy_acts_alone_or_starts_a_search_and_is_fitted_once(
    planner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(planner, run)
    arguments = ["--run", str(run), "--env", ENV, "--seeds", "2", "--episodes", "3", "--budget", "3"]
    fit = ["planning.goal_steps=8", "planning.policy_updates=40", "planning.policy_hidden_dim=16"]
    done = run_here("plan.py", *fit, *arguments, "--policy", "gc", "--vary", "slip=1", "contrast=0.5")
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "planning.json").read_text())
    assert undeclared({"planning": result}) == []
    slip, contrast = (varied["values"][0] for varied in result["factors"])
    assert len(slip["per_seed"]) == 2 and contrast["value"] == 0.5 and contrast["steps"] <= 3
    assert result["protocol"]["policy"] == "gc" and result["protocol"]["planning"]["goal_steps"] == 8
    episodes = load_records(run / "planning.safetensors", PlannedEpisode)
    assert {episode.imagined_px.shape[2] for episode in episodes if episode.imagined_px is not None} == {1}
    fitted = (run / "goal_policy.safetensors").read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("it was fitted before")

    with monkeypatch.context() as patched:
        patched.setattr(goal_conditioned, "embed_clips", refuse)
        warm_start = ["planning.warm_start=true", "planning.replan_every=2"]
        done = run_here("plan.py", *warm_start, *fit, *arguments, "--vary", "agent_size=2")
    assert done.returncode == 0, done.stderr
    warm = json.loads((run / "planning.json").read_text())
    assert warm["factors"][0]["values"][0]["steps"] <= 3
    assert warm["protocol"]["policy"] == "search" and warm["protocol"]["planning"]["warm_start"]
    for episode in load_records(run / "planning.safetensors", PlannedEpisode):
        imagined = episode.imagined_px  # of the plan that each step is part of: two steps for each decision
        assert imagined is not None and len(imagined) == len(episode.frames) - 1 >= 2
        assert np.array_equal(imagined[0], imagined[1])
    assert (run / "goal_policy.safetensors").read_bytes() == fitted
    done = run_here("plan.py", *arguments, "--policy", "gc", "planning.goal_steps=40")
    assert done.returncode == 2 and "planning.goal_steps" in done.stderr, done.stderr


@pytest.mark.parametrize("asked", [["--policy", "gc"], ["planning.warm_start=true"]])
def test_a_policy_is_not_learned_from_labels_of_a_passive_run(passive: Path, asked: list[str]) -> None:
    done = run_here("plan.py", "--run", str(passive), "--env", ENV, "--labels", "40", "--seeds", "1", *asked)
    assert done.returncode == 2 and "leave out labels, or policy=gc" in done.stderr, done.stderr
    done = run_here("plan.py", "--run", str(passive), "--env", ENV, *asked)
    assert done.returncode == 2 and "is not conditioned on actions" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        (["--env", "CartPole-v1"], "no goal_frame()"),
        (["--env", ENV, "--episodes", "0"], "--episodes must be at least 1, not 0"),
        (["--env", ENV, "model.encoder.width=2"], "only planning.KEY=VALUE"),
        (["--env", ENV, "planning.planner.elites=99"], "elites"),
        (["--env", ENV, "--env-kwargs", "slip=2"], "slip=2"),
        (["--env", ENV, "--vary", "noise"], "factor 'noise' must read NAME=VALUE,VALUE"),
        (["--env", ENV, "--vary", "colour=1"], "has blur, contrast, brightness, noise, agent_size, background, slip"),
        (["--env", ENV, "--vary", "noise=1", "agent_size=1,9"], "agent_size=9 must be a number within 0.25..4"),
        (["--env", ENV, "--offset", "5"], "--offset=5 is of --protocol recorded"),
        (["--env", ENV, "--protocol", "recorded", "--offset", "0"], "--offset must be at least 1, not 0"),
        (["--env", ENV, "--protocol", "recorded", "--offset", "33"], "--offset=33: the longest episode"),
    ],
)
def test_mistakes_are_told_in_one_line(planner: Path, arguments: list[str], tells: str) -> None:
    done = run_here("plan.py", "--run", str(planner), *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and tells in errors[0], done.stderr


def test_a_passive_run_cannot_plan(trained_run: Path) -> None:
    done = run_here("plan.py", "--run", str(trained_run), "--env", ENV)
    assert done.returncode == 2 and "is not conditioned on actions" in done.stderr


def privileged(seed: int, envs: Sequence[gymnasium.Env]) -> PrivilegedPolicy:
    return PrivilegedPolicy(
        envs, PlanningConfig(planner=IcemConfig(elites=8), candidates=64, iterations=3, horizon=10), seed
    )


def test_the_privileged_planner_reaches_every_goal_by_nearly_the_shortest_way() -> None:
    ceiling: Any = evaluate_policy(protocol(episodes=12), privileged, label="ceiling")
    assert ceiling["success_rate"] == 1
    assert 0.99 < ceiling["path_ratio"] < 1.3


class Straight:
    """A user's planner: the cheapest of constant actions in eight directions."""

    def improve(
        self, config: PlanningConfig, plan: Plan, cost: Cost, generator: torch.Generator
    ) -> tuple[Plan, torch.Tensor, torch.Tensor]:
        angle = torch.arange(8) * torch.pi / 4
        ways = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None].expand(-1, config.horizon, -1)
        candidates = ways.expand(len(plan.mean), -1, -1, -1)
        costs, best = cost(candidates).min(dim=1)
        return plan, ways[best], costs


def test_the_privileged_policy_plans_with_a_planner_from_outside() -> None:
    config = PlanningConfig(planner=External(f"{__name__}:Straight"), horizon=4)
    ran = run_episodes(protocol(episodes=8), 0, lambda envs: PrivilegedPolicy(envs, config, 0))
    moves = np.concatenate([np.diff(way, axis=0) for way in ran.states])
    angles = np.rad2deg(np.arctan2(*moves[np.linalg.norm(moves, axis=1) > 3.99].T))
    assert len(angles) > 8 and np.allclose(angles / 45, np.round(angles / 45), atol=1e-2)


@pytest.mark.slow
def test_chance_is_far_below_it_and_the_same_for_the_same_seed() -> None:
    first, again = (run_episodes(protocol(episodes=20), 0, lambda envs: RandomPolicy(envs, 3)).states for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    floor: Any = evaluate_policy(protocol(episodes=40), lambda seed, envs: RandomPolicy(envs, seed), label="floor")
    assert floor["success_rate"] < 0.3


def test_ways_begin_where_the_episode_does_and_end_within_the_goal() -> None:
    ran = run_episodes(protocol(episodes=8), 0, lambda envs: privileged(0, envs))
    assert ran.success.all()
    for way, steps, path in zip(ran.states, ran.steps, ran.path, strict=True):
        legs = np.linalg.norm(np.diff(way, axis=0), axis=1)
        assert len(way) == steps + 1 and legs.max() <= 4 + 1e-4 and path == pytest.approx(legs.sum())
    assert (ran.path >= ran.shortest - 1e-3).all()


@pytest.mark.slow
def test_a_model_trained_for_two_minutes_plans_far_above_chance(tmp_path: Path) -> None:
    """End to end: 600 recorded episodes, 600 updates, 50 episodes planned in the fixed rooms."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(2)
    root = recording(tmp_path / "rooms", 600)
    overrides = [f"data.root={root}", f"run_dir={tmp_path / 'run'}", "train.steps=600", "train.eval_every=600"]
    run = train(load_config(CONFIG, [*overrides, "tracking.wandb=disabled"]))
    done = run_script("plan.py", "--run", str(run), "--env", ENV, "--seeds", "1", timeout_s=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "planning.json").read_text())
    assert result["success_rate"] > 0.5 > 2 * result["random_floor"]["success_rate"]
