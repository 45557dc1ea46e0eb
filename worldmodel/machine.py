"""What this machine has, and how to use it well."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch


def computes_bf16() -> bool:
    """Whether the device that Accelerate will train on has bf16 arithmetic of its own."""
    cpu_only = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if torch.cuda.is_available() and not cpu_only:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bf16()


def cpu_computes_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fair_share_of_cores() -> int:
    """Cores for one of the training processes of this machine. (A launcher's OMP_NUM_THREADS=1 wastes the others.)"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
    """Have glibc keep freed blocks of up to 32 MiB for the next step: on a CPU, new ones fault page by page."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


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
