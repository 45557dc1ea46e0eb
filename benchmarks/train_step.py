"""Compare a training step with a straightforward one: the same model in eager fp32 PyTorch (benchmarks/plain_step.py).

python benchmarks/train_step.py --config configs/paper.yaml --out train_step.json [key=value ...]

The two steps alternate, --steps times, on batches rendered beforehand. The medians are reported, with the time to
render a batch. Ours is the trainer's update on the device and in the precision of a training. The plain step runs in a
separate process, so that the two do not share a memory allocator. Losses are compared over --compare-steps updates
from the same weights, batches and noise: once with ours in fp32, once as timed. Defaults that differ from the config:
train.precision=auto, and data.mnist_dir=null, for digits that need no files.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from worldmodel.commands.exits import report_errors
from worldmodel.commands.process import keep_freed_memory, set_threads
from worldmodel.commands.shared import add_overrides, check_counts, check_out_file, write_result
from worldmodel.config import ByolConfig, Config, Conv3dConfig, GaussianConfig, flatten, load_config, to_dict
from worldmodel.sources import make_source
from worldmodel.training.launch import make_accelerator
from worldmodel.training.machine import machine_description
from worldmodel.training.optimisation import step_generator
from worldmodel.training.timing import seconds_in_turns, synchronise
from worldmodel.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.plain_step import AdaSslV, PlainStep, from_worldmodel

DEFAULTS = ("train.precision=auto", "data.mnist_dir=null")
TIMED_BATCHES = 4

# What the plain step is written for.
PLAIN = {
    "data.source": "moving_mnist",
    "model.encoder.name": "conv3d",
    "model.encoder.pooling": "mean",
    "model.encoder.kernels": "space_time",
    "model.embedding_norm": "sphere",
    "model.projector_layers": 2,
    "model.latent.name": "gaussian",
    "model.latent.posterior_sees": "later",
    "model.scene_dim": 0,
    "model.distance_dim": 0,
    "model.latent.prior": "mixture",
    "model.latent.prior_components": 1,
    "model.editor.name": "mlp",
    "model.editor.norm": "batch",
    "objective.name": "byol",
    "objective.beta_warmup_steps": 0,
    "objective.smoothness_weight": 0.0,
    "objective.time_variance_weight": 0.0,
    "objective.ema_schedule": "constant",
    "train.warmup_steps": 0,
    "train.clip_norm": 0.0,
    "train.grad_accumulation": 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/paper.yaml"))
    parser.add_argument("--out", type=Path, default=Path("train_step.json"), help="JSON file to write")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: 20)")
    parser.add_argument(
        "--compare-steps", type=int, default=50, help="steps over which losses are compared (default: 50)"
    )
    add_overrides(parser, "values that replace the config's, such as data.batch_size=256")
    args = parser.parse_intermixed_args()
    with report_errors():
        check_counts(args, "steps", "compare_steps")
        check_out_file(args.out, ".json")
        config = load_config(args.config, [*DEFAULTS, *args.overrides])
        check_plain(config)
        with plain_process(config) as plain:
            result = bench(config, plain, args.steps, args.compare_steps)
        write_result(args.out, result)
        print(f"{summary(result)}\n{args.out}")
    return 0


def check_plain(config: Config) -> None:
    """Check that the plain step computes the training step of a config.

    Raises:
        UserError: it does not.
    """
    for key, value in flatten(to_dict(config)).items():
        if value != PLAIN.get(key, value):
            raise UserError(f"{key}={value}: the plain step is written for {key}={PLAIN[key]} alone")


def bench(config: Config, plain: Callable[..., Any], steps: int, compare_steps: int) -> dict[str, Any]:
    """Return the content of train_step.json: times in seconds, losses of each step."""
    encoder = config.model.encoder
    assert isinstance(encoder, Conv3dConfig), "the plain step is written for it alone"
    set_threads(config.train.num_threads)
    keep_freed_memory()
    losses = {"plain": plain("losses", compare_steps), "fp32": our_losses(config, in_fp32(config), compare_steps)}
    trainer = make_trainer(config)
    precision = trainer.accelerator.mixed_precision.replace("no", "fp32")
    if precision not in losses:
        losses[precision] = our_losses(config, trainer, compare_steps)
    difference = {name: max_difference(losses["plain"], of_ours) for name, of_ours in losses.items()}

    device = trainer.accelerator.device
    rendered = stream_of(config, device)
    [render_s] = seconds_in_turns([lambda: next(rendered)], steps, "rendering", device)
    batches = timed_batches(config, device)
    baseline_s, ours_s = seconds_in_turns(
        [lambda: plain("step"), lambda: trainer.update(batches)], steps, "plain and ours", device
    )
    return {
        "machine": machine_description(),
        "device": device.type,
        "precision": precision,
        "batch_size": config.data.batch_size,
        "width": encoder.width,
        "parameters": sum(parameter.numel() for parameter in trainer.student.parameters()),
        "baseline_step_s": median(baseline_s),
        "step_s": median(ours_s),
        "speedup": median(baseline_s) / median(ours_s),
        "render_batch_s": median(render_s),
        "compare_steps": compare_steps,
        "loss_max_diff": difference["fp32"],
        "loss_max_diff_as_timed": difference[precision],
        "baseline_steps_s": baseline_s,
        "steps_s": ours_s,
        "losses": losses,
    }


@contextmanager
def plain_process(config: Config) -> Iterator[Callable[..., Any]]:
    """Run the plain step in a separate process; yield a function that requests "losses" or a "step".

    The function raises UserError: the process has met one, or has ended.
    """
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=serve_plain, args=(config, there), daemon=True)
    process.start()
    there.close()  # only the process holds it now: its end is seen

    def ask(*request: Any) -> Any:
        try:
            with suppress(BrokenPipeError):  # it has ended, perhaps with an answer that is yet to be read
                here.send(request)
            answer = here.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError("the process of the plain step has ended: its message is above, if it left one") from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    try:
        with here:
            yield ask
    finally:
        process.join()


def serve_plain(config: Config, requests: Connection) -> None:
    """Answer the requests of `plain_process`. The weights are those of our trainer, which follow from the seed."""
    set_threads(config.train.num_threads)
    try:
        plain = make_plain(config, in_fp32(config))
        device = next(plain.model.parameters()).device
        batches = timed_batches(config, device)
        while True:
            match requests.recv():
                case ("losses", steps):
                    requests.send(plain_losses(config, plain, steps))
                case ("step",):
                    plain.step(next(batches)["video"])
                    synchronise(device)
                    requests.send(None)
    except EOFError:
        pass  # nothing more is asked
    except UserError as error:
        requests.send(error)


def timed_batches(config: Config, device: torch.device) -> Iterator[Batch]:
    """Yield some batches, rendered beforehand, repeatedly."""
    return cycle(list(islice(stream_of(config, device), TIMED_BATCHES)))


def in_fp32(config: Config) -> Trainer:
    return make_trainer(replace(config, train=replace(config.train, precision="fp32")))


def make_trainer(config: Config) -> Trainer:
    """Make a trainer before its first step. Earlier trainers become unusable."""
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate knows one precision in a process
    return Trainer(config, make_accelerator(config.train.precision, config.train.timeout_s))


def make_plain(config: Config, trainer: Trainer) -> PlainStep:
    """Make the plain step with the trainer's weights."""
    data, model, train = config.data, config.model, config.train
    encoder, latent, objective = model.encoder, model.latent, config.objective
    assert isinstance(encoder, Conv3dConfig) and isinstance(latent, GaussianConfig)
    assert isinstance(objective, ByolConfig), "the plain step is written for these alone"
    plain = AdaSslV(data.channels, data.num_frames, encoder.width, model.hidden_dim, model.embedding_dim, latent.dim)
    plain.load_state_dict(from_worldmodel(trainer.student.state_dict()))
    return PlainStep(
        plain.to(trainer.accelerator.device),
        beta=trainer.student.beta,
        ema_momentum=objective.ema_momentum,
        lr=train.lr,
        weight_decay=train.weight_decay,
        num_steps=train.steps,
    )


def stream_of(config: Config, device: torch.device) -> Iterator[Batch]:
    """Return the batches of a training from the first one on."""
    steps = config.objective.rollout_steps
    return make_source(config).training_stream(steps, rank=0, world_size=1, device=device).batches()


def plain_losses(config: Config, plain: PlainStep, steps: int) -> list[float]:
    device = next(plain.model.parameters()).device
    losses = []
    for step, batch in enumerate(tqdm(islice(stream_of(config, device), steps), "losses, plain", steps, unit="step")):
        losses.append(float(plain.step(batch["video"], step_generator(config.seed, step, device))))
    return losses


def our_losses(config: Config, trainer: Trainer, steps: int) -> list[float]:
    accelerator = trainer.accelerator
    batches = stream_of(config, accelerator.device)
    losses = []
    for _ in tqdm(range(steps), f"losses, ours in {accelerator.mixed_precision.replace('no', 'fp32')}", unit="step"):
        trainer.log.restart()
        trainer.update(batches)
        losses.append(trainer.log.means()["loss"])
    return losses


def max_difference(losses: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(losses, others, strict=True))


def summary(result: dict[str, Any]) -> str:
    machine = result["machine"]
    on = machine["gpu"] if result["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    as_timed = result["loss_max_diff_as_timed"]
    rows = [
        ("plain, fp32", result["baseline_step_s"], result["baseline_steps_s"], "-"),
        (f"ours, {result['precision']}", result["step_s"], result["steps_s"], f"{as_timed:.1e}"),
    ]
    lines = [
        f"{on}, load {machine['load_1min']}, torch {machine['torch']}",
        f"width {result['width']:g}, batch {result['batch_size']}, {result['parameters'] / 1e6:.2f} M parameters",
        f"{'step':<12} {'median, s':>10} {'fastest, s':>10} {'loss differs by':>16}",
        *(f"{name:<12} {middle:>10.4f} {min(each):>10.4f} {differs:>16}" for name, middle, each, differs in rows),
        f"{result['speedup']:.2f} x; rendering a batch: {result['render_batch_s']:.4f} s; in fp32 the losses of "
        f"{result['compare_steps']} steps differ by {result['loss_max_diff']:.1e} at most",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
