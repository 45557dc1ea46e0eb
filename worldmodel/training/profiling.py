"""The cost of a training step: its floating-point operations, and a profile of a few steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from data_pipelines.errors import one_line, one_line_logger
from data_pipelines.files import remove, write_text
from worldmodel.runs.folder import RunFolder

logger = one_line_logger(__name__)

PROFILED_STEPS = 5
WARMUP_STEPS = 2
"""Steps that the profiler records and discards, because its start is slow."""
WAITED_STEPS = 5
"""Steps before the warm-up, in which libraries choose algorithms and allocate memory."""
TABLE_ROWS = 30


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of convolutions, matrix products and attention in `total`.

    The formulas are PyTorch's: a multiply-add counts as two operations, element-wise operations and norms as none.
    Compiled code is not counted. PyTorch's FlopCounterMode tracks modules as well, and therefore fails with
    torch.autograd.grad; the mode and the table of formulas that both use have no public name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in CPU_ATTENTION:
            self.total += CPU_ATTENTION[func](*(tensor.shape for tensor in args[:4]))
        elif formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


_ATEN = torch.ops.aten
# Attention on CPUs, which PyTorch's table lacks. Forward takes query, key and value; backward the gradient and these.
CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: lambda *shapes: sdpa_flop_count(*shapes[:3]),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: sdpa_backward_flop_count,
}


@contextmanager
def profiled(run: Path, device: torch.device, num_steps: int) -> Iterator[Callable[[], None]]:
    """Profile a few of the remaining `num_steps` steps. Yields a function to call after each step.

    Writes RUN/profile/trace.json.gz, for https://ui.perfetto.dev or chrome://tracing, and RUN/profile/table.txt, the
    operators with the longest own time.
    """
    active = min(PROFILED_STEPS, num_steps)
    warmup = min(WARMUP_STEPS, num_steps - active)
    wait = min(WAITED_STEPS, num_steps - active - warmup)
    if not active:
        logger.warning("no step is left to profile")
        yield lambda: None
        return
    on_gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
        on_trace_ready=lambda profiler: _write(profiler, RunFolder(run).profile, "cuda" if on_gpu else "cpu"),
        record_shapes=True,
    ) as profiler:
        yield profiler.step


def _write(profiler: profile, folder: Path, device: str) -> None:
    """Write a profile. Training, which calls this between two steps, continues if that fails."""
    trace = folder / "trace.json.gz"
    try:
        for path in (folder, trace):
            if path.is_symlink():
                path.unlink()
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=TABLE_ROWS)
        write_text(folder / "table.txt", table)
    except OSError as error:
        logger.warning("the profile cannot be written into %s: %s", folder, one_line(error))
        with suppress(OSError):
            remove(trace)
        return
    logger.info("wrote %s: trace.json.gz, table.txt", folder)
