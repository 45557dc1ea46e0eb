"""A GPU that is none: tensors say that they are on it, and the processor computes. It refuses to mix them with others,
as a GPU does, and counts what would make the program wait until a GPU has done all that it was given to do.

    python -m tests.worldmodel.pretend_gpu JOBS OUT

does JOBS and writes OUT, both JSON:

    {"train": {NAME: [CONFIG, [OVERRIDE, ...]]}, "scripts": [[SCRIPT, ARGUMENT, ...]]}
    {"waits": {NAME: {"OPERATOR at FILE:LINE": COUNT}}, "exit_codes": [CODE], "planted": {WHAT: COUNT}, "refuses": BOOL}

the waits of all steps but the first, and those of single operations (PLANTED). For processes of its own: a device is
made known to torch, and torch.Generator is replaced.
"""

import json
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.conftest import REPO
from worldmodel.commands.exits import leave
from worldmodel.config import load_config
from worldmodel.training import launch, step_log
from worldmodel.training.loop import train
from worldmodel.training.trainer import Trainer

NAME = "pretend"
ATEN = torch.ops.aten
INDEXING = (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)
READING = (
    ATEN._local_scalar_dense,
    ATEN._linalg_check_errors,
    ATEN._unique2,
    ATEN.equal,
    ATEN.masked_select,
    ATEN.nonzero,
    ATEN.repeat_interleave,
    ATEN.unique_consecutive,
    ATEN.unique_dim,
)
"""Operators that read values: as their result, to check them, or for the size of their result."""


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)  # all is computed in the precision that it has
torch.__future__.set_swap_module_params_on_conversion(True)  # the optimiser's parameters move along


class PretendGenerator(torch.Generator):
    """Draws by the processor, whatever its device."""

    def __new__(cls, device: torch.device | str = "cpu") -> "PretendGenerator":
        generator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        generator.said = torch.device(device)
        return generator

    said: torch.device
    device = property(lambda self: self.said)


torch.Generator = PretendGenerator  # type: ignore[misc, assignment]


class OnGpu(Tensor):
    """A tensor that says it is on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "OnGpu":
        return OnGpu(inner["held"])


class PretendGpu(TorchDispatchMode):
    """While it is entered, tensors can be made on DEVICE and brought there. `waits` counts by lines of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> "PretendGpu":
        torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device=...) would not come by here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args, kwargs or {}):
            self.waits[f"{func} at {our_line()}"] += 1
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator returns: on the device if its inputs are, or where it is told to."""
    inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    to_gpu = any(isinstance(value, OnGpu) for value in inputs)
    if kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    else:
        mixed = to_gpu and any(value.ndim and not isinstance(value, OnGpu) for value in inputs)
        if mixed and func.overloadpacket not in (ATEN.copy_, *INDEXING):
            raise RuntimeError(f"{func}: tensors on {DEVICE} and on the cpu")
    on_gpu = {id(value.held): value for value in inputs if isinstance(value, OnGpu)}
    held_args, held_kwargs = tree_map(lambda value: value.held if isinstance(value, OnGpu) else value, (args, kwargs))

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or any(value is given for given in inputs):
            return value
        if id(value) in on_gpu:  # changed in place
            return on_gpu[id(value)]
        return OnGpu(value) if to_gpu and func is not ATEN._local_scalar_dense.default else value

    return tree_map(placed, func(*held_args, **held_kwargs))


def waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator makes the program wait for the device."""
    operator = func.overloadpacket
    if operator in (ATEN._to_copy, ATEN.copy_):
        source = args[1 if operator is ATEN.copy_ else 0].device.type
        target = args[0].device if operator is ATEN.copy_ else kwargs.get("device") or source
        asynchronous = kwargs.get("non_blocking") or (operator is ATEN.copy_ and args[2:] == (True,))
        target = torch.device(target).type
        return target != source and not (asynchronous and target == NAME)
    if not any(isinstance(value, OnGpu) for value in tree_leaves((args, kwargs))):
        return False
    indices = [index for index in args[1] if index is not None] if operator in INDEXING else []
    # Indices are copied, and of a mask it must be known how many it takes.
    return operator in READING or any(not isinstance(i, OnGpu) or i.dtype == torch.bool for i in indices)


def our_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(REPO) and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.relative_to(REPO)}:{frame.lineno}"
    return "a backward pass"


PLANTED: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda on_gpu: float(on_gpu.sum()),
    "a copy to the cpu": lambda on_gpu: on_gpu.to("cpu", non_blocking=True),
    "a copy from the cpu": lambda on_gpu: torch.ones(3).to(on_gpu.device),
    "a constant": lambda on_gpu: torch.tensor([1.0], device=on_gpu.device),
    "a mask": lambda on_gpu: on_gpu[on_gpu > 0],
    "an index on the cpu": lambda on_gpu: on_gpu[torch.tensor([0])],
    "nothing: a sum": lambda on_gpu: on_gpu.sum(),
    "nothing: an index": lambda on_gpu: on_gpu[on_gpu.long()],
    "nothing: an asynchronous copy": lambda on_gpu: torch.ones(3).to(on_gpu.device, non_blocking=True),
    "nothing: a choice": lambda on_gpu: torch.where(on_gpu > 0, on_gpu, 0.0),
}


def planted_waits() -> dict[str, int]:
    found = {}
    for name, operation in PLANTED.items():
        with PretendGpu() as gpu:
            on_gpu = torch.ones(3, device=DEVICE).cumsum(0) - 1
            operation(on_gpu)
        found[name] = gpu.waits.total()
    return found


def refuses_mixtures() -> bool:
    with PretendGpu():
        try:
            torch.ones(3, device=DEVICE) + torch.ones(3)
        except RuntimeError:
            return True
    return False


def waits_of_steps(path: str, overrides: list[str]) -> Counter[str]:
    """Train on the device, with all that a training evaluates and saves: the waits of all steps but the first."""
    update = Trainer.update
    found: Counter[str] = Counter()
    gpu = PretendGpu()

    def spied(self: Trainer, batches: Any) -> None:
        gpu.waits.clear()
        update(self, batches)
        if self.step > 1:
            found.update(gpu.waits)

    with gpu, patch.object(Trainer, "update", spied), patch.object(step_log, "peak_flops_per_s", lambda *_: 1):
        train(load_config(REPO / "configs" / path, overrides))
    return found


def accelerator_on_it(precision: str, timeout_s: float, make: Any = launch.make_accelerator) -> Accelerator:
    accelerator = make(precision, timeout_s)
    accelerator.state.device = PartialState._shared_state["device"] = DEVICE
    return accelerator


def exit_code(script: str, *arguments: str) -> int:
    """Of a script with --device."""
    with PretendGpu(), patch.object(sys, "argv", [script, *arguments, "--device", NAME]):
        try:
            runpy.run_path(str(REPO / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    launch.make_accelerator = accelerator_on_it
    done = {
        "planted": planted_waits(),
        "refuses": refuses_mixtures(),
        "waits": {name: waits_of_steps(*job) for name, job in jobs["train"].items()},
        "exit_codes": [exit_code(*job) for job in jobs["scripts"]],
    }
    Path(sys.argv[2]).write_text(json.dumps(done))
    leave(0)
