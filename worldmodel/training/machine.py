"""What this machine has, and how to use it well."""

import ctypes
import os
import platform
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from data_pipelines.processes import environment_int
from worldmodel.nets.convolutions import has_amx
from worldmodel.training.timing import synchronise


def computes_bf16() -> bool:
    """Whether the device that Accelerate will train on has bf16 arithmetic of its own."""
    cpu_only = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if torch.cuda.is_available() and not cpu_only:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bf16()


def cpu_computes_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or has_amx())


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
"""Those that this process may use, as it was started."""


def fair_share_of_cores() -> int:
    """Cores for one of the training processes of this machine. (A launcher's OMP_NUM_THREADS=1 wastes the others.)"""
    return max(1, len(CORES) // environment_int("LOCAL_WORLD_SIZE", 1, least=1))


def set_threads(num_threads: int | None) -> None:
    """Compute with so many threads; None: with a fair share of the cores."""
    torch.set_num_threads(num_threads or fair_share_of_cores())


def keep_to_own_cores(process: int) -> None:
    """Keep all threads of one of the training processes of this machine, and what they start, on cores of its own.

    Processes that wait for each other at every layer are held up by each one that is moved onto another's core. Done
    on Linux, where there is a core for each.
    """
    share = fair_share_of_cores()
    own = CORES[process * share : (process + 1) * share]
    if own and hasattr(os, "sched_setaffinity"):
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), own)


def machine_description() -> dict[str, Any]:
    """What a benchmark's figures depend on: processor, cores, threads, load, GPU, versions."""
    load_1min = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_computes_bf16": cpu_computes_bf16(),
        "cores": fair_share_of_cores(),
        "threads": torch.get_num_threads(),
        "load_1min": load_1min,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: on a CPU, what is new faults page by page.

    No block has a mapping of its own, whatever its size, and none goes back to the system.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


# TFLOP/s without sparsity, in 16 bits with sums in fp32, and in fp32, for which convolutions may use TF32 where there
# is such, by the name that PyTorch tells. Source: the vendor's data sheets and white papers.
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
MEASURED_S = 0.2
MEASURED_SIZES = (128, 8192)


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a device computes in this precision at best.

    Of a GPU it is what the data sheet says; where that is not known, and of processors, it is the best of some matrix
    products by as many threads as are set, which take some tenths of a second.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for pattern, (in_16_bits, in_fp32) in GPU_PEAK_TFLOPS.items():
        if fnmatchcase(name, pattern):
            return 1e12 * (in_fp32 if dtype == torch.float32 else in_16_bits)
    return measured_flops_per_s(device, dtype)


def measured_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The best of some products of square matrices, which grow while they take next to no time."""
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
    """A process's memory in MiB, as Linux counts it.

    VmHWM: the largest resident size so far. Pss: the resident size now; pages that processes share are divided by them.
    """
    source = Path(f"/proc/{pid}/{'smaps_rollup' if entry == 'Pss' else 'status'}")
    lines = source.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{entry}:"))


def child_processes(pid: int) -> list[int]:
    """Its living children (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
