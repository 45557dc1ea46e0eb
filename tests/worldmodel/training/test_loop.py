import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils
import numpy as np
import pytest
import torch
from accelerate.state import is_initialized
from safetensors.torch import load_file, save_file

from data_pipelines.errors import UserError
from data_pipelines.splits import SPLITS
from data_pipelines.transforms import split_segments, to_float
from data_pipelines.worlds.written import encode_h264
from tests.conftest import REPO, run_here, run_processes, run_script, script_environment
from worldmodel import load
from worldmodel.config import Config
from worldmodel.data import TrainingInputs
from worldmodel.nets.teacher import Teacher
from worldmodel.runs.checkpoint import load_checkpoint
from worldmodel.runs.opening import load_run_config
from worldmodel.sources import make_source
from worldmodel.training import step_log, timing
from worldmodel.training.launch import compile_mode, make_accelerator
from worldmodel.training.loop import train
from worldmodel.training.losses import TrainingModel
from worldmodel.training.session import Interrupted
from worldmodel.training.trainer import set_seeds

AUGMENTED = [
    "data.channels=3",  # the law of the tiny world holds for one channel, and augmentation is refused with it
    "data.augment={crop_min_scale: 0.6, flip: both, brightness: 0.3, contrast: 0.3, saturation: 0.3, hue: 0.1}",
    "data.augment.blur=1",
    "data.augment.noise=0.1",
]
REFINED = ["train.refine_steps=2", "train.refine_clips=12"]
TIMING = ("clips_per_s", "data_s", "forward_s", "backward_s", "optimiser_s", "step_s", "tflops", "mfu")
DEMO = ["--config", str(REPO / "configs" / "objectives.yaml")]


def rows(run: Path, split: str = "train") -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / json.loads((run / "checkpoints" / "index.json").read_text())["latest"]
    return {
        f"{part}/{name}": tensor
        for part in ("model", "teacher", "optimizer")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = final_tensors(a), final_tensors(b)
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"{len(differing)} of {len(one)} tensors differ, such as {differing[0]}"


def test_a_run_is_not_resumed_and_overwritten(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("of a run")
    with pytest.raises(UserError, match="either resumed or overwritten"):
        train(tiny_config(), resume=True, overwrite=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "of a run"


@pytest.mark.parametrize(
    ("label", "tells"),
    [("nope", "is not a per-frame label: these videos have position"), ("speed", "is not a per-frame label"),
     ("wide", "has 1,025 numbers per frame: at most 1,024 are forecast")],
)  # fmt: skip
def test_a_label_that_cannot_be_forecast_is_reported_before_training(
    label: str, tells: str, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    for split in SPLITS:
        (tmp_path / "videos" / split).mkdir(parents=True)
        fields = {"speed": 1.0, "position": [[0.0, 1.0]] * 18, "wide": [[0.5] * 1025] * 18}
        lines = []
        for number in range(4):
            encode_h264(tmp_path / "videos" / split / f"{number}.mp4", np.full((18, 64, 64), number, np.uint8))
            lines.append(json.dumps({"file_name": f"{number}.mp4", **fields}) + "\n")
        (tmp_path / "videos" / split / "metadata.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=tells):
        train(tiny_config(f"data.root={tmp_path / 'videos'}", f"evaluation.label={label}"))
    assert not (tmp_path / "run").exists()


def test_seeds_of_more_than_32_bits() -> None:
    set_seeds(10**18)
    assert torch.initial_seed() == 10**18
    drawn = [torch.rand(1), random.random()]
    set_seeds(10**18)
    assert [torch.rand(1), random.random()] == drawn
    accelerate.utils.set_seed(7)
    drawn = [torch.rand(1), random.random(), np.random.rand()]
    set_seeds(7)
    assert [torch.rand(1), random.random(), np.random.rand()] == drawn


def test_beta_warms_up(tiny_config: Callable[..., Config]) -> None:
    """A row has the beta of the step that it ends."""
    run = train(tiny_config("objective.beta=0.2", "objective.beta_warmup_steps=4"))
    assert [row["beta"] for row in rows(run)] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.2])


def test_a_run_logs_evaluates_and_saves(tiny_config: Callable[..., Config]) -> None:
    run = train(tiny_config())
    logged = rows(run)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    for row in logged:
        assert row["loss"] == pytest.approx(row["prediction_loss"] + row["beta"] * row["kl_nats"], rel=1e-5)
        assert 1 <= row["effective_rank"] <= 16 and row["embedding_std"] > 0 and row["alignment"] <= 1
        assert min(row[name] for name in TIMING) > 0
        assert sum(row[f"{part}_s"] for part in ("data", "forward", "backward", "optimiser")) <= row["step_s"]
    (evaluation,) = rows(run, "selection")
    assert evaluation["step"] == 6 and math.isfinite(evaluation["relative_energy_score"])
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_00000004", "step_00000006"}
    # All that a resumed stream needs is in here: the number of the next batch, and a fingerprint of the data.
    assert (run / "checkpoints" / "step_00000006" / "state.json").stat().st_size < 300


def test_each_segment_goes_where_it_belongs(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is given all segments, the teacher x+."""
    config = tiny_config("train.steps=1")
    stream = make_source(config).training_stream(1, rank=0, world_size=1, device=torch.device("cpu"))
    batches = stream.batches()
    expected = split_segments(to_float(next(batches)["video"]), 3)
    batches.close()
    seen: dict[str, torch.Tensor] = {}
    forward, teach = TrainingModel.forward, Teacher.forward

    def model_spy(self: TrainingModel, inputs: TrainingInputs, *rest: Any, **named: Any) -> Any:
        seen["segments"] = inputs.segments.clone()
        return forward(self, inputs, *rest, **named)

    def teacher_spy(self: Teacher, video: torch.Tensor) -> torch.Tensor:
        seen.setdefault("target", video.clone())  # evaluation comes after
        return teach(self, video)

    monkeypatch.setattr(TrainingModel, "forward", model_spy)
    monkeypatch.setattr(Teacher, "forward", teacher_spy)
    train(config)
    assert torch.equal(seen["segments"], expected)
    assert torch.equal(seen["target"], expected[:, 1])


@pytest.mark.parametrize(("latent", "shown"), [("gaussian", "kl"), ("sparse", "l0"), ("none", None)])
def test_the_progress_bar_shows_the_penalty_that_there_is(
    latent: str, shown: str | None, tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(f"model.latent={latent}", "train.steps=1"))
    assert re.findall(r"(\w+)=-?\d+\.\d+", capsys.readouterr().err)[-2:] == ([shown, "loss"] if shown else ["loss"])


def test_training_lowers_the_loss(tiny_config: Callable[..., Config]) -> None:
    longer = ("train.steps=60", "train.checkpoint_every=60", "train.eval_every=60")
    run = train(tiny_config(*longer, "train.lr=3e-3", "objective.ema_momentum=0.9"))
    losses = [row["loss"] for row in rows(run)]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.encoder=resnet", "data.size_px=96", "data.channels=3"],
        pytest.param(["data.num_segments=2", "data.num_frames=1"], marks=pytest.mark.slow),
        ["data.num_segments=2", "data.num_frames=1", "model.latent=none"],
        pytest.param(["train.precision=bf16"], marks=pytest.mark.slow),
        ["model.latent.prior_components=3"],
        ["data.decoder=decord"],
        ["train.clip_norm=0.1", "objective.ema_schedule=cosine", "objective.beta_warmup_steps=2"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_other_settings_train_evaluate_and_load(
    tiny_config: Callable[..., Config], overrides: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = train(tiny_config("train.steps=2", "train.eval_every=2", *overrides))
    assert caplog.text.count("is meant for frames of 128 px and more") == ("model.encoder=resnet" in overrides)
    assert all(math.isfinite(row["loss"]) for row in rows(run))
    trained = load(run)
    data = trained.config.data
    clip = torch.rand(2, data.num_frames, data.channels, data.size_px, data.size_px)
    assert trained.model.rollout(clip, 3, 4).shape == (2, 4, 3, 16)


@pytest.mark.parametrize(
    "changes", [pytest.param([], id="plain"), pytest.param(AUGMENTED, id="augmented", marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_bit_for_bit(changes: list[str], tiny_overrides: list[str], tmp_path: Path) -> None:
    """SIGKILL at a random step, resumed in a fresh process, across the end of epochs (4 batches each)."""
    steps = ["train.steps=18", "train.checkpoint_every=3", "train.eval_every=9", "data.num_workers=1", *changes]
    whole = [*DEMO, *tiny_overrides, *steps, f"run_dir={tmp_path / 'whole'}"]
    assert run_here("train.py", *whole).returncode == 0
    killed = [*DEMO, *tiny_overrides, *steps, f"run_dir={tmp_path / 'killed'}"]
    kill_at = random.Random(7).randint(4, 15)
    process = subprocess.Popen(
        [sys.executable, str(REPO / "scripts" / "train.py"), *killed],
        stderr=subprocess.DEVNULL,
        cwd=REPO,
        env=script_environment(),
        start_new_session=True,
    )
    try:
        wait_for_step(process, tmp_path / "killed", kill_at)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(rows(tmp_path / "killed")) < 18
    resumed = run_script("train.py", *killed, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    without_timing = [
        [{key: value for key, value in row.items() if key not in TIMING} for row in rows(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert without_timing[0] == without_timing[1]


@pytest.mark.slow
def test_a_profiled_run_learns_the_same(
    tiny_overrides: list[str], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    steps = ["train.steps=14", "train.eval_every=14"]
    profiled = tmp_path / "profiled"
    done = run_here("train.py", *DEMO, *tiny_overrides, *steps, f"run_dir={profiled}", "--profile")
    assert done.returncode == 0, done.stderr
    plain = train(tiny_config(*steps))
    assert_same_weights(profiled, plain)
    assert steps_in_trace(profiled) == [f"ProfilerStep#{step}" for step in range(7, 12)]
    lines = (profiled / "profile" / "table.txt").read_text().splitlines()
    assert "Self CPU" in lines[1] and len(lines) < 40
    assert {"aten::convolution_backward", "forward", "backward"} <= {line.split()[0] for line in lines if line}
    assert not (plain / "profile").exists()


def test_no_step_is_timed_with_the_measurement_of_the_peak(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that advances by one each time it is read, and by a thousand while the peak is measured."""
    now_s = [0.0]

    def advance(by_s: float) -> float:
        now_s[0] += by_s
        return now_s[0]

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: advance(1.0)))
    monkeypatch.setattr(step_log, "peak_flops_per_s", lambda *_: advance(1000.0))
    run = train(tiny_config("train.steps=2"))
    assert now_s[0] > 1000 and all(row["step_s"] < 100 and row["mfu"] > 0 for row in rows(run))


@pytest.mark.slow
def test_a_short_run_is_profiled_whole(tiny_config: Callable[..., Config]) -> None:
    run = train(tiny_config("train.steps=2", "train.eval_every=2"), profile=True)
    assert steps_in_trace(run) == ["ProfilerStep#0", "ProfilerStep#1"]


def steps_in_trace(run: Path) -> list[str]:
    trace = json.loads(gzip.decompress((run / "profile" / "trace.json.gz").read_bytes()))
    assert {"data", "forward", "backward", "optimiser"} <= {event["name"] for event in trace["traceEvents"]}
    return sorted(
        (event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")),
        key=lambda name: int(name.partition("#")[2]),
    )


def wait_for_step(process: "subprocess.Popen[bytes]", run: Path, step: int) -> None:
    while process.poll() is None:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"training ended with exit code {process.returncode} before step {step}")


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signals_save_a_checkpoint_and_set_the_exit_code(
    tiny_overrides: list[str], tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    overrides = [
        *tiny_overrides,
        "train.steps=100000",
        "train.checkpoint_every=100000",
        "train.eval_every=100000",
    ]
    process = subprocess.Popen(
        [sys.executable, str(REPO / "scripts" / "train.py"), *DEMO, *overrides, "data.num_workers=1"],
        stderr=subprocess.PIPE,
        cwd=REPO,
        env=script_environment(),
        text=True,
        start_new_session=True,
    )
    wait_for_step(process, tmp_path / "run", 3)  # type: ignore[arg-type]
    os.killpg(process.pid, number)  # as Ctrl-C and batch systems do it: the decoding processes get it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code, stderr
    assert "Traceback" not in stderr and f"stopped by {number.name}; continue with --resume" in stderr
    index = json.loads((tmp_path / "run" / "checkpoints" / "index.json").read_text())
    assert index["latest"] is not None


@pytest.mark.parametrize(
    ("objective", "precision"), [("byol", "fp32"), pytest.param("infonce", "bf16", marks=pytest.mark.slow)]
)
def test_two_processes_log_once_and_agree(
    objective: str, precision: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    script = [str(REPO / "scripts" / "train.py"), *DEMO, *tiny_overrides, *REFINED]
    changes = f"objective.name={objective}", f"train.precision={precision}"
    printed = run_processes(2, *script, *changes, timeout_s=180)
    assert printed.count(f"2 processes on cpu, {precision}") == 1
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(tmp_path / "run", "refinement")] == [7, 8]


def test_resuming_on_other_videos_is_refused(tiny_config: Callable[..., Config], world: Path) -> None:
    train(tiny_config())
    extra = world / "train" / "zz_extra.mp4"
    extra.write_bytes((world / "train" / "000000.mp4").read_bytes())
    try:
        with pytest.raises(UserError, match="have changed since its checkpoint"):
            train(tiny_config(), resume=True)
    finally:
        extra.unlink()


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("model", {"editor.net.0.weight": torch.zeros(32, 3)}),
        ("model", {"editor.net.0.weight": None}),
        ("model", {"editor.of_an_earlier_version": torch.zeros(2)}),
        ("teacher", {"embedder.encoder.layers.0.weight": torch.zeros(1)}),
        ("optimizer", {"editor.net.0.weight/exp_avg": torch.zeros(1)}),
        ("optimizer", {"editor.net.0.weight/exp_avg_sq": torch.zeros(())}),
        ("optimizer", {"editor.net.0.weight/step": torch.zeros(2)}),
        ("optimizer", {"editor.of_an_earlier_version/exp_avg": torch.zeros(2)}),
    ],
)
def test_a_checkpoint_of_other_networks_is_one_line(
    part: str, changes: dict[str, torch.Tensor | None], trained_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    path = next((run / "checkpoints").glob(f"step_00000006/{part}.safetensors"))
    changed = load_file(path) | changes
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    [name] = changes
    message = rf"does not fit its config\.yaml: it holds .* for {name}, not "
    with pytest.raises(UserError, match=message):
        train(replace(load_run_config(run), run_dir=str(run)), resume=True)
    if part != "optimizer":
        with pytest.raises(UserError, match=message):
            load(run)


def test_training_twice_in_one_process_changes_nothing_of_it(tiny_config: Callable[..., Config]) -> None:
    """Neither handlers nor threads, filters or variables: a notebook can train, and again in another precision."""

    def effects() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        return [handlers, torch.get_num_threads(), list(warnings.filters), cores, dict(os.environ)]

    before = effects()
    runs: list[Path] = []
    for precision in ("bf16", "fp32", "fp32"):
        name = f"run_dir={tiny_config().run_dir}_{len(runs)}"
        runs.append(train(tiny_config("train.num_threads=2", f"train.precision={precision}", "train.steps=2", name)))
        assert not is_initialized(), "Accelerate's state is left"
    assert effects() == before
    assert_same_weights(*runs[1:])


def test_training_uses_an_accelerator_that_is_there(tiny_config: Callable[..., Config]) -> None:
    accelerator = make_accelerator("fp32", timeout_s=60.0)
    train(tiny_config("train.steps=1"))
    assert is_initialized() and accelerator.device.type == "cpu"


def test_only_the_first_session_counts_operations(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting is eager. If a compiled encoder counted again after a resume, the run would differ from a whole one."""
    config = tiny_config("train.steps=4")
    asked = iter([0, 0])
    with pytest.raises(Interrupted):
        train(config, stop=lambda: next(asked, signal.SIGTERM))
    before = load_checkpoint(Path(config.run_dir))
    assert before is not None and 0 < before.state["step"] < 4 and before.state["step_flops"] > 0
    monkeypatch.delattr("worldmodel.training.step_log.FlopCounter")
    after = load_checkpoint(train(config, resume=True))
    assert after is not None and after.state["step_flops"] == before.state["step_flops"]


def test_what_is_compiled(tiny_config: Callable[..., Config]) -> None:
    accelerator = make_accelerator("fp32", timeout_s=60.0)
    modes = {name: compile_mode(name, accelerator) for name in ("auto", "none")}
    assert modes == {"auto": None, "none": None}
    assert compile_mode("max-autotune", accelerator) == "max-autotune"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_learns_the_same(tiny_config: Callable[..., Config]) -> None:
    plain = train(tiny_config("train.steps=2"))
    losses = [row["loss"] for row in rows(plain)]
    compiled = train(tiny_config("train.steps=2", "train.compile=default", f"run_dir={plain}_compiled"))
    assert [row["loss"] for row in rows(compiled)] == pytest.approx(losses, abs=1e-2)
    assert final_tensors(compiled).keys() == final_tensors(plain).keys()
