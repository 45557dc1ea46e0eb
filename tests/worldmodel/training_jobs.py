"""Jobs that tests start as several processes of one training: `python -m tests.worldmodel.training_jobs JOB OUT ...`.

few_updates OUT CASES      of each case, a config and overrides: losses, gradients, teacher, running statistics
evaluate OUT CASES         of each case: the scores of an untrained model, refined where it says so; who saw which clips
run_until OUT STEP anew|resume CONFIG OVERRIDE...    train; the last process gets SIGTERM after a step; keeps the clips
                                                     of each step
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from data_pipelines.batches import Batch
from tests.conftest import REPO
from worldmodel.commands.exits import leave
from worldmodel.commands.process import stop_signals
from worldmodel.config import load_config
from worldmodel.nets.parallel import is_sharded, local_shard
from worldmodel.sources import make_source
from worldmodel.training import trainer as trainer_module
from worldmodel.training.launch import make_accelerator
from worldmodel.training.loop import train
from worldmodel.training.session import Interrupted, Session
from worldmodel.training.trainer import Trainer

NUM_UPDATES = 2  # the second has the weights, teacher and statistics that the first has left


def few_updates(out: Path, cases: dict[str, list[str]]) -> None:
    """Saves OUT/CASE.safetensors, by the first process. The batch norm of cases in parts stays as it is; untrained
    encoders with batch norm make 1e-3 of fp32's 1e-7, so their cases are computed in double precision."""
    out.mkdir(exist_ok=True)
    for name, (path, *overrides) in cases.items():
        with double_precision() if name.endswith("double") else nullcontext():
            found = updates(name, path, overrides, out)
        if os.environ.get("RANK", "0") == "0":
            save_file(found, out / f"{name}.safetensors")


def updates(name: str, path: str, overrides: list[str], out: Path) -> dict[str, torch.Tensor]:
    config = load_config(REPO / "configs" / path, overrides)
    accelerator = make_accelerator(config.train.precision, config.train.timeout_s)
    stream = make_source(config).training_stream(
        config.objective.rollout_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
    trainer = Trainer(config, accelerator)
    assert trainer.sharded == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    for module in (trainer.student, trainer.teacher):
        if module is not None and trainer.sharded:
            share = sum(local_shard(parameter).numel() for parameter in module.parameters())
            assert share < 0.55 * sum(parameter.numel() for parameter in module.parameters())
        if module is not None and name.endswith("in_parts"):
            module.eval()
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1e-2  # a gradient of 1e-9 that should be zero would be a step of full length
    gradients: dict[str, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: Any, model: Any = trainer.student, kept: Any = gradients) -> None:
        kept.update({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None and k not in kept})

    trainer.optimizer.optimizer.register_step_pre_hook(keep)
    batches = stream.batches(0)
    found: dict[str, torch.Tensor] = {}
    for step in range(NUM_UPDATES):
        trainer.log.restart()
        trainer.update(batches)
        means = trainer.log.means()
        found |= {f"loss/{step}/{key}": torch.tensor(means[key]) for key in trainer.log.losses}
        found[f"rank/{step}"] = torch.tensor(means["effective_rank"])
    batches.close()
    found |= {f"gradient/{key}": value for key, value in gradients.items()}
    found |= {f"buffer/{key}": value.clone() for key, value in trainer.student.named_buffers()}
    if trainer.teacher:
        found |= {f"teacher/{key}": value.clone() for key, value in trainer.teacher.state_dict().items()}
    full = {key: value.full_tensor() if is_sharded(value) else value for key, value in found.items()}
    return {key: value.contiguous() for key, value in full.items()}


@contextmanager
def double_precision() -> Iterator[None]:
    """All that is fp32 elsewhere."""
    torch.set_default_dtype(torch.float64)
    inputs, single = trainer_module.training_inputs, torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]

    def in_double(*arguments: Any) -> Any:
        taken = inputs(*arguments)
        return taken._replace(segments=taken.segments.double())

    trainer_module.training_inputs = in_double  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        trainer_module.training_inputs, torch.Tensor.float = inputs, single  # type: ignore[method-assign]


def evaluate(out: Path, cases: dict[str, list[str]]) -> None:
    """Writes OUT/CASE_RANK.json: the clips that this process decoded at each reading, and whether the first and the
    second score are the best so far. OUT/CASE/metrics.jsonl has the scores."""
    for name, (path, *overrides) in cases.items():
        config = load_config(REPO / "configs" / path, [*overrides, f"run_dir={out / name}"])
        accelerator = make_accelerator(config.train.precision, config.train.timeout_s)
        run = Path(config.run_dir)
        run.mkdir(parents=True, exist_ok=True)
        session = Session(Trainer(config, accelerator), run, make_source(config), "", lambda: 0)
        readings: list[list[int]] = []
        best = []

        read = session.source.evaluation_batches

        def spied(
            *arguments: Any, readings: list[list[int]] = readings, read: Any = read, **options: Any
        ) -> Iterator[Batch]:
            readings.append([])
            for batch in read(*arguments, **options):
                readings[-1] += batch["clip_id"].tolist()
                yield batch

        with session.writing(), patch.object(session.source, "evaluation_batches", spied):
            if config.train.refine_steps:
                session.refine()
            else:
                best = [session.evaluate(), session.evaluate()]
        found = json.dumps({"readings": readings, "best": best})
        (out / f"{name}_{accelerator.process_index}.json").write_text(found)


def run_until(out: Path, last_step: int, path: str, overrides: list[str], resume: bool) -> None:
    """Trains; the last process gets SIGTERM after `last_step`. Writes OUT/clips_RANK.json, by step."""
    update = Trainer.update
    seen: dict[int, list[int]] = {}

    def spied(self: Trainer, batches: Iterator[Batch]) -> None:
        batch = next(batches)
        seen[self.step] = batch["clip_id"].tolist()
        update(self, iter([batch]))
        if self.step == last_step and self.accelerator.is_last_process:
            signal.raise_signal(signal.SIGTERM)

    Trainer.update = spied  # type: ignore[method-assign]
    try:
        with stop_signals() as stop:
            train(load_config(REPO / "configs" / path, overrides), resume=resume, stop=stop)
    except Interrupted:
        pass
    finally:
        Trainer.update = update  # type: ignore[method-assign]
        out.mkdir(exist_ok=True)
        (out / f"clips_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    job, folder, *rest = sys.argv[1:]
    if job == "few_updates":
        few_updates(Path(folder), json.loads(Path(rest[0]).read_text()))
    elif job == "evaluate":
        evaluate(Path(folder), json.loads(Path(rest[0]).read_text()))
    else:
        run_until(Path(folder), int(rest[0]), rest[2], rest[3:], resume=rest[1] == "resume")
    leave(0)
