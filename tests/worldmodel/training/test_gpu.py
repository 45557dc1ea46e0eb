"""What can be told about GPUs where there is none: on a pretended one (pretend_gpu.py) everything is where it belongs,
no step waits for it, and numbers are those of the processor."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO, TINY, run_python
from tests.worldmodel.commands.test_plan_script import ENV, recording
from tests.worldmodel.training.test_loop import rows
from worldmodel.config import choices, load_config
from worldmodel.training import batch_norm
from worldmodel.training.loop import train

SMALL = [*TINY, "train.steps=2", "train.eval_every=2", "evaluation.selection_clips=8", "evaluation.fit_clips=16"]
FRESH = ["objectives.yaml", "data.source=moving_mnist"]
STEPS = ["data.num_segments=2", "data.num_frames=1", "objective.rollout_steps=2", "objective.smoothness_weight=1"]
REFINED = ["train.refine_steps=3", "train.refine_clips=16", "model.scene_dim=2", "model.distance_dim=2"]
PLANNED = ["data.cache_mb=0", "planning.candidates=8", "planning.planner.elites=4", "planning.horizon=3"]
CASES = {
    "fresh": [*FRESH, "objective.name=byol", "model.latent.prior_components=2"],
    "videos, refined": ["objectives.yaml", *REFINED, "objective.name=jepa"],
    "steps": [
        "objectives.yaml",
        *STEPS,
        "objective.name=vicreg",
        "model.embedding_norm=standard",
        "model.encoder.pooling=moments",
    ],
    "parts": [*FRESH, "objective.name=sigreg", "train.grad_accumulation=2", "train.clip_norm=0.1"],
    "white, sparse": [*FRESH, "objective.name=infonce", "model.embedding_norm=white", "model.latent=sparse"],
    "low rank": [*FRESH, "objective.name=ssl_hsic", "model.editor=low_rank"],
    "oracle": [
        "causal/heteroscedastic.yaml",
        "data.source=causal",
        "objective.name=hinfonce",
        "model.latent=oracle",
        "model.latent.dim=6",
    ],
    "transformer": [
        *FRESH,
        "objective.name=ressl",
        "model.encoder=vit_tiny",
        "model.encoder.patch_px=16",
    ],
    "residual network, flow": [*FRESH, "objective.name=aninfonce", "model.encoder=resnet", "model.latent.prior=flow"],
    "actions": ["two_rooms_random.yaml", *PLANNED, *REFINED, "train.refine_horizon=4"],
}
SLOW = ("parts", "transformer", "white, sparse", "low rank", "oracle", "residual network, flow")
TIMES = ("_s", "tflops", "mfu")


@pytest.fixture(scope="module")
def cases(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The config of each, and its overrides."""
    rooms = recording(tmp_path_factory.mktemp("rooms") / "rooms", 16)
    roots = {name: rooms if name == "actions" else world for name in CASES}
    return {name: [path, *SMALL, f"data.root={roots[name]}", *of] for name, (path, *of) in CASES.items()}


def done(folder: Path, jobs: dict[str, Any]) -> dict[str, Any]:
    """What pretend_gpu.py says of jobs."""
    (folder / "jobs.json").write_text(json.dumps({"train": {}, "scripts": []} | jobs))
    process = run_python(
        *("-m", "tests.worldmodel.pretend_gpu", str(folder / "jobs.json"), str(folder / "done.json")),
        timeout_s=600,
        ACCELERATE_USE_CPU="false",  # Accelerate would object to another device
    )
    assert process.returncode == 0, process.stderr[-9000:]
    return json.loads((folder / "done.json").read_text()) | {"stderr": process.stderr}


@pytest.fixture(scope="module")
def on_gpu(cases: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs of the quick cases, and what became of the jobs."""
    folder = tmp_path_factory.mktemp("on_gpu")
    return folder, trained(folder, {name: of for name, of in cases.items() if name not in SLOW})


@pytest.fixture(scope="module")
def more_on_gpu(cases: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the slow cases."""
    return trained(tmp_path_factory.mktemp("more_on_gpu"), {name: cases[name] for name in SLOW})


def trained(folder: Path, cases: dict[str, list[str]]) -> dict[str, Any]:
    """Train cases in a folder, and return the results of pretend_gpu.py."""
    return done(
        folder, {"train": {name: (path, [*of, f"run_dir={folder / name}"]) for name, (path, *of) in cases.items()}}
    )


@pytest.mark.parametrize("case", [name for name in CASES if name not in SLOW])
def test_no_step_waits_for_a_gpu(case: str, on_gpu: tuple[Path, dict[str, Any]]) -> None:
    assert on_gpu[1]["waits"][case] == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_no_step_of_the_other_parts_waits_for_a_gpu(case: str, more_on_gpu: dict[str, Any]) -> None:
    assert more_on_gpu["waits"][case] == {}


def test_all_objectives_are_among_them(cases: dict[str, list[str]]) -> None:
    named = [load_config(REPO / "configs" / path, overrides).objective.name for path, *overrides in cases.values()]
    assert set(named) == set(choices("objective"))


def test_waits_and_mixtures_are_seen(on_gpu: tuple[Path, dict[str, Any]]) -> None:
    assert on_gpu[1]["refuses"]
    found = on_gpu[1]["planted"]
    assert len(found) > 5 and found == {what: 0 if what.startswith("nothing") else 1 for what in found}


@pytest.mark.parametrize("case", ["fresh", "videos, refined", "actions"])
def test_a_gpu_computes_what_the_processor_does(
    case: str,
    on_gpu: tuple[Path, dict[str, Any]],
    cases: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the batch norm of a GPU: that of a CPU is more exact for few channels."""
    monkeypatch.setattr(batch_norm, "pixels_per_group", lambda values: 1)
    path, *overrides = cases[case]
    train(load_config(REPO / "configs" / path, [*overrides, f"run_dir={tmp_path}/run"]))
    for split in ("train", "selection", "refinement"):
        for there, here in zip(rows(on_gpu[0] / case, split), rows(tmp_path / "run", split), strict=True):
            same = [name for name, value in here.items() if isinstance(value, float) and not name.endswith(TIMES)]
            assert {name: there[name] for name in same} == pytest.approx({name: here[name] for name in same}, rel=1e-4)


@pytest.mark.slow
def test_scripts_run_on_a_gpu(on_gpu: tuple[Path, dict[str, Any]], long_video: Path, tmp_path: Path) -> None:
    run, planner = (["--run", str(on_gpu[0] / name)] for name in ("videos, refined", "actions"))
    video = ["--video", str(long_video)]
    scripts = [
        ["evaluate.py", *run],
        ["rollout.py", *run, *video, "--horizon", "2", "--num-samples", "4", "--out", str(tmp_path / "futures.npz")],
        ["surprise.py", *run, *video, "--out", str(tmp_path / "surprise.json")],
        ["plan.py", *planner, "--env", ENV, "--seeds", "1", "--episodes", "2", "--budget", "2"],
    ]
    found = done(tmp_path, {"scripts": scripts})
    assert found["exit_codes"] == [0, 0, 0, 0], found["stderr"][-9000:]
