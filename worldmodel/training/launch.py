"""Launching: the environment of launchers, Accelerate, agreement of processes, and lost connections."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, gather_object
from torch.distributed import DistError

from data_pipelines.errors import UserError
from data_pipelines.processes import environment_int
from worldmodel.training.machine import TRUE_VALUES, computes_bf16, uses_gpu

OTHER_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
MPI_PREFIXES = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
FLAGS = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "FORK_LAUNCHED",
)
FLAG_VALUES = TRUE_VALUES | {"n", "no", "f", "false", "off", "0"}


class ConnectionLostError(UserError):
    """The other processes of a training were lost. The last finished step is saved where that is possible."""


@contextmanager
def launched(precision: str, timeout_s: float) -> Iterator[Accelerator]:
    """Yield an Accelerator, which joins the processes of a launcher. It can be entered again in the same process.

    An Accelerator that the process already has is reused and left as it is. The arguments are those of
    `make_accelerator`.

    Raises:
        UserError: processes lose each other before training, or as `make_accelerator`.
    """
    own = not is_initialized()
    with friendly_connection_errors():
        try:
            yield make_accelerator(precision, timeout_s)
        finally:
            if own:
                if is_initialized():
                    AcceleratorState().destroy_process_group()
                # Accelerate keeps precision and device for the whole process, and has no public way to forget them.
                AcceleratorState._reset_state(reset_partial_state=True)


def check_launch_environment() -> int:
    """Return the number of processes that a launcher started, as the environment has it.

    Raises:
        UserError: a variable that launchers set and Accelerate reads is not a valid number or flag, or variables
            contradict each other.
    """
    world_size = environment_int("WORLD_SIZE", 1, least=1)
    environment_int("LOCAL_WORLD_SIZE", world_size, least=1)
    for name in [prefix + suffix for prefix in MPI_PREFIXES for suffix in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")]:
        environment_int(name, 0)
    for name in ("RANK", "LOCAL_RANK"):
        if os.environ.get(name, "").strip() == "-1":
            continue  # the value of Accelerate and torchrun for a single process
        if (rank := environment_int(name, 0)) >= world_size:
            raise UserError(f"the environment has {name}={rank}, but WORLD_SIZE={world_size}: {name} must be less")
    if environment_int("MASTER_PORT", 1, least=0) > 65535:
        raise UserError(f"the environment variable MASTER_PORT={os.environ['MASTER_PORT']} is not a port below 65536")
    if world_size > 1:
        environment_int("OMP_NUM_THREADS", 0)
        if "RANK" not in os.environ and not any(prefix + "RANK" in os.environ for prefix in MPI_PREFIXES):
            raise UserError(
                f"the environment has WORLD_SIZE={world_size} but not RANK: start the processes with "
                "accelerate launch or torchrun, or unset WORLD_SIZE for one process"
            )
    for name in FLAGS:
        if os.environ.get(name, "0").lower() not in FLAG_VALUES:
            raise UserError(f"the environment variable {name}={os.environ[name][:40]!r} must be true or false")
    return world_size


def make_accelerator(precision: str, timeout_s: float) -> Accelerator:
    """Make the Accelerator of a training.

    Args:
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where it is computed natively, otherwise fp32.
        timeout_s: time that processes wait for each other before the connection counts as lost.

    Raises:
        UserError: Accelerate is set to an engine other than PyTorch, a launcher's variables are not valid, or
            precision is "fp16" without a GPU.
    """
    world_size = check_launch_environment()
    if precision == "auto":
        precision = "bf16" if computes_bf16() else "fp32"
    if precision == "fp16" and not uses_gpu():
        raise UserError("train.precision=fp16 needs a GPU: use auto, bf16 or fp32")
    # Accelerate ignores a timeout that equals its own default, which not every backend shares: hence the microsecond.
    timeout = timedelta(seconds=timeout_s, microseconds=1)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        # Without this, processes that were launched together without a GPU would train separately.
        cpu=world_size > 1 and not torch.cuda.is_available(),
        kwargs_handlers=[
            # Buffers are batch-norm statistics, which the forward pass does not read in training.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )
    if accelerator.distributed_type in OTHER_ENGINES:
        raise UserError(
            f"Accelerate is set to {accelerator.distributed_type.value}, which is not supported: use a file of "
            "configs/accelerate (docs/multi_node.md)"
        )
    return accelerator


def compile_mode(chosen: str, accelerator: Accelerator) -> str | None:
    """Return the mode of torch.compile for the value of train.compile, or None to compile nothing.

    Raises:
        UserError: there are several processes, between which the encoder's batch norm communicates.
    """
    if chosen in ("default", "max-autotune"):
        if accelerator.num_processes > 1:
            raise UserError(f"train.compile={chosen} needs a single process: set train.compile=none")
        return chosen
    single_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return "default" if chosen == "auto" and single_gpu else None


def check_ranks_agree(settings: Mapping[str, Any]) -> None:
    """Compare the settings of all processes, which call it together.

    Raises:
        UserError: processes were started with different settings, or read different videos.
    """
    first, *others = gather_object([dict(settings)])
    for process, other in enumerate(others, start=1):
        for key, value in first.items():
            if other[key] != value:
                raise UserError(
                    f"process {process} has {key}={other[key]!r}, the first has {value!r}: start all processes with "
                    "the same command, on the same videos"
                )


@contextmanager
def raised_together() -> Iterator[None]:
    """Raise the UserError of any process on all of them, which enter together. Of several, it is the first process's.

    Raises:
        UserError: a process raised it inside.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    if messages := [other for other in gather_object([message]) if other is not None]:
        raise UserError(messages[0])


def from_main_process(accelerator: Accelerator, number: int) -> int:
    """Return the number of the first process on all processes, which call it together."""
    own = int(number) if accelerator.is_main_process else 0  # a bool would have another type than the zeros
    return int(accelerator.reduce(torch.tensor(own, device=accelerator.device)))


def is_lost_connection(error: BaseException) -> bool:
    """Return True for an error of torch.distributed about unreachable processes. Gloo raises a RuntimeError."""
    return isinstance(error, DistError) or "gloo/transport" in str(error)


def backend_message(error: BaseException) -> str:
    """Return the first sentence of a backend's message, without the place in its source."""
    return re.split(r"\.\s|\n", re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()))[0].rstrip(".")


@contextmanager
def friendly_connection_errors() -> Iterator[None]:
    """Report processes that lose each other before training in one line.

    Raises:
        UserError: in place of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise UserError(
            f"cannot reach the other processes ({backend_message(error)}): read their messages, and check that all "
            "hosts reach the address and port of the first one (docs/multi_node.md)"
        ) from error
