"""The networks and the optimiser of a run, and one optimiser step."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from warnings import catch_warnings, filterwarnings

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from data_pipelines.transforms import on_device
from worldmodel.build import build_training_model, clip_layout
from worldmodel.config import Config, TeacherObjective
from worldmodel.data import training_inputs
from worldmodel.nets.teacher import Teacher
from worldmodel.runs.checkpoint import check_finite
from worldmodel.training import full_state, sharding
from worldmodel.training.augment import augmented
from worldmodel.training.batch_norm import replace_batch_norm
from worldmodel.training.finite import Guard, NotFiniteStep, first_overflow, overflowed_gradients
from worldmodel.training.gradients import Losses, MicroBatch, compute_gradients, micro_batches, snapshot_buffers
from worldmodel.training.launch import compile_mode, is_lost_connection, raised_together
from worldmodel.training.losses import TrainingModel
from worldmodel.training.optimisation import (
    ema_momentum,
    learning_rate,
    parameter_groups,
    set_lr,
    step_generator,
    warmed_up_beta,
)
from worldmodel.training.step_log import StepLog

MIN_SCALE = 2.0**-24
"""A GradScaler halves its scale at each step whose gradients overflow. At this scale they will always overflow."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_seeds(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch. That of NumPy takes 32 bits."""
    set_seed(seed % 2**32)
    torch.manual_seed(seed)


def check_something_learns(config: Config, student: TrainingModel) -> None:
    """Check that training, and refinement without the encoder, have weights to learn.

    Raises:
        UserError: they have none, as a sum with the embedding of a fixed encoder, without a latent.
    """
    fixed = {id(parameter) for parameter in student.embedder.parameters()}
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    about = f"model.latent={config.model.latent.name} with model.editor={config.model.editor.name}"
    if not learned:
        raise UserError(f"nothing of this model is learned: {about}, and an encoder that is fixed")
    if config.train.refine_steps and all(id(parameter) in fixed for parameter in learned):
        raise UserError(
            f"train.refine_steps={config.train.refine_steps}: apart from the encoder, nothing of this model is learned "
            f"({about}): set train.refine_steps=0"
        )


class Trainer:
    """The state of a training, and one optimiser step at a time.

    step is the number of finished steps. student and teacher are the networks themselves; model is the student as
    Accelerate wraps it. turns is the context in which a step is computed, once its batch is there (turns.py).
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.layout = clip_layout(config)
        self.step = 0
        self.turns: AbstractContextManager[None] = nullcontext()
        set_seeds(config.seed)
        self.student = build_training_model(config)
        check_something_learns(config, self.student)
        # The teacher starts as a copy of the student. It is outside of the wrapped module.
        self.teacher = Teacher(self.student.embedder) if self.student.objective.needs_teacher else None
        self.sharded = sharding.fsdp_requested(accelerator)
        if self.sharded and config.train.grad_accumulation > 1 and self.student.compares_clips:
            raise UserError(
                f"train.grad_accumulation={config.train.grad_accumulation}: a loss that compares clips cannot be "
                "accumulated with sharded weights: set train.grad_accumulation=1"
            )
        if accelerator.num_processes > 1 or accelerator.device.type == "cpu":
            # Not in the objective, which sees clips of all processes already.
            student = self.student
            for network in (self.teacher, student.embedder, student.editor, student.latent, student.scene):
                if isinstance(network, nn.Module):
                    replace_batch_norm(network, accelerator.device)
        self._blank_student = sharding.meta_copy(self.student) if self.sharded else None
        self._blank_teacher = sharding.meta_copy(self.teacher) if self.sharded and self.teacher else None
        if mode := compile_mode(config.train.compile, accelerator):
            for embedder in (self.student.embedder, *([self.teacher.embedder] if self.teacher else [])):
                embedder.encoder.compile(mode=mode)
        self._prepare()
        scaled = accelerator.scaler is not None
        self.guard = Guard(self.optimizer.optimizer, accelerator.device, scaled=scaled, sharded=self.sharded)
        self.log = StepLog(accelerator.device, DTYPES.get(accelerator.mixed_precision, torch.float32))

    def _prepare(self) -> None:
        """Bring networks to the device, shard them if requested, and make the optimiser."""
        accelerator, train = self.accelerator, self.config.train
        if self.sharded:  # Accelerate's own sharding does not know of the teacher
            accelerator.prepare_model(self.student, device_placement=False, evaluation_mode=True)
            for network in self.networks:
                sharding.shard(network)
        elif self.teacher:
            self.teacher.to(accelerator.device)
        optimizer = torch.optim.AdamW(parameter_groups(self.student, train.weight_decay), train.lr, fused=True)
        if self.sharded:
            self.model, self.optimizer = self.student, accelerator.prepare_optimizer(optimizer)
            return
        with catch_warnings():  # Accelerate uses the deprecated name of an argument, and torch warns on every process
            filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.model, self.optimizer = accelerator.prepare(self.student, optimizer)

    @property
    def networks(self) -> list[nn.Module]:
        """The student, and the teacher if there is one."""
        return [self.student, *([self.teacher] if self.teacher else [])]

    def full_networks(self) -> tuple[TrainingModel, nn.Module]:
        """Return the student and the encoder of targets with full weights. All processes call it together.

        With sharded weights they are temporary copies, otherwise the networks themselves.
        """
        student, teacher, device = self.student, self.teacher, self.accelerator.device
        if self._blank_student:
            student = sharding.materialise(self._blank_student, student, device)
        if teacher and self._blank_teacher:
            teacher = sharding.materialise(self._blank_teacher, teacher, device)
        return student, teacher or student.embedder

    # ------------------------------------------------------------------------------------------------------ one step

    def update(self, batches: Iterator[Batch]) -> None:
        """Take one optimiser step on the next batch."""
        config, timed = self.config, self.log.times
        set_lr(self.optimizer, self.lr_at(self.step))
        parts = self.next_parts(batches)
        with self.turns:
            losses = self.compute_gradients(parts)
            with timed("step"), timed("optimiser"):
                if config.train.clip_norm:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), config.train.clip_norm)
                self.guard.watch(losses.losses["loss"])
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.log.add(losses)
                if self.teacher:
                    self.teacher.update(self.student.embedder, self.momentum_at(self.step))
        self.step += 1

    def next_parts(self, batches: Iterator[Batch]) -> list[MicroBatch]:
        """Return the micro-batches of the next step."""
        config, device, timed = self.config, self.accelerator.device, self.log.times
        with timed("step"), timed("data"):
            batch = augmented(next(batches), config, self.step, device)
            rows = on_device(batch["row"], device)
            inputs = training_inputs(batch, self.layout, config.objective.rollout_steps, device)
            return micro_batches(inputs, rows, config.train.grad_accumulation)

    def compute_gradients(self, parts: list[MicroBatch]) -> Losses:
        """Compute the losses and gradients of the next step, on its micro-batches."""
        config, accelerator, timed = self.config, self.accelerator, self.log.times
        with timed("step"), self.log.flops_counted():
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

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        train = self.config.train
        return learning_rate(step, train.lr, train.warmup_steps, train.steps)

    def beta_at(self, step: int) -> float:
        """Return the weight of the KL in a step."""
        return warmed_up_beta(step, self.student.beta, self.config.objective.beta_warmup_steps)

    def momentum_at(self, step: int) -> float:
        """Return the momentum of the teacher in a step."""
        objective = self.config.objective
        assert isinstance(objective, TeacherObjective)
        return ema_momentum(step, objective.ema_momentum, objective.ema_schedule, self.config.train.steps)

    # -------------------------------------------------------------------------------------------------------- safety

    def check_steps(self) -> None:
        """Check that all steps since the last call were finite.

        Raises:
            NotFiniteStep: a loss or a gradient was not finite.
        """
        if num_steps := self.guard.num_steps():
            raise NotFiniteStep(self.step - num_steps + 1)
        if (scaler := self.accelerator.scaler) and scaler.get_scale() < MIN_SCALE:
            raise NotFiniteStep(self.step, "gradients still overflow at the least scale of fp16")

    def explain(self, error: NotFiniteStep, batches: Iterator[Batch]) -> NotFiniteStep:
        """Return the error with the module that overflowed first. All processes call it together.

        The step runs again on its own batch and weights, which have not changed since.
        """
        self.step = error.step - 1
        networks = nn.ModuleDict({"student": self.student} | ({"teacher": self.teacher} if self.teacher else {}))
        gradients: list[str] = []
        # Computing with such values may fail, or the other processes may be gone: hence `suppress`, innermost.
        with (
            torch.compiler.set_stance("force_eager"),
            first_overflow(networks) as modules,
            suppress(RuntimeError, UserError),
        ):
            self.compute_gradients(self.next_parts(batches))
            gradients = overflowed_gradients(self.student)
        what = error.what
        if modules:
            what = f"the loss is not finite, first the output of {modules[0].removeprefix('student.')}"
        elif gradients:
            what = f"a gradient is not finite, first that of {gradients[0]}"
        return NotFiniteStep(error.step, what)

    @contextmanager
    def restore_stats_on_disconnect(self) -> Iterator[None]:
        """If the gradients of other processes do not arrive, restore the batch-norm statistics changed in this step."""
        restore = snapshot_buffers(*(self.networks if self.saves_alone else []))
        try:
            yield
        except RuntimeError as error:
            if is_lost_connection(error):
                restore()
            raise

    @property
    def saves_alone(self) -> bool:
        """True if this process saves a checkpoint after losing the others: only on CPU, and only unsharded.

        A GPU may hang in the abandoned collective. Of sharded weights, the others have their shards.
        """
        accelerator = self.accelerator
        others = accelerator.num_processes > 1 and not self.sharded
        return accelerator.is_main_process and others and accelerator.device.type == "cpu"

    # --------------------------------------------------------------------------------------------------- checkpoints

    def full_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return model, teacher and optimizer with full tensors; empty on all processes but the first.

        Communicates only if weights are sharded.

        Raises:
            UserError: a value is not finite. All processes raise it.
        """
        optimizer = self.optimizer.optimizer
        if self.accelerator.num_processes > 1:
            own = full_state.optimizer_state(self.student, optimizer, full=False)
            with raised_together() if self.sharded else nullcontext():
                teacher = self.teacher.state_dict() if self.teacher else {}
                check_finite(self.step, model=self.student.state_dict(), teacher=teacher, optimizer=own)
        return {
            "model": full_state.network_state(self.student),
            "teacher": full_state.network_state(self.teacher) if self.teacher else {},
            "optimizer": full_state.optimizer_state(self.student, optimizer),
        }

    def load_full_state(
        self,
        model: dict[str, torch.Tensor],
        teacher: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor],
    ) -> None:
        """Load the tensors of `full_state`, which the first process has. All processes call it together."""
        full_state.load_network_state(self.student, model)
        if self.teacher:
            full_state.load_network_state(self.teacher, teacher)
        full_state.load_optimizer_state(self.student, self.optimizer.optimizer, optimizer)
