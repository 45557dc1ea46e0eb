import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY, normal, run_processes
from tests.worldmodel import training_jobs
from tests.worldmodel.training.test_loop import AUGMENTED, rows
from worldmodel.config import TeacherObjective, choices, load_config
from worldmodel.nets.parallel import all_gather, global_batch, multinomial_rows, num_clips, randn_rows
from worldmodel.runs.checkpoint import load_checkpoint
from worldmodel.training.batch_norm import BatchNorm, replace_batch_norm
from worldmodel.training.launch import check_launch_environment
from worldmodel.training.loop import train

CAUSAL = [
    "causal/heteroscedastic.yaml",
    "data.source=causal",
    "data.batch_size=64",
    "model.latent.dim=4",
    "model.embedding_norm=sphere",
]
WHITE = ["model.embedding_norm=white", "model.embedding_dim=6"]
STEPS = ["data.num_segments=2", "data.num_frames=1", "objective.rollout_steps=2"]
TERMS = ["objective.smoothness_weight=1", "objective.time_variance_weight=1"]
VIT = ["objectives.yaml", "data.size_px=32", "model.encoder=vit_tiny", "model.encoder.patch_px=16"]
CASES: dict[str, list[str]] = {
    **{name: [*CAUSAL, f"objective.name={name}"] for name in choices("objective")},
    "infonce_white_sparse_double": [*CAUSAL, "objective.name=infonce", *WHITE, "model.latent=sparse"],
    "jepa_mixture": [
        *CAUSAL,
        "objective.name=jepa",
        "model.embedding_norm=standard",
        "model.latent.prior_components=3",
    ],
    "sigreg_in_parts": [*CAUSAL, "objective.name=sigreg", "train.grad_accumulation=2"],
    "hinfonce_in_parts": [*CAUSAL, "objective.name=hinfonce", "train.grad_accumulation=3"],
    "byol_in_parts": [*CAUSAL, "objective.name=byol", "train.grad_accumulation=2", "train.clip_norm=0.1"],
    "byol_video_double": ["objectives.yaml"],
    "byol_augmented_double": ["objectives.yaml", *AUGMENTED],
    "vicreg_video_double": [
        "objectives.yaml",
        "objective.name=vicreg",
        "model.embedding_norm=standard",
        *STEPS,
        *TERMS,
    ],
    "vicreg_deviation_double": [
        "objectives.yaml",
        "model.encoder=deviation",
        "model.projector_layers=0",
        "objective.name=vicreg",
        *WHITE,
        "model.latent={name: gaussian, dim: 6, prior: linear}",
        "model.editor=linear",
    ],
    "byol_objects_in_parts_double": [
        "objectives.yaml",
        "model.encoder={name: objects, num_objects: 4, width: 0.25}",
        "train.grad_accumulation=2",
    ],
    "byol_vit_double": [*VIT, "train.clip_norm=0.1", "model.encoder.checkpoint_activations=true"],
}
COMPARED_IN_PARTS = ("sigreg_in_parts", "hinfonce_in_parts")
IN_SHARDS = [name for name in CASES if name not in COMPARED_IN_PARTS]
"""Losses that compare clips take no parts there."""
QUICK_IN_SHARDS = ("byol", "infonce_white_sparse_double", "byol_in_parts", "vicreg_video_double", "byol_vit_double")
"""A teacher, whitening, parts with clipped gradients, rollouts of videos, a transformer. The others are slow."""


CPU = torch.device("cpu")
SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What Accelerate tells processes by configs/accelerate/fsdp.yaml."""


def launch(num_processes: int, *arguments: str, shards: bool = False) -> None:
    """tests/worldmodel/training_jobs.py in so many processes."""
    environment = SHARDS if shards else None
    run_processes(num_processes, "-m", "tests.worldmodel.training_jobs", *arguments, environment=environment)


@pytest.fixture(scope="module")
def cases(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The config of each case, and its overrides."""
    shared = [*TINY, f"data.root={world}", f"run_dir={tmp_path_factory.mktemp('run')}", "objective.ema_momentum=0.9"]
    return {name: [path, *shared, *overrides] for name, (path, *overrides) in CASES.items()}


@pytest.fixture(scope="module")
def by_one(cases: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of two updates of each case by one process."""
    folder = tmp_path_factory.mktemp("one")
    AcceleratorState._reset_state(reset_partial_state=True)
    training_jobs.few_updates(folder, cases)
    return folder


@pytest.fixture(scope="module")
def by_two(cases: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those by two processes."""
    return updates_of_two(tmp_path_factory.mktemp("two"), cases)


@pytest.fixture(scope="module")
def in_shards(cases: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of QUICK_IN_SHARDS by two processes, with the weights in shards."""
    quick = {name: cases[name] for name in QUICK_IN_SHARDS}
    return updates_of_two(tmp_path_factory.mktemp("shards"), quick, shards=True)


@pytest.fixture(scope="module")
def more_in_shards(cases: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the other cases of IN_SHARDS."""
    others = {name: cases[name] for name in IN_SHARDS if name not in QUICK_IN_SHARDS}
    return updates_of_two(tmp_path_factory.mktemp("more_shards"), others, shards=True)


def updates_of_two(folder: Path, cases: dict[str, list[str]], *, shards: bool = False) -> Path:
    """Write the files of two updates of each case by two processes, and return their folder."""
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(2, "few_updates", str(folder), str(folder / "cases.json"), shards=shards)
    return folder


@pytest.mark.parametrize(
    ("by", "case"),
    [
        *(("by_two", case) for case in CASES),
        *(("in_shards", case) for case in QUICK_IN_SHARDS),
        *(
            pytest.param("more_in_shards", case, marks=pytest.mark.slow)
            for case in IN_SHARDS
            if case not in QUICK_IN_SHARDS
        ),
    ],
)
def test_two_processes_compute_the_losses_and_gradients_of_one(
    by: str, case: str, by_one: Path, request: pytest.FixtureRequest
) -> None:
    kind = next(kind for name, kind in choices("objective").items() if case.startswith(name))
    one, two = (load_file(folder / f"{case}.safetensors") for folder in (by_one, request.getfixturevalue(by)))
    assert one.keys() == two.keys()
    assert any(name.startswith("gradient/") for name in one)
    assert any(name.startswith("teacher/") for name in one) == issubclass(kind, TeacherObjective)
    for name, value in one.items():
        differ = f"{name} differs by {(two[name] - value).abs().max()}"
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-5, msg=differ)


SCORED: dict[str, list[str]] = {
    "videos": ["model.latent.prior_components=3", "evaluation.selection_clips=25", "evaluation.fit_clips=51"],
    "fresh": ["data.source=moving_mnist", "evaluation.selection_clips=131", "evaluation.fit_clips=2"],
    "refined": ["model.scene_dim=2", "train.refine_steps=2", "train.refine_clips=48", "evaluation.selection_clips=5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_two_processes_share_an_evaluation_and_score_as_one(shards: bool, world: Path, tmp_path: Path) -> None:
    cases = {name: ["objectives.yaml", *TINY, f"data.root={world}", *of_case] for name, of_case in SCORED.items()}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    training_jobs.evaluate(tmp_path / "one", cases)
    launch(2, "evaluate", str(tmp_path / "two"), str(tmp_path / "cases.json"), shards=shards)
    for name in cases:
        whole = json.loads((tmp_path / "one" / f"{name}_0.json").read_text())
        shares = [json.loads((tmp_path / "two" / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]
        assert all(share["best"] == whole["best"] for share in shares)
        for clips, *parts in zip(whole["readings"], *(share["readings"] for share in shares), strict=True):
            assert parts[0] + parts[1] == clips
            assert abs(len(parts[0]) - len(parts[1])) <= 1
        scores, of_two = (rows(tmp_path / size / name, "selection") for size in ("one", "two"))
        assert len(scores) == (1 if name == "refined" else 2)
        for row, of_both in zip(scores, of_two, strict=True):
            assert row.pop("split") == of_both.pop("split")
            assert of_both == pytest.approx(row, rel=1e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_continues_with_one_and_with_four(tmp_path: Path) -> None:
    """Stopped after step 3 of 6 by a signal to the last process: the same clips and losses as without a stop."""

    def overrides(name: str) -> list[str]:
        path, *of_case = CASES["jepa_mixture"]
        return [path, *TINY, f"run_dir={tmp_path / name}", *of_case, "evaluation.queries=64"]

    def clips(name: str) -> list[list[int]]:
        """Of each step, over all processes."""
        parts = [json.loads(path.read_text()) for path in (tmp_path / name).glob("clips_*.json")]
        return [sorted(clip for part in parts for clip in part[step]) for step in parts[0]]

    launch(1, "run_until", str(tmp_path / "seen"), "6", "anew", *overrides("whole"))
    launch(2, "run_until", str(tmp_path / "seen_half"), "3", "anew", *overrides("half"))
    whole, seen = rows(tmp_path / "whole"), clips("seen")
    assert clips("seen_half") == seen[:3]
    for num_processes in (1, 4):
        name = f"rest_{num_processes}"
        shutil.copytree(tmp_path / "half", tmp_path / name)
        launch(num_processes, "run_until", str(tmp_path / f"seen_{name}"), "6", "resume", *overrides(name))
        assert clips(f"seen_{name}") == seen[3:]
        losses = [row["loss"] for row in rows(tmp_path / name)]
        assert losses == pytest.approx([row["loss"] for row in whole], abs=1e-4)


@pytest.mark.slow
def test_checkpoints_do_not_depend_on_sharding(tmp_path: Path) -> None:
    """Stopped after steps 2 and 4 of 6 by a signal to the last process, at first although no row is due. It continues
    with the other sharding each time; the losses are those of one process."""
    path, *of_case = CASES["jepa_mixture"]
    overrides = [*TINY, *of_case, "evaluation.queries=64", "train.checkpoint_every=1000"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(load_config(REPO / "configs" / path, [*overrides, f"run_dir={whole}"]))
    expected = load_checkpoint(whole)
    assert expected is not None
    for stop, how, shards, rows_every in ((2, "anew", True, 1000), (4, "resume", False, 1), (6, "resume", True, 1)):
        seen = tmp_path / f"seen_{stop}"
        arguments = [str(seen), str(stop), how, path, *overrides, f"run_dir={run}", f"train.log_every={rows_every}"]
        launch(2, "run_until", *arguments, shards=shards)
        assert [len(json.loads(clips.read_text())) for clips in seen.iterdir()] == [2, 2]
        found = load_checkpoint(run)
        assert found is not None and found.state["step"] == stop
        for part in ("model", "teacher", "optimizer"):
            one, two = ({key: value.shape for key, value in getattr(of, part).items()} for of in (expected, found))
            assert one == two
    losses = [row["loss"] for row in rows(run)]
    assert losses == pytest.approx([row["loss"] for row in rows(whole)][2:], abs=1e-4)


def test_by_one_process_a_batch_is_its_own() -> None:
    values = normal(0, 4, 3)
    assert num_clips(4) == 4 and all_gather(values) is values
    with global_batch(torch.arange(4), 4):
        assert num_clips(4) == 4 and all_gather(values) is values
        plain, ours = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
        replace_batch_norm(ours, CPU)
        assert isinstance(ours[0], BatchNorm)
        assert torch.equal(ours(values), plain(values))
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))


def test_random_numbers_go_with_the_place_in_the_global_batch() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    whole = randn_rows(torch.empty(6, 2), generator())
    rows_of_one = torch.tensor([1, 4])
    with global_batch(rows_of_one, 6):
        assert torch.equal(randn_rows(torch.empty(2, 2), generator()), whole[rows_of_one])
    assert torch.equal(whole, torch.randn(6, 2, generator=generator()))
    weights = normal(1, 6, 3).exp()
    chosen = multinomial_rows(weights, generator())
    assert torch.equal(chosen, torch.multinomial(weights, 1, generator=generator()))
    with global_batch(rows_of_one, 6):
        assert torch.equal(multinomial_rows(weights[rows_of_one], generator()), chosen[rows_of_one])


def test_a_batch_that_hardly_has_clips_is_refused() -> None:
    with pytest.raises(UserError, match="too few clips"), global_batch(torch.tensor([0]), 8):
        pass


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' is not a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number of at least 1"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x' is not"),
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"LOCAL_RANK": "-2"}, "LOCAL_RANK='-2' is not a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, but WORLD_SIZE=2: RANK must be less"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but not RANK: start the processes with accelerate launch"),
        ({"WORLD_SIZE": "2", "RANK": "0", "OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS='many' is not"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x' is not"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU='maybe' must be true or false"),
    ],
)
def test_a_launchers_variables_are_checked(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert check_launch_environment() == 1
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as line:
        check_launch_environment()
    assert says in str(line.value) and "\n" not in str(line.value)


def test_what_launchers_set_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    for name, value in (launched | {"MASTER_ADDR": "host", "ACCELERATE_USE_CPU": "True"}).items():
        monkeypatch.setenv(name, value)
    assert check_launch_environment() == 4
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "-1")
    assert check_launch_environment() == 1
