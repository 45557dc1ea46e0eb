"""Several processes as they are really started: by `accelerate launch`, on one host and on two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from data_pipelines.errors import UserError
from tests.conftest import REPO, TINY, script_environment
from tests.worldmodel.training.test_loop import assert_same_weights, rows
from worldmodel.commands import process as process_module
from worldmodel.commands.process import stop_signals
from worldmodel.config import Config
from worldmodel.runs.checkpoint import checkpoint_name
from worldmodel.runs.tracking import RowLostError, Tracker
from worldmodel.training.launch import ConnectionLostError, backend_message
from worldmodel.training.loop import train
from worldmodel.training.machine import child_processes
from worldmodel.training.session import Session
from worldmodel.training.trainer import Trainer

LAUNCH_CONFIGS = REPO / "configs" / "accelerate"
MAIN_PROCESS = ["--main_process_ip", "10.77.0.1", "--main_process_port", "29500"]
LINK_TIMEOUT_S = 8


def launch_command(*options: str, overrides: list[str]) -> list[str]:
    """accelerate launch, of two processes that train on fresh clips into ./run."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    script = [str(REPO / "scripts" / "train.py"), "--config", str(REPO / "configs" / "objectives.yaml")]
    config = [*TINY, "data.source=moving_mnist", "train.eval_every=100000", "train.checkpoint_every=100000"]
    launcher = ["--config_file", str(LAUNCH_CONFIGS / "cpu2.yaml"), *options]
    return [*accelerate, *launcher, *script, *config, "run_dir=run", *overrides]


@contextmanager
def started(command: list[str], folder: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """The command in a folder, its output in output.txt there; nothing of it is left over."""
    folder.mkdir(exist_ok=True)
    # A file takes any amount of output; a pipe that nobody reads would stop the training.
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**script_environment(), "ACCELERATE_USE_CPU": "false", **environment},
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_to_end(command: list[str], folder: Path) -> str:
    with started(command, folder) as process:
        process.wait(timeout=180)
    output = (folder / "output.txt").read_text()
    assert process.returncode == 0, output[-3000:]
    return output


def wait_for_step(process: "subprocess.Popen[str]", run: Path, step: int, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline_s:
        rows = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
        if rows and json.loads(rows[-1])["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {(run.parent / 'output.txt').read_text()[-3000:]}")


def latest_step(run: Path) -> int:
    name = json.loads((run / "checkpoints" / "index.json").read_text())["latest"]
    return int(name.removeprefix("step_"))


@pytest.mark.parametrize(
    ("name", "num_machines", "num_processes"),
    [("cpu2", 1, 2), ("1gpu", 1, 1), ("8gpu", 1, 8), ("fsdp", 1, 8), ("2x8gpu", 2, 16)],
)
def test_accelerate_reads_its_config(name: str, num_machines: int, num_processes: int) -> None:
    config = load_config_from_file(str(LAUNCH_CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (num_machines, num_processes)
    assert config.mixed_precision is None, "train.precision chooses it"


def test_these_are_all_configs_of_accelerate() -> None:
    assert {path.stem for path in LAUNCH_CONFIGS.iterdir()} == {"cpu2", "1gpu", "8gpu", "fsdp", "2x8gpu"}


def test_messages_of_backends_are_reported_in_one_line() -> None:
    gloo = "[/src/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3344. This is\nlong"
    assert backend_message(RuntimeError(gloo)) == "Connection closed by peer [10.0.0.2]:3344"


def test_the_echo_of_a_signal_is_not_a_second_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop() == signal.SIGTERM
        monkeypatch.setattr(process_module, "ECHO_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_other_engines_are_refused(tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match="Accelerate is set to DEEPSPEED, which is not supported"):
        train(tiny_config())


def test_half_precision_needs_a_gpu(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"train\.precision=fp16 needs a GPU: use auto, bf16 or fp32"):
        train(tiny_config("train.precision=fp16"))


@pytest.mark.parametrize(
    ("overrides", "tells"),
    [
        (["train.refine_steps=2", "train.refine_clips=8"], "apart from the encoder, nothing of this model is learned"),
        (["model.encoder=deviation", "model.projector_layers=null", "model.embedding_dim=36"], "nothing of this model"),
    ],
)
def test_a_model_without_weights_to_learn_is_refused(
    tiny_config: Callable[..., Config], overrides: list[str], tells: str
) -> None:
    plain = ["objective=vicreg", "model.latent=none", "model.editor=sum", "model.embedding_norm=standard"]
    with pytest.raises(UserError, match=tells):
        train(tiny_config(*plain, *overrides))


def test_fixed_features_are_forecast(tiny_config: Callable[..., Config]) -> None:
    """By an objective whose teacher then has nothing to follow."""
    fixed = ["model.encoder=deviation", "model.projector_layers=null", "model.embedding_dim=36"]
    assert train(tiny_config(*fixed, "objective=byol", "train.steps=2", "train.eval_every=2")).is_dir()


def test_a_step_whose_gradients_never_came_leaves_no_trace(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass of the fourth step has moved batch statistics when its gradients fail to come."""
    whole = train(tiny_config())
    config = tiny_config(f"run_dir={whole}_cut", "train.checkpoint_every=100")
    calls, backward = [], Accelerator.backward

    def cut(self: Accelerator, loss: torch.Tensor) -> None:
        calls.append(loss)
        if len(calls) == 4:
            raise RuntimeError("[/src/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms")
        backward(self, loss)

    with monkeypatch.context() as patches:
        patches.setattr(Accelerator, "backward", cut)
        patches.setattr(Trainer, "saves_alone", True)  # as it is where there are others to lose
        with pytest.raises(ConnectionLostError, match=r"another process at step 3 \(Timed out waiting 8000ms\), whose"):
            train(config)
    assert latest_step(Path(config.run_dir)) == 3
    train(config, resume=True)
    assert_same_weights(whole, Path(config.run_dir))


@pytest.mark.parametrize("cause", ["another process", "a row of losses", "a row of scores"])
def test_an_evaluation_that_an_error_prevented_is_made_up_for(
    cause: str, tiny_config: Callable[..., Config], trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the best checkpoint of a resumed run would be another, and the last weights would have no score."""
    config, step = tiny_config(), 6
    evaluate, log = Session.evaluate, Tracker.log

    def evaluated(self: Session) -> bool:
        if cause == "another process":
            raise RuntimeError("[/src/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        return evaluate(self)

    def logged(self: Tracker, split: str, at: int, values: dict[str, float]) -> None:
        if at == step and {"train": "a row of losses", "selection": "a row of scores"}[split] == cause:
            raise RowLostError("no space left")
        log(self, split, at, values)

    with monkeypatch.context() as patches:
        patches.setattr(Session, "evaluate", evaluated)
        patches.setattr(Tracker, "log", logged)
        patches.setattr(Trainer, "saves_alone", True)
        with pytest.raises((ConnectionLostError, RowLostError)):
            train(config)
    assert latest_step(Path(config.run_dir)) == step
    cut = train(config, resume=True)
    assert rows(cut, "selection") == rows(trained_run, "selection") and len(rows(cut, "selection")) == 1
    assert checkpoint_name(cut, "best") == checkpoint_name(trained_run, "best") == "step_00000006"
    assert_same_weights(trained_run, cut)


def test_other_errors_of_a_step_stay_what_they_are(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(self: Accelerator, loss: torch.Tensor) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(Accelerator, "backward", out_of_memory)
    with pytest.raises(RuntimeError, match="not enough memory"):
        train(tiny_config())


@pytest.mark.slow
def test_sigterm_to_the_launcher_or_to_all_processes_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Sent to all, as batch systems do it, the signal reaches training processes twice: the launcher passes it on."""
    steps = ["train.steps=60"]
    whole = run_to_end(launch_command(overrides=steps), tmp_path / "whole")
    assert whole.count("2 processes on cpu, fp32") == 1
    folder, resumed = tmp_path / "stopped", launch_command(overrides=[*steps, "--resume"])
    stops: list[int] = []
    for to_all in (False, True):
        with started(resumed, folder) as process:
            wait_for_step(process, folder / "run", (stops[-1] if stops else 0) + 5)
            for pid in [process.pid, *(child_processes(process.pid) if to_all else [])]:
                os.kill(pid, signal.SIGTERM)
            process.wait(timeout=60)
        output = (folder / "output.txt").read_text()
        assert process.returncode != 0 and "stopped by SIGTERM; continue with --resume" in output, output[-3000:]
        stops.append(latest_step(folder / "run"))
    assert 0 < stops[0] < stops[1] < 60
    assert f"resuming run at step {stops[1]}" in run_to_end(resumed, folder)
    assert_same_weights(tmp_path / "whole" / "run", folder / "run")


@pytest.mark.slow
def test_accelerates_fsdp_trains_in_shards(tmp_path: Path) -> None:
    options = ["--config_file", str(LAUNCH_CONFIGS / "fsdp.yaml"), "--num_processes", "2"]
    output = run_to_end(launch_command(*options, overrides=[]), tmp_path)
    assert "2 processes on cpu, fp32, 0.02 M parameters in shards" in output
    assert latest_step(tmp_path / "run") == 6


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(tmp_path: Path) -> None:
    """The second process takes another learning rate from a script that stands in for another command."""
    script = tmp_path / "other.py"
    script.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1': sys.argv.append('train.lr=0.5')\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = launch_command(overrides=["train.steps=2"])
    command.insert(command.index(str(REPO / "scripts" / "train.py")), str(script))
    with started(command, tmp_path / "a") as process:
        process.wait(timeout=120)
    output = (tmp_path / "a" / "output.txt").read_text()
    assert process.returncode != 0
    assert "error: process 1 has train.lr=0.5, the first has 0.002: start all processes with the same" in output
    assert "traceback : error: process 1 has" in output, "the launcher's summary names the cause"


# ------------------------------------------------------------------------------------------------------- two hosts


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable: their names, which their ends also have."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    hosts = [f"wm{os.getpid()}h{number}" for number in range(2)]
    try:
        try:
            for host in hosts:
                ip("netns", "add", host)
            cable = ["type", "veth", "peer", "name", hosts[1], "netns", hosts[1]]
            ip("link", "add", hosts[0], "netns", hosts[0], *cable)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for number, host in enumerate(hosts, start=1):
            ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", host)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", host, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


@contextmanager
def training_on(hosts: list[str], folders: list[Path], overrides: list[str]) -> Iterator[list["subprocess.Popen[str]"]]:
    """One training on both hosts, each with a folder of its own that the other does not look into."""
    with (
        started(host_command(hosts, 0, overrides), folders[0], GLOO_SOCKET_IFNAME=hosts[0]) as first,
        started(host_command(hosts, 1, overrides), folders[1], GLOO_SOCKET_IFNAME=hosts[1]) as second,
    ):
        yield [first, second]


def host_command(hosts: list[str], rank: int, overrides: list[str]) -> list[str]:
    options = ["--num_machines", "2", "--machine_rank", str(rank), *MAIN_PROCESS]
    return ["ip", "netns", "exec", hosts[rank], *launch_command(*options, overrides=overrides)]


@pytest.mark.slow
def test_two_hosts_train_one_model_and_survive_a_cut_link(two_hosts: list[str], tmp_path: Path) -> None:
    """Both ends report the lost connection in time, and the run continues bit for bit."""
    overrides = ["train.steps=120", "train.log_every=10", f"train.timeout_s={LINK_TIMEOUT_S}"]
    whole = [tmp_path / "whole0", tmp_path / "whole1"]
    with training_on(two_hosts, whole, overrides) as processes:
        assert [process.wait(timeout=180) for process in processes] == [0, 0]
    assert "2 processes on cpu" in (whole[0] / "output.txt").read_text()
    assert latest_step(whole[0] / "run") == 120 and not (whole[1] / "run").exists()

    cut = [tmp_path / "cut0", tmp_path / "cut1"]
    with training_on(two_hosts, cut, overrides) as processes:
        wait_for_step(processes[0], cut[0] / "run", 10)
        ip("-n", two_hosts[1], "link", "set", two_hosts[1], "down")
        cut_s = time.monotonic()
        assert all(process.wait(timeout=60) != 0 for process in processes)
        ended_s = time.monotonic() - cut_s
    assert ended_s < LINK_TIMEOUT_S + 20, "20 s for both launchers to end"
    line = re.compile(r"^error: lost the connection to another process at step \d+ \(.+\), .* --resume$", re.MULTILINE)
    for folder in cut:
        output = (folder / "output.txt").read_text()
        assert len(line.findall(output)) == 1, output[-3000:]
    assert 10 <= latest_step(cut[0] / "run") < 120

    ip("-n", two_hosts[1], "link", "set", two_hosts[1], "up")
    with training_on(two_hosts, cut, [*overrides, "--resume"]) as processes:
        assert [process.wait(timeout=180) for process in processes] == [0, 0]
    assert "resuming run at step" in (cut[0] / "output.txt").read_text()
    assert_same_weights(whole[0] / "run", cut[0] / "run")


# ----------------------------------------------------------------------------------------------------------- Slurm

STAND_INS = {
    "srun": 'echo $$ > srun.pid; export SLURM_NODEID=0; exec "$@"',
    "scancel": '[ "$*" = "--signal=TERM 7.0" ] && kill -TERM "$(cat srun.pid)"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued.txt; fi',
}


@pytest.mark.slow
def test_the_slurm_script_of_the_docs_saves_requeues_and_continues(tmp_path: Path) -> None:
    text = (REPO / "docs" / "multi_node.md").read_text(encoding="utf-8").partition("```bash\n")[2].partition("```")[0]
    words = " ".join(launch_command(overrides=["train.steps=40"]))
    settings = words.partition("configs/objectives.yaml ")[2]
    for stated, own in [
        ("accelerate launch", words.partition(" --config_file")[0]),
        ("configs/accelerate/2x8gpu.yaml", str(LAUNCH_CONFIGS / "cpu2.yaml")),
        ("scripts/train.py", str(REPO / "scripts" / "train.py")),
        ("configs/paper.yaml", f"{REPO / 'configs' / 'objectives.yaml'} {settings}"),
    ]:
        assert text.count(stated) == 1
        text = text.replace(stated, own)
    (tmp_path / "job.sh").write_text(text)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    slurm = {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    job = ["bash", str(tmp_path / "job.sh")]

    folder = tmp_path / "job"
    with started(job, folder, **slurm) as process:
        wait_for_step(process, folder / "run", 5)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    assert (folder / "requeued.txt").read_text() == "requeue 7\n"
    step = latest_step(folder / "run")
    assert 5 <= step < 40
    with started(job, folder, **slurm) as process:
        assert process.wait(timeout=120) == 0
    assert f"resuming run at step {step}" in (folder / "output.txt").read_text()
    assert latest_step(folder / "run") == 40 and (folder / "requeued.txt").read_text() == "requeue 7\n"
