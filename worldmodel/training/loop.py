"""The training loop, on Hugging Face Accelerate.

Every random number of a step is a function of (seed, step) and of a clip's place in the batch. Weights, optimiser state
and the step are therefore all that a checkpoint needs for a resume that is bit-for-bit exact, on any number of
processes.
"""

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.splits import SPLITS
from worldmodel.build import clip_layout
from worldmodel.config import Config, EvaluationConfig, TrainConfig, cautions, flatten, to_dict
from worldmodel.data import check_contents, check_splits, evaluation_uses, training_uses
from worldmodel.evaluation.quantity import check_label
from worldmodel.runs.checkpoint import remove_leftovers
from worldmodel.runs.lock import run_lock
from worldmodel.runs.opening import open_run
from worldmodel.runs.tracking import RowLostError
from worldmodel.runs.wandb_tracking import wandb_mode
from worldmodel.sources import make_source
from worldmodel.sources.source import Source
from worldmodel.sources.videos import VideosSource
from worldmodel.training.augment import check_augmentation
from worldmodel.training.cached_videos import cached_videos
from worldmodel.training.finite import NotFiniteStep
from worldmodel.training.launch import check_ranks_agree, is_lost_connection, launched
from worldmodel.training.profiling import profiled
from worldmodel.training.refine import refinement_stream, steps_of
from worldmodel.training.session import Session, Stop
from worldmodel.training.start_from import check_start, start_from
from worldmodel.training.trainer import Trainer
from worldmodel.training.turns import turns_here

logger = one_line_logger(__name__)


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, profile: bool = False, stop: Stop = lambda: 0
) -> Path:
    """Train to config.train.steps updates, refine, and return the run folder.

    It changes neither threads nor signal handlers: a command does (worldmodel/commands/process.py).

    Args:
        resume: Continue from the latest checkpoint of the run folder, if there is one.
        overwrite: Replace the run that the folder holds.
        profile: The first process writes a profile of a few steps into the run folder.
        stop: Called after each step. Returns the number of the signal that asks training to stop, or 0.

    Raises:
        RunExistsError: the folder already holds a run, and neither `resume` nor `overwrite` is given.
        OtherConfigError: the folder holds a run of another config, and `resume` is given.
        VideosChangedError: the videos differ from those of the checkpoint.
        ConnectionLostError: other processes were lost during training.
        RowLostError: a row of metrics.jsonl cannot be written.
        UserError: another mistake of the user.
        Interrupted: `stop` asked for it. The checkpoint of the last finished step is saved.

    Examples:
        >>> config = worldmodel.load_config("demo", ["train.steps=400"])
        >>> folder = worldmodel.train(config)
    """
    if resume and overwrite:
        raise UserError("a run is either resumed or overwritten: leave out one of the two")
    run, train_config = Path(config.run_dir), config.train
    wandb_mode(config.tracking.wandb)  # reports a mistake before there is a run folder
    with launched(train_config.precision, train_config.timeout_s) as accelerator, ExitStack() as held:
        source, stream, fingerprint = open_run_and_stream(config, accelerator, held, resume=resume, overwrite=overwrite)
        settings = flatten(to_dict(config)) | {"resume": resume, "fingerprint of the videos": fingerprint}
        check_ranks_agree(settings)
        source = cached_videos(config, source, accelerator, stop)
        trainer = Trainer(config, accelerator)
        session = Session(trainer, run, source, stream.fingerprint, stop)
        if resume:
            session.load()
        if train_config.start_from and session.saved_step < 0:
            start_from(trainer, train_config.start_from)
        accelerator.print(session.summary())
        for caution in cautions(config) if accelerator.is_main_process else ():
            logger.warning(caution)
        if config.train.encoder_cache:
            stream = training_stream(config, source, accelerator)
        trainer.log.times.labelled = profiles = profile and accelerator.is_main_process
        profiler = profiled(run, accelerator.device, train_config.steps - trainer.step) if profiles else nullcontext()
        with (
            session.writing() as bar,
            profiler as profile_step,
            turns_here(accelerator) as trainer.turns,
            closing(stream.batches(trainer.step)) as batches,
            explained_errors(session, stream, batches),
        ):
            if session.awaits_evaluation:
                session.save(session.evaluate())
            while trainer.step < train_config.steps:
                with trainer.restore_stats_on_disconnect():
                    trainer.update(batches)
                bar.update()
                if profile_step:
                    profile_step()
                due = Due.after(trainer.step, train_config)
                session.awaits_evaluation = due.evaluation
                if any(due):
                    trainer.check_steps()
                if due.row:
                    session.write_row()
                is_best = due.evaluation and session.evaluate()
                if due.checkpoint or is_best:
                    session.save(is_best)
                session.stop_if_asked()
            if session.saved_step != trainer.step:
                session.save()
            if train_config.refine_steps and not session.refined:
                batches.close()  # frees the memory of decoded clips, and ends the decoding processes
                session.refine()
    return run


class Due(NamedTuple):
    """The tasks that are due after a step."""

    row: bool
    evaluation: bool
    checkpoint: bool

    @classmethod
    def after(cls, step: int, config: TrainConfig) -> "Due":
        """Return the tasks after `step` finished steps. Rows and evaluations are due after the last step, too."""
        is_last = step == config.steps
        return cls(
            is_last or step % config.log_every == 0,
            is_last or step % config.eval_every == 0,
            step % config.checkpoint_every == 0,
        )


def open_run_and_stream(
    config: Config, accelerator: Accelerator, held: ExitStack, *, resume: bool, overwrite: bool
) -> tuple[Source, BatchStream, str]:
    """Open the run folder and the videos, and return source, stream and a fingerprint of all that is read.

    The first process indexes the videos, then the first of each other host; the others find an index. The run folder
    is read and written by the first process alone: other hosts need not see it. Its lock is entered into `held`.

    Raises:
        UserError: the videos do not fit the config, or the run folder cannot be used.
    """
    labels = clip_layout(config).labels | set(config.data.augment.position_labels)
    labels |= {config.evaluation.label} if config.evaluation.label else set()
    uses = training_uses(config.objective.rollout_steps, steps_of(config) if config.train.refine_steps else None)
    uses |= evaluation_uses(config.evaluation.horizon, config.evaluation.recalibrate)
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        source = make_source(config)
        check_splits(source, labels, uses)
        check_forecast_label(source, config.evaluation)
        check_augmentation(source, config)
        stream = training_stream(config, source, accelerator)
        if config.train.refine_steps:
            refinement_stream(source, config, accelerator.device)  # reports missing videos before hours of training
        if accelerator.is_main_process:
            run = Path(config.run_dir)
            if config.train.start_from and not resume:
                check_start(config.train.start_from, run)
            held.enter_context(run_lock(run))
            open_run(run, to_dict(config), resume=resume, overwrite=overwrite)
            remove_leftovers(run)
            check_contents(source, labels, run)
    contents = source.contents(labels)
    return source, stream, stream.fingerprint + (f"-{contents.hash()}" if contents else "")


def check_forecast_label(source: Source, config: EvaluationConfig) -> None:
    """Check, before hours of training, that evaluation.label is a label of frames in each split.

    Where a law is known, its quantity is forecast in place of a label.

    Raises:
        UserError: it is not.
    """
    if config.label is None or not isinstance(source, VideosSource) or source.known_law("test", config.horizon):
        return
    for split in SPLITS:
        sizes = {name: values.shape[1] for name, values in source.index(split).frame_labels.items() if values.ndim == 2}
        check_label(config.label, sizes)


def training_stream(config: Config, source: Source, accelerator: Accelerator) -> BatchStream:
    """Open this process's stream of training batches."""
    steps, rank, world_size = config.objective.rollout_steps, accelerator.process_index, accelerator.num_processes
    return source.training_stream(steps, rank=rank, world_size=world_size, device=accelerator.device)


@contextmanager
def explained_errors(session: Session, stream: BatchStream, batches: Generator[Batch]) -> Iterator[None]:
    """Replace errors of training by ones with their cause, after saving what can be saved."""
    try:
        yield
    except NotFiniteStep as error:
        batches.close()
        with closing(stream.batches(error.step - 1)) as again:
            raise session.not_finite(error, again) from None
    except RowLostError as error:
        raise session.row_lost(error) from error
    except RuntimeError as error:
        if is_lost_connection(error):
            raise session.connection_lost(error) from error
        raise
