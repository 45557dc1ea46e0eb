"""One session of a training run: its rows, evaluations, checkpoints and refinement, and how it ends."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError, one_line_logger
from worldmodel.config import to_dict
from worldmodel.evaluation import factors, forecast
from worldmodel.evaluation.embed import Networks, Share
from worldmodel.nets.parallel import max_over_processes
from worldmodel.runs.checkpoint import (
    Checkpoint,
    VideosChangedError,
    check_finite,
    check_fits,
    load_checkpoint,
    save_checkpoint,
)
from worldmodel.runs.tracking import RowLostError, Tracker
from worldmodel.runs.wandb_tracking import start_wandb
from worldmodel.sources.source import Source
from worldmodel.training import full_state
from worldmodel.training.finite import NotFiniteStep
from worldmodel.training.launch import ConnectionLostError, backend_message, from_main_process
from worldmodel.training.losses import TrainingModel
from worldmodel.training.machine import fair_share_of_cores
from worldmodel.training.refine import embed_refinement_clips, refine, refinement_stream
from worldmodel.training.trainer import Trainer

logger = one_line_logger(__name__)


PENALTIES = {"kl": "kl_nats", "l0": "expected_l0"}
"""Penalties of latents in the progress bar, by their names in metrics.jsonl."""


def collapse_rank(embedding_dim: int) -> float:
    """Return the effective rank below which embeddings of so many dimensions count as collapsed."""
    return min(2.0, (1 + embedding_dim) / 2)


Stop = Callable[[], int]
"""Returns the number of the signal that asks training to stop, or 0."""


class Interrupted(Exception):
    """Training was asked to stop. The checkpoint of the last finished step is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Session:
    """One training of a run folder, from its start or a resume to its end.

    All processes have one and call its methods together. The first process writes the run folder.
    """

    def __init__(self, trainer: Trainer, run: Path, source: Source, stream_fingerprint: str, stop: Stop) -> None:
        self.trainer, self.run, self.source, self.stop = trainer, run, source, stop
        self.config, self.accelerator = trainer.config, trainer.accelerator
        self.stream_fingerprint = stream_fingerprint
        self.saved_step = -1
        self.best_score = math.inf
        self.refined = False
        self.awaits_evaluation = False
        """The evaluation of the last finished step is due, and not done: an error may end the session before."""
        self.started_s = time.monotonic()
        self.earlier_s = 0.0
        self.tracker: Tracker | None = None
        self.bar: tqdm | None = None

    def summary(self) -> str:
        """Return a line about processes, precision and size."""
        accelerator, trainer = self.accelerator, self.trainer
        precision = accelerator.mixed_precision.replace("no", "fp32")
        millions = sum(p.numel() for p in trainer.student.parameters()) / 1e6
        processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
        shards = " in shards" if trainer.sharded else ""
        return f"{self.run}: {processes} on {accelerator.device.type}, {precision}, {millions:.2f} M parameters{shards}"

    @contextmanager
    def writing(self) -> Iterator[tqdm]:
        """Open the rows of the run, and yield a progress bar of steps."""
        is_main = self.accelerator.is_main_process
        if is_main:
            self.tracker, tracking = Tracker(self.run, self.logged_step), self.config.tracking
            self.tracker.wandb = start_wandb(self.run, tracking.wandb, tracking.project, to_dict(self.config))
        self.started_s = time.monotonic()
        steps = {"total": self.config.train.steps, "initial": self.trainer.step, "unit": "step"}
        try:
            with tqdm(**steps, desc=self.run.name, disable=not is_main) as self.bar:
                yield self.bar
        finally:
            if self.tracker:
                self.tracker.close()

    # ----------------------------------------------------------------------------------------------------------- rows

    def write_row(self) -> None:
        """Write a row about the steps since the last one."""
        trainer = self.trainer
        values = trainer.log.row() | {
            "lr": trainer.lr_at(trainer.step - 1),
            "beta": trainer.beta_at(trainer.step - 1),
        }
        if values["effective_rank"] < collapse_rank(self.trainer.config.model.embedding_dim):
            logger.warning(
                "step %d: effective rank %.2f, embeddings have collapsed", trainer.step, values["effective_rank"]
            )
        if self.tracker:
            self.tracker.log("train", trainer.step, values)
        if self.bar is not None:
            penalties = {short: f"{values[name]:.2f}" for short, name in PENALTIES.items() if name in values}
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False, **penalties)

    def write_refinement_row(self, updates: int, values: dict[str, float]) -> None:
        """Write a row about the refinement, after so many updates of it."""
        if self.tracker:
            self.tracker.log("refinement", self.trainer.step + updates, values)

    @property
    def logged_step(self) -> int:
        """The step as rows count it: updates of refinement are included."""
        return self.trainer.step + self.refined * self.config.train.refine_steps

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> bool:
        """Score the networks on the selection split, and return True if they are the best so far."""
        student, target_encoder = self.trainer.full_networks()
        check_finite(self.trainer.step, model=student.state_dict(), teacher=target_encoder.state_dict())
        scores, score = self._selection_scores(student, target_encoder)
        if self.tracker:
            self.tracker.log("selection", self.logged_step, scores)
        is_best = self.accelerator.is_main_process and score < self.best_score
        if is_best:
            self.best_score = score
        self.awaits_evaluation = False
        return bool(from_main_process(self.accelerator, is_best))

    def _selection_scores(self, student: TrainingModel, target_encoder: nn.Module) -> tuple[dict[str, float], float]:
        """Return the scores of the selection split, and the one that selects a checkpoint: lower is better."""
        accelerator, config = self.accelerator, self.config.evaluation
        networks = Networks(student.model, target_encoder, accelerator.device, self.source, self.trainer.layout)
        if self.source.content == "factors":  # too fast to be worth sharing
            scores = factors.development_scores(networks, config.seed)
            return scores, -scores["factors_r2"]
        share = Share(accelerator.process_index, accelerator.num_processes)
        scores = forecast.development_scores(networks, config, share)
        return scores, scores["relative_energy_score"]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def load(self) -> None:
        """Load the latest checkpoint, if there is one. The first process reads it.

        Raises:
            VideosChangedError: the videos differ from those of the checkpoint.
            UserError: the checkpoint is damaged, or is that of other networks.
        """
        accelerator, trainer = self.accelerator, self.trainer
        checkpoint = load_checkpoint(self.run) if accelerator.is_main_process else None
        [state] = broadcast_object_list([checkpoint.state if checkpoint else None])
        if state is None:
            return
        if state["stream"] != self.stream_fingerprint:
            raise VideosChangedError(
                f"the videos of {self.run} have changed since its checkpoint (stream {state['stream']}, now "
                f"{self.stream_fingerprint})"
            )
        if checkpoint:
            teacher = trainer.teacher.state_dict() if trainer.teacher else {}
            check_fits(checkpoint, trainer.student.state_dict(), teacher, self.run)
            trainer.load_full_state(checkpoint.model, checkpoint.teacher, checkpoint.optimizer)
        else:
            trainer.load_full_state({}, {}, {})
        if accelerator.scaler and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
        trainer.step = self.saved_step = state["step"]
        self.best_score, self.refined = state["best_score"], state.get("refined", False)
        self.awaits_evaluation = state.get("awaits_evaluation", False)
        self.earlier_s = state["train_seconds"]
        if state.get("step_flops"):
            trainer.log.step_flops = state["step_flops"] / accelerator.num_processes
        accelerator.print(f"resuming {self.run} at step {trainer.step}")

    def save(self, is_best: bool = False) -> None:
        """Save a checkpoint of the last finished step.

        Raises:
            NotFiniteStep: a step had a loss or a gradient that is not finite. Nothing is written.
            UserError: a weight is not finite, or the checkpoint cannot be written. Earlier ones are intact.
        """
        trainer = self.trainer
        trainer.check_steps()
        tensors = trainer.full_state()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": trainer.step,
                "updates": self.logged_step,
                "train_seconds": self.train_seconds,
                "stream": self.stream_fingerprint,
                "best_score": self.best_score,
                "refined": self.refined,
                "awaits_evaluation": self.awaits_evaluation,
                "scaler": scaler.state_dict() if scaler else None,
                "step_flops": (trainer.log.step_flops or 0) * self.accelerator.num_processes,
                "num_threads": torch.get_num_threads(),
                "num_cores": fair_share_of_cores(),
            }
            checkpoint = Checkpoint(**tensors, state=state)
            save_checkpoint(self.run, checkpoint, keep=self.config.train.keep_checkpoints, is_best=is_best)
        self.saved_step = trainer.step

    @property
    def train_seconds(self) -> float:
        """Wall-clock seconds of training and its evaluations, including earlier sessions."""
        return self.earlier_s + time.monotonic() - self.started_s

    # ------------------------------------------------------------------------------------------------------------ end

    def refine(self) -> None:
        """Refine the networks on the first process. An interrupted refinement starts again on a resume.

        Raises:
            Interrupted: `stop` asked for it.
        """
        student, target_encoder = self.trainer.full_networks()
        caught = 0
        if self.accelerator.is_main_process:
            config, device, autocast = self.config, self.accelerator.device, self.accelerator.autocast
            with closing(refinement_stream(self.source, config, device).batches(0)) as batches:
                networks = student.model, target_encoder
                clips = embed_refinement_clips(config, *networks, batches, device, autocast, self.stop)
            precise = nullcontext if self.accelerator.scaler else autocast  # fp16 would need scaled gradients
            layout = self.trainer.layout
            score = forecast.selection_scorer(Networks(*networks, device, self.source, layout), config.evaluation)
            log, turns = self.write_refinement_row, self.trainer.turns
            caught = refine(config, student, clips, device, precise, log, self.stop, score, turns)
        if signal_number := from_main_process(self.accelerator, caught):
            raise Interrupted(signal_number)
        if self.accelerator.num_processes > 1:
            full_state.load_network_state(self.trainer.student, student.state_dict())
        self.refined = True
        self.save(self.evaluate())

    def stop_if_asked(self) -> None:
        """Save and stop if any process is asked to. All processes learn of it after the same step.

        Raises:
            Interrupted: a process is asked to stop.
        """
        if signal_number := max_over_processes(self.stop()):
            self.save()
            raise Interrupted(signal_number)

    def not_finite(self, error: NotFiniteStep, batches: Iterator[Batch]) -> UserError:
        """Return the error of a step that was not finite, given its batch, with its cause. Nothing is saved."""
        explained = self.trainer.explain(error, batches)
        intact = f"; the checkpoint of step {self.saved_step} is intact" if self.saved_step >= 0 else ""
        return UserError(f"{explained}{intact}")

    def connection_lost(self, error: RuntimeError) -> ConnectionLostError:
        """Return the error of unreachable processes, after saving the last finished step where that is possible.

        The weights are those of a whole step: the optimiser starts only when all gradients have arrived.
        """
        if self.trainer.saves_alone and self.saved_step != self.trainer.step:
            self.save()
        return ConnectionLostError(
            f"lost the connection to another process at step {self.trainer.step} ({backend_message(error)}), "
            "whose own messages name the cause"
        )

    def row_lost(self, error: RowLostError) -> RowLostError:
        """Return the error of a full disk, after an attempt of this process to save the last finished step."""
        if self.saved_step != self.trainer.step and not self.trainer.sharded:
            try:
                self.save()
            except UserError as second:
                return RowLostError(f"{error}; {second}")
        saved = f"; the checkpoint of step {self.saved_step} is saved" if self.saved_step >= 0 else ""
        return RowLostError(f"{error}{saved}")
