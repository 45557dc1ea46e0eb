import os
from pathlib import Path

import pytest
import torch
from accelerate.utils import parse_flag_from_env

from tests.conftest import run_python
from worldmodel.training import machine
from worldmodel.training.launch import FLAG_VALUES
from worldmodel.training.machine import computes_bf16, fair_share_of_cores, peak_flops_per_s

KEPT = """
import os, threading
from worldmodel.commands import process
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
for number in (1, 1, 99_999):
    process.pin_to_own_cores(number)
    print(*os.sched_getaffinity(0), *os.sched_getaffinity(thread.native_id))
stop.set()
"""


@pytest.mark.parametrize(
    ("name", "in_16_bits", "in_fp32"),
    [
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_the_peak_of_a_known_gpu(name: str, in_16_bits: float, in_fp32: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    cuda = torch.device("cuda")
    assert peak_flops_per_s(cuda, torch.float16) == peak_flops_per_s(cuda, torch.bfloat16) == in_16_bits
    assert peak_flops_per_s(cuda, torch.float32) == in_fp32


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_the_peak_of_another_device_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    monkeypatch.setattr("worldmodel.training.machine.measured_flops_per_s", lambda *_: 7.0)
    assert peak_flops_per_s(torch.device("cuda"), torch.float32) == 7


def test_a_processor_computes_some_gigaflops() -> None:
    assert 1e8 < peak_flops_per_s(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(machine.CORES) < 2, reason="needs Linux and two cores")
def test_a_process_and_its_threads_keep_to_cores_of_their_own() -> None:
    """The second of as many as there are cores; a process beyond those stays where it is."""
    done = run_python("-c", KEPT, LOCAL_WORLD_SIZE=str(len(machine.CORES)))
    assert done.stdout.splitlines() == [f"{machine.CORES[1]} {machine.CORES[1]}"] * 3, done.stderr


@pytest.mark.parametrize(("cores", "processes", "share"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_processes_share_cores(cores: int, processes: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CORES", list(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert fair_share_of_cores() == share


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_amx_is_found_where_the_kernel_finds_it() -> None:
    assert machine.has_amx() == (" amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))


@pytest.mark.parametrize("of_cpu", [False, True])
def test_the_precision_is_that_of_the_device_that_computes(of_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a GPU that is not used."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not of_cpu)
    monkeypatch.setattr("worldmodel.training.machine.cpu_computes_bf16", lambda: of_cpu)
    assert computes_bf16(torch.device("cpu")) == of_cpu
    assert computes_bf16(torch.device("cuda")) == computes_bf16() == (not of_cpu)


@pytest.mark.parametrize("value", sorted({*FLAG_VALUES, "True", "ON", "No"}))
def test_the_cpu_is_asked_for_as_accelerate_understands_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.uses_gpu() != parse_flag_from_env("ACCELERATE_USE_CPU")
