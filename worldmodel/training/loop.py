"""The training loop on Hugging Face Accelerate.

Everything random in a step is a function of (seed, step) and of a clip's place in the batch: nothing but weights,
optimiser and step number has to be saved for a resumed run to go on bit for bit, on however many processes.
"""

import math
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from torch import Tensor, nn
from torch.distributed import DistError
from tqdm.auto import tqdm

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.transforms import on_device
from worldmodel.build import build_training_model
from worldmodel.config import Config, TeacherObjective, TrainConfig, flatten, to_dict
from worldmodel.data import (
    check_contents,
    check_splits,
    evaluation_uses,
    training_contents,
    training_inputs,
    training_uses,
)
from worldmodel.evaluation import factors, forecast
from worldmodel.evaluation.scores import effective_rank
from worldmodel.nets.teacher import Teacher, ema_momentum
from worldmodel.runs.checkpoint import (
    Checkpoint,
    check_finite,
    load_checkpoint,
    load_optimizer_tensors,
    open_run,
    optimizer_tensors,
    remove_leftovers,
    save_checkpoint,
)
from worldmodel.runs.lock import run_lock
from worldmodel.runs.tracking import RowLostError, Tracker
from worldmodel.runs.wandb_tracking import wandb_mode
from worldmodel.sources import make_source
from worldmodel.sources.source import Source
from worldmodel.training import sharding
from worldmodel.training.distributed import check_launch_environment, globalise_batch_norm
from worldmodel.training.finite import Guard, NotFiniteStep, first_overflow, overflowed_gradients
from worldmodel.training.gradients import Losses, compute_gradients, micro_batches, snapshot_buffers
from worldmodel.training.losses import TrainingModel
from worldmodel.training.machine import (
    computes_bf16,
    keep_freed_memory,
    keep_to_own_cores,
    peak_flops_per_s,
    set_threads,
)
from worldmodel.training.optimisation import learning_rate, parameter_groups, set_lr, step_generator
from worldmodel.training.profiling import FlopCounter, profiled
from worldmodel.training.refine import embed_refinement_clips, refine, refinement_stream
from worldmodel.training.timing import StepTimes

logger = one_line_logger(__name__)

COLLAPSE_RANK = 2.0
OTHER_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
MIN_SCALE = 2.0**-24
"""A GradScaler halves its scale at each step whose gradients overflow. So small, none will be without overflow."""
ECHO_S = 2.0
"""A signal to all processes comes twice, as launchers pass it on: what follows so soon is no second request."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


def train(config: Config, *, resume: bool = False, overwrite: bool = False, profile: bool = False) -> Path:
    """Train to config.train.steps updates, refine, and return the run folder.

    With `profile`, the first process writes a profile of a few steps into it (worldmodel/training/profiling.py).

    Raises:
        UserError: anything the user can mend; see its message.
        Interrupted: SIGINT or SIGTERM came; the checkpoint of the last finished step is saved.
    """
    with ExitStack() as held, lost_connections_told():
        accelerator = make_accelerator(config.train)
        try:
            return _train(config, accelerator, held, resume=resume, overwrite=overwrite, profile=profile)
        finally:
            accelerator.end_training()


def _train(
    config: Config, accelerator: Accelerator, held: ExitStack, *, resume: bool, overwrite: bool, profile: bool
) -> Path:
    """`held` takes the lock of the run folder."""
    set_threads(config.train.num_threads)
    keep_freed_memory()
    wandb_mode(config)  # a mistake is told before there is a run folder
    rank, world_size = accelerator.process_index, accelerator.num_processes
    # The first process indexes the videos, then the first of each other host; the rest find an index.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        source = make_source(config)
        check_splits(source, config, training_uses(config) | evaluation_uses(config))
        stream = source.training_stream(
            config.objective.rollout_steps, rank=rank, world_size=world_size, device=accelerator.device
        )
        if config.train.refine_steps:
            refinement_stream(source, config, accelerator.device)  # fails now, not after hours of training
        run = Path(config.run_dir)
        if accelerator.is_main_process:  # alone it reads and writes there: other hosts need not see the folder
            held.enter_context(run_lock(run))
            open_run(config, resume=resume, overwrite=overwrite)
            remove_leftovers(run)
            check_contents(source, config, run)
    contents = training_contents(source, config)
    fingerprint = stream.fingerprint + (f"-{contents.hash()}" if contents else "")
    check_same_everywhere(accelerator, config, resume, fingerprint)
    trainer = Trainer(config, accelerator, run, source, stream.fingerprint)
    if resume:
        trainer.load()
    accelerator.print(trainer.summary())
    trainer.times.labelled = profiles = profile and accelerator.is_main_process
    profiler = profiled(run, accelerator.device, config.train.steps - trainer.step) if profiles else nullcontext()
    with stop_signals() as stop, trainer.progress() as bar, profiler as step_profiled:
        batches = stream.batches(trainer.step)
        try:
            while trainer.step < config.train.steps:
                with trainer.kept_from_half_a_step():
                    trainer.update(batches)
                if step_profiled:
                    step_profiled()
                bar.update()
                trainer.log_evaluate_save(bar)
                if signal_number := trainer.agree(stop()):
                    trainer.save()
                    raise Interrupted(signal_number)
            trainer.check_finite()
            if trainer.saved_step != trainer.step:
                trainer.save()
            if config.train.refine_steps and not trainer.refined:
                batches.close()  # its memory for decoded clips, and its processes
                trainer.refine(stop)
        except NotFiniteStep as error:
            batches.close()
            with closing(stream.batches(error.step - 1)) as again:
                raise trainer.explained(error, again) from None
        except RowLostError as error:
            raise trainer.lost_row(error) from error
        except RuntimeError as error:
            if is_lost_connection(error):
                raise trainer.lost_connection(error) from error
            raise
        finally:
            batches.close()
            trainer.close()
    return run


class Trainer:
    """What a run carries from step to step."""

    def __init__(
        self, config: Config, accelerator: Accelerator, run: Path, source: Source, stream_fingerprint: str
    ) -> None:
        self.config, self.accelerator, self.run, self.source = config, accelerator, run, source
        self.stream_fingerprint = stream_fingerprint
        if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
            keep_to_own_cores(accelerator.local_process_index)
        set_seed(config.seed)
        self.student = model = build_training_model(config)
        # The teacher starts as the student and is no part of the wrapped module.
        self.teacher = Teacher(model.embedder) if model.objective.needs_teacher else None
        if accelerator.num_processes > 1:
            for module in filter(None, (self.teacher, model.embedder, model.editor, model.latent, model.scene)):
                globalise_batch_norm(module)
        self.sharded = sharding.is_asked_for(accelerator)
        if self.sharded and config.train.grad_accumulation > 1 and model.compares_clips:
            raise UserError(
                f"train.grad_accumulation={config.train.grad_accumulation}: a loss that compares clips takes no parts "
                "where weights are in shards"
            )
        self.blank_student = sharding.without_weights(model) if self.sharded else None
        self.blank_teacher = sharding.without_weights(self.teacher) if self.sharded and self.teacher else None
        if mode := compile_mode(config.train, accelerator):
            for embedder in (model.embedder, *([self.teacher.embedder] if self.teacher else [])):
                embedder.encoder.compile(mode=mode)
        if self.sharded:  # Accelerate's own way does not know of the teacher
            accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            for network in filter(None, (model, self.teacher)):
                sharding.shard(network)
        elif self.teacher:
            self.teacher.to(accelerator.device)
        optimizer = torch.optim.AdamW(parameter_groups(model, config.train.weight_decay), config.train.lr, fused=True)
        if self.sharded:
            self.model, self.optimizer = model, accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        scaled = accelerator.scaler is not None
        self.guard = Guard(optimizer, accelerator.device, scaled=scaled, in_shards=self.sharded)
        self.step = 0
        self.saved_step = -1
        self.best_score = math.inf
        self.refined = False
        self.started_s = time.monotonic()
        self.earlier_s = 0.0
        self.sums = Sums()
        self.times = StepTimes(accelerator.device)
        self.flops: int | None = None  # of this process in a step, counted in its first one
        self.tracker: Tracker | None = None

    def whole(self) -> tuple[TrainingModel, nn.Module]:
        """The student and what embeds its targets: copies where weights are in shards, to be let go of soon, otherwise
        themselves. All processes call it together."""
        student, teacher, device = self.student, self.teacher, self.accelerator.device
        if self.blank_student:
            student = sharding.filled(self.blank_student, student, device)
        if teacher and self.blank_teacher:
            teacher = sharding.filled(self.blank_teacher, teacher, device)
        return student, teacher or student.embedder

    def update(self, batches: Iterator[Batch]) -> None:
        """One optimiser step on one batch."""
        config, accelerator, timed = self.config, self.accelerator, self.times
        set_lr(self.optimizer, self.lr_at(self.step))
        losses = self.compute_gradients(batches)
        with timed("step"), timed("optimiser"):
            if config.train.clip_norm:
                accelerator.clip_grad_norm_(self.model.parameters(), config.train.clip_norm)
            self.guard.watch(losses.losses["loss"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.sums.add(losses)
            if self.teacher:
                of_teacher = config.objective
                assert isinstance(of_teacher, TeacherObjective)
                momentum = ema_momentum(self.step, config.train.steps, of_teacher.ema_momentum, of_teacher.ema_schedule)
                self.teacher.update(self.student.embedder, momentum)
        self.step += 1

    def compute_gradients(self, batches: Iterator[Batch]) -> Losses:
        """The losses and gradients of the next step, on the next batch."""
        config, accelerator, timed = self.config, self.accelerator, self.times
        with timed("step"), timed("data"):
            batch = next(batches)
            rows = on_device(batch["row"], accelerator.device)
            inputs = training_inputs(batch, config, config.objective.rollout_steps, accelerator.device)
            parts = micro_batches(inputs, rows, config.train.grad_accumulation)
        with timed("step"), self.flops_counted():
            return compute_gradients(
                accelerator,
                self.model,
                self.teacher,
                parts,
                config.data.batch_size,
                self.beta_at(self.step),
                lambda: step_generator(config.seed, self.step, accelerator.device),
                timed,
            )

    def check_finite(self) -> None:
        """Raises NotFiniteStep: a step since the last call had a loss or a gradient that is not finite."""
        if num_steps := self.guard.num_steps():
            raise NotFiniteStep(self.step - num_steps + 1)
        if (scaler := self.accelerator.scaler) and scaler.get_scale() < MIN_SCALE:
            raise NotFiniteStep(self.step, "gradients still overflow at the least scale of fp16")

    def explained(self, error: NotFiniteStep, batches: Iterator[Batch]) -> UserError:
        """The error, with the module that overflowed first.

        The step runs again, on the weights that it had: those have not moved since. All processes call it together.
        """
        self.step = error.step - 1
        networks = nn.ModuleDict({"student": self.student} | ({"teacher": self.teacher} if self.teacher else {}))
        gradients: list[str] = []
        # What is computed from such values may fail, or the other processes may be gone: hence `suppress`, innermost.
        with (
            torch.compiler.set_stance("force_eager"),
            first_overflow(networks) as modules,
            suppress(RuntimeError, UserError),
        ):
            self.compute_gradients(batches)
            gradients = overflowed_gradients(self.student)
        what = error.what
        if modules:
            what = f"the loss is not finite, first the output of {modules[0].removeprefix('student.')}"
        elif gradients:
            what = f"a gradient is not finite, first that of {gradients[0]}"
        intact = f"; the checkpoint of step {self.saved_step} is intact" if self.saved_step >= 0 else ""
        return UserError(f"{NotFiniteStep(error.step, what)}{intact}")

    @contextmanager
    def flops_counted(self) -> Iterator[None]:
        """Around the first step of a session: count what utilisation is computed from. It does not run compiled, in
        which nothing can be counted. What is computed twice to save memory counts twice."""
        if self.flops is not None:
            yield
            return
        with FlopCounter() as counter, torch.compiler.set_stance("force_eager"):
            yield
        self.flops = counter.total

    @cached_property
    def peak_flops_per_s(self) -> float:
        """What utilisation is measured by. It takes some tenths of a second, and is first asked for between steps."""
        accelerator = self.accelerator
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        return peak_flops_per_s(accelerator.device, dtype)

    def lr_at(self, step: int) -> float:
        train = self.config.train
        return learning_rate(step, train.lr, train.warmup_steps, train.steps)

    def beta_at(self, step: int) -> float:
        """beta with its linear warm-up from zero."""
        warmup_steps = self.config.objective.beta_warmup_steps
        return self.student.beta * (step / warmup_steps if step < warmup_steps else 1.0)

    def log_evaluate_save(self, bar: tqdm) -> None:
        """Whatever is due after this step."""
        train_config = self.config.train
        logs, evaluates, saves = (
            self.step % every == 0
            for every in (train_config.log_every, train_config.eval_every, train_config.checkpoint_every)
        )
        is_last = self.step == train_config.steps
        if logs or evaluates or saves or is_last:
            self.check_finite()
        if logs or is_last:
            self.log(bar)
        is_best = (evaluates or is_last) and self.evaluate()
        if is_best or saves:
            self.save(is_best)

    def log(self, bar: tqdm) -> None:
        values = self.sums.means()
        seconds = self.times.means(self.sums.num_batches)
        assert self.flops is not None
        values |= seconds | {
            "tflops": self.flops / seconds["step_s"] / 1e12,
            "mfu": self.flops / seconds["step_s"] / self.peak_flops_per_s,
            "lr": self.lr_at(self.step - 1),
            "beta": self.beta_at(self.step - 1),
        }
        self.sums = Sums()
        if values["effective_rank"] < COLLAPSE_RANK:
            logger.warning(
                "step %d: effective rank %.2f, embeddings have collapsed", self.step, values["effective_rank"]
            )
        if self.tracker:
            self.tracker.log("train", self.step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", kl=f"{values.get('kl_nats', 0):.2f}")

    def evaluate(self) -> bool:
        """Score on selection identities; True where it is the best so far. Lower is better."""
        config, accelerator, device = self.config, self.accelerator, self.accelerator.device
        student, target_encoder = self.whole()
        check_finite(self.step, model=student.state_dict(), teacher=target_encoder.state_dict())
        is_best = torch.zeros((), device=device)
        if self.source.content == "factors":  # too quick to be worth sharing
            scores = factors.development_scores(config, student.model, device)
            score = -scores["factors_r2"]
        else:
            scores = forecast.development_scores(
                config,
                student.model,
                target_encoder,
                device,
                source=self.source,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
            score = scores["relative_energy_score"]
        if self.tracker:
            self.tracker.log("selection", self.logged_step, scores)
            if score < self.best_score:
                self.best_score = score
                is_best += 1
        return bool(accelerator.reduce(is_best).item())

    def refine(self, stop: Callable[[], int]) -> None:
        """Refinement, by the first process alone: minutes of one processor. Interrupted, it begins anew on a resume."""
        caught = 0
        student, target_encoder = self.whole()
        if self.accelerator.is_main_process:
            device, config = self.accelerator.device, self.config
            autocast = self.accelerator.autocast
            with closing(refinement_stream(self.source, config, device).batches(0)) as batches:
                clips = embed_refinement_clips(config, student.model, target_encoder, batches, device, autocast, stop)
            precise = nullcontext if self.accelerator.scaler else autocast  # what fp16 needs scaling for is fast anyway
            caught = refine(config, student, clips, device, precise, self.log_refinement, stop)
        if signal_number := int(self.accelerator.reduce(torch.tensor(caught, device=self.accelerator.device))):
            raise Interrupted(signal_number)
        [refined] = broadcast_object_list([{name: value.cpu() for name, value in student.state_dict().items()}])
        sharding.load_whole(self.student, refined)
        self.refined = True
        self.save(self.evaluate())

    def log_refinement(self, updates: int, values: dict[str, float]) -> None:
        if self.tracker:
            self.tracker.log("refinement", self.step + updates, values)

    def save(self, is_best: bool = False) -> None:
        """Save a checkpoint of the last finished step.

        Raises:
            NotFiniteStep: a step had a loss or a gradient that is not finite; nothing is written.
            UserError: a weight is not finite, or the checkpoint cannot be written; earlier ones are intact.
        """
        self.check_finite()
        weights = {
            "model": sharding.whole(self.student.state_dict()),
            "teacher": sharding.whole(self.teacher.state_dict()) if self.teacher else {},
            "optimizer": sharding.whole(optimizer_tensors(self.optimizer.optimizer, self.student)),
        }
        if not self.accelerator.is_main_process:
            check_finite(self.step, **weights)  # as the first process does: then all of them end with the same line
            self.saved_step = self.step
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "stream": self.stream_fingerprint,
            "best_score": self.best_score,
            "refined": self.refined,
            "scaler": scaler.state_dict() if scaler else None,
        }
        checkpoint = Checkpoint(**weights, state=state)
        save_checkpoint(self.run, checkpoint, keep=self.config.train.keep_checkpoints, is_best=is_best)
        self.saved_step = self.step

    @contextmanager
    def kept_from_half_a_step(self) -> Iterator[None]:
        """Where a step's gradients do not arrive, put back the batch statistics that its forward passes moved."""
        networks = [self.student, *([self.teacher] if self.teacher else [])]
        put_back = snapshot_buffers(*(networks if self.saves_on_loss else []))
        try:
            yield
        except RuntimeError as error:
            if is_lost_connection(error):
                put_back()
            raise

    @property
    def saves_on_loss(self) -> bool:
        """Whether this process saves the last finished step when the others are gone. A GPU may never come back from
        a collective that the others left, so that its memory cannot be read; of shards the others have theirs."""
        accelerator = self.accelerator
        others = accelerator.num_processes > 1 and not self.sharded
        return accelerator.is_main_process and others and accelerator.device.type == "cpu"

    def lost_connection(self, error: RuntimeError) -> UserError:
        """What to tell when other processes cannot be reached. Saves the last finished step first: no optimiser step
        begins before all gradients have come, so weights are those of a whole step."""
        if self.saves_on_loss and self.saved_step != self.step:
            self.save()
        return UserError(
            f"lost the connection to another process at step {self.step} ({told_by_backend(error)}): see what the "
            "other processes say, mend it, and go on with --resume"
        )

    def lost_row(self, error: RowLostError) -> UserError:
        """The error of a full disk, after an attempt to save the last finished step by this process alone."""
        if self.saved_step != self.step and not self.sharded:
            try:
                self.save()
            except UserError as second:
                return UserError(f"{error}; {second}")
        saved = f"; the checkpoint of step {self.saved_step} is saved" if self.saved_step >= 0 else ""
        return UserError(f"{error}{saved}: make room, and continue with --resume")

    def load(self) -> None:
        """Go on from the latest checkpoint, or from the start where there is none yet."""
        # The first process reads it for all of them.
        checkpoint = load_checkpoint(self.run) if self.accelerator.is_main_process else None
        [checkpoint] = broadcast_object_list([checkpoint])
        if checkpoint is None:
            return
        state = checkpoint.state
        if state["stream"] != self.stream_fingerprint:
            raise UserError(
                f"the videos of {self.run} have changed since its checkpoint (stream {state['stream']}, now "
                f"{self.stream_fingerprint}): restore them, or start anew with --overwrite"
            )
        sharding.load_whole(self.student, checkpoint.model)
        if self.teacher:
            sharding.load_whole(self.teacher, checkpoint.teacher)
        load_optimizer_tensors(self.optimizer.optimizer, self.student, checkpoint.optimizer)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = state["step"]
        self.best_score, self.refined = state["best_score"], state.get("refined", False)
        self.earlier_s = state["train_seconds"]
        self.accelerator.print(f"resuming {self.run} at step {self.step}")

    def summary(self) -> str:
        accelerator = self.accelerator
        precision = accelerator.mixed_precision.replace("no", "fp32")
        millions = sum(p.numel() for p in self.student.parameters()) / 1e6
        processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
        shards = " in shards" if self.sharded else ""
        return f"{self.run}: {processes} on {accelerator.device.type}, {precision}, {millions:.2f} M parameters{shards}"

    @property
    def logged_step(self) -> int:
        """The step, as rows of the log count it: updates of refinement count, too."""
        return self.step + self.refined * self.config.train.refine_steps

    @property
    def train_seconds(self) -> float:
        """Wall-clock seconds of training and its evaluations, earlier sessions counted in."""
        return self.earlier_s + time.monotonic() - self.started_s

    @contextmanager
    def progress(self) -> Iterator[tqdm]:
        if self.accelerator.is_main_process:
            self.tracker = Tracker(self.run, self.config, self.logged_step)
        self.started_s = time.monotonic()
        with tqdm(
            total=self.config.train.steps,
            initial=self.step,
            desc=self.run.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            yield bar

    def agree(self, signal_number: int) -> int:
        """A signal that any process caught, at the same step on all of them; 0 for none."""
        if self.accelerator.num_processes == 1:
            return signal_number
        if self.step % self.config.train.log_every:
            return 0
        caught = torch.tensor([signal_number], device=self.accelerator.device)
        return int(self.accelerator.gather(caught).max())

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()


class Sums:
    """Running sums between two rows of the log. They stay on the device: no step waits for a number."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.targets: Tensor | None = None
        self.num_batches = 0
        self.num_clips = 0
        self.started_s = time.monotonic()

    def add(self, batch: Losses) -> None:
        if self.losses:
            torch._foreach_add_(list(self.losses.values()), [batch.losses[name] for name in self.losses])
        else:
            self.losses = {name: value.clone() for name, value in batch.losses.items()}
        self.targets = batch.targets
        self.num_batches += 1
        self.num_clips += batch.num_clips

    def means(self) -> dict[str, float]:
        """Means over batches, which are global ones, with the collapse diagnostics of the last one's targets."""
        assert self.targets is not None
        names = list(self.losses)
        stacked = torch.stack([self.losses[name].float() for name in names]) / self.num_batches
        values = dict(zip(names, stacked.tolist(), strict=True))
        elapsed_s = time.monotonic() - self.started_s
        return values | {
            "effective_rank": effective_rank(self.targets),
            "embedding_std": float(self.targets.std(dim=0).mean()),
            "clips_per_s": self.num_clips / elapsed_s,
        }


# ----------------------------------------------------------------------------------------------------- machinery


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Raises UserError: Accelerate is set to another engine than PyTorch; a launcher's variables are not valid."""
    world_size = check_launch_environment()
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16() else "fp32"
    # Accelerate names it in the old way, of which torch warns in every process.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # Accelerate drops a value that equals its own default, which is not that of every backend: hence the microsecond.
    timeout = timedelta(seconds=config.timeout_s, microseconds=1)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        # Without this, processes that were launched together without a GPU would each train alone.
        cpu=world_size > 1 and not torch.cuda.is_available(),
        kwargs_handlers=[
            # Buffers are batch-norm statistics, which the forward pass does not read in training.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )
    if accelerator.distributed_type in OTHER_ENGINES:
        raise UserError(
            f"Accelerate is set to {accelerator.distributed_type.value}, which does not run here: use a file of "
            "configs/accelerate (docs/multi_node.md)"
        )
    return accelerator


def compile_mode(config: TrainConfig, accelerator: Accelerator) -> str | None:
    """torch.compile's mode; None: nothing is compiled.

    Raises:
        UserError: there are several processes, between which the encoder's batch norm communicates.
    """
    if config.compile in ("default", "max-autotune"):
        if accelerator.num_processes > 1:
            raise UserError(f"train.compile={config.compile} is for one process: set train.compile=none")
        return config.compile
    gpu_alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return "default" if config.compile == "auto" and gpu_alone else None


def check_same_everywhere(accelerator: Accelerator, config: Config, resume: bool, stream_fingerprint: str) -> None:
    """Raises UserError: processes were started with different configs, or see different videos."""
    own = flatten(to_dict(config)) | {"--resume": resume, "fingerprint of the videos": stream_fingerprint}
    first, *others = gather_object([own])
    for process, other in enumerate(others, start=1):
        for key, value in first.items():
            if other[key] != value:
                raise UserError(
                    f"process {process} has {key}={other[key]!r}, the first has {value!r}: start all processes with "
                    "the same command, on the same videos"
                )


def is_lost_connection(error: BaseException) -> bool:
    """Whether torch.distributed says that other processes cannot be reached. (Of Gloo it comes as a RuntimeError.)"""
    return isinstance(error, DistError) or "gloo/transport" in str(error)


def told_by_backend(error: BaseException) -> str:
    """The first sentence of its message, without the place in its source."""
    return re.split(r"\.\s|\n", re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()))[0].rstrip(".")


@contextmanager
def lost_connections_told() -> Iterator[None]:
    """One clear line where processes lose each other before training."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise UserError(
            f"cannot reach the other processes ({told_by_backend(error)}): see what they say, and whether all hosts "
            "reach the first one's address and port (docs/multi_node.md)"
        ) from error


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Catch SIGINT and SIGTERM; yields a function that tells the number of the one that came, or 0."""
    caught: list[int] = []
    caught_s = 0.0

    def remember(signal_number: int, _frame: Any) -> None:
        nonlocal caught_s
        if not caught:
            caught.append(signal_number)
            caught_s = time.monotonic()
        elif time.monotonic() - caught_s > ECHO_S:
            raise KeyboardInterrupt  # asked twice: do not wait for the step to finish

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
