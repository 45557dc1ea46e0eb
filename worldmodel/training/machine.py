"""Properties of this machine: processor, cores, peak FLOP/s, memory and processes. Nothing here changes anything."""

import os
import platform
import time
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from data_pipelines.processes import environment_int
from worldmodel.nets.cpu import cpu_flags, cpuinfo, has_amx
from worldmodel.training.timing import synchronise

TRUE_VALUES = frozenset(["y", "yes", "t", "true", "on", "1"])
"""Values of environment variables that are true for Accelerate, in lower case."""


def computes_bf16(device: torch.device | None = None) -> bool:
    """Return True if a device has native bf16 arithmetic; None: the device that Accelerate will train on."""
    if uses_gpu() if device is None else device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bf16()


def uses_gpu() -> bool:
    """Return True if Accelerate will train on a GPU."""
    cpu_only = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in TRUE_VALUES
    return torch.cuda.is_available() and not cpu_only


def cpu_computes_bf16() -> bool:
    """Return True if the processor has native bf16 arithmetic (AVX512-BF16 or AMX)."""
    return "avx512_bf16" in cpu_flags() or has_amx()


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
"""The cores that this process may use, as it was started."""


def fair_share_of_cores() -> int:
    """Return the number of cores for each training process of this machine.

    Launchers set OMP_NUM_THREADS=1, which wastes the others.

    Raises:
        UserError: LOCAL_WORLD_SIZE is not a whole number of at least 1.
    """
    return max(1, len(CORES) // environment_int("LOCAL_WORLD_SIZE", 1, least=1))


def busy_cores() -> int:
    """Return how many cores of this process other programs keep busy: on average over the last minute, and now.

    The lesser of both counts, rounded. Programs of low priority do not count. This process should compute nothing
    meanwhile.
    """
    over_a_minute = psutil.getloadavg()[0]
    if round(over_a_minute) < 1:
        return 0
    # Within less than a second, the percentages of a core do not sum to 100.
    cores = psutil.cpu_times_percent(LOAD_WINDOW_S, percpu=True)
    shares = [(times.user + times.system) / max(sum(times), 1e-9) for times in cores]
    now = sum(shares[core] for core in CORES if core < len(shares))
    return round(min(over_a_minute, now))


def machine_description() -> dict[str, Any]:
    """Describe the conditions of a benchmark: processor, cores, threads, load, GPU, versions."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_computes_bf16": cpu_computes_bf16(),
        "cores": fair_share_of_cores(),
        "threads": torch.get_num_threads(),
        "load_1min": round(psutil.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_model() -> str:
    """Return the processor's name, as far as the system reports it."""
    names = [value for key, value in cpuinfo() if key == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


# Peak TFLOP/s without sparsity by device name: in 16 bits with sums in fp32, and in fp32. For fp32 it is the TF32 rate
# if the GPU has one, because convolutions may use it. Source: the vendor's data sheets and white papers.
GPU_PEAK_TFLOPS = {
    "* H200": (989.4, 494.7),
    "* H200 NVL": (835.0, 417.5),
    "* H100 80GB HBM3": (989.4, 494.7),
    "* H100 NVL": (835.0, 417.5),
    "* H100 PCIe": (756.0, 378.0),
    "* A100-*-?0GB": (312.0, 156.0),
    "* A100 80GB PCIe": (312.0, 156.0),
    "* L40S": (362.0, 183.0),
    "* V100-SXM2-??GB": (125.0, 15.7),
    "* V100-PCIE-??GB": (112.0, 14.0),
    "* RTX 4090": (165.2, 82.6),
    "* RTX 3090": (71.0, 35.6),
}
LOAD_WINDOW_S = 0.5
MEASURED_S = 0.2
MEASURED_SIZES = (128, 8192)


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s of a device in a precision.

    For known GPUs it comes from the data sheet. Otherwise it is measured in some tenths of a second, as the best of
    several matrix products with the current number of threads.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for pattern, (in_16_bits, in_fp32) in GPU_PEAK_TFLOPS.items():
        if fnmatchcase(name, pattern):
            return 1e12 * (in_fp32 if dtype == torch.float32 else in_16_bits)
    return measured_flops_per_s(device, dtype)


@cache
def measured_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate of several products of square matrices, which grow while a product is too fast to time.

    A process measures it once.
    """
    size, largest = MEASURED_SIZES
    best, spent_s = 0.0, 0.0
    while spent_s < MEASURED_S:
        a, b = torch.ones(2, size, size, device=device, dtype=dtype)
        synchronise(device)
        started_s = time.perf_counter()
        a @ b
        synchronise(device)
        seconds = time.perf_counter() - started_s
        best, spent_s = max(best, 2 * size**3 / seconds), spent_s + seconds
        if seconds < MEASURED_S / 20 and size < largest:
            size *= 2
    return best


def memory_mb(pid: int, entry: str) -> float:
    """Return the memory of a process in MiB, as Linux counts it.

    entry: "VmHWM" for the peak resident size, "Pss" for the current resident size. Pss divides shared pages by the
    number of processes that share them.
    """
    source = Path(f"/proc/{pid}/{'smaps_rollup' if entry == 'Pss' else 'status'}")
    lines = source.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{entry}:"))


def child_processes(pid: int) -> list[int]:
    """Return the ids of the living children of a process (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
