"""Messages between processes of a machine, passed as memory.

A message is written to a file without a name, and the file's descriptor is sent through a socket. From then on the
system keeps it: the sender may be stopped or killed, and the memory is freed when no process uses it. On Linux the file
is a memfd, which is not part of /dev/shm and not limited by its size (64 MiB in many containers).
"""

import mmap
import os
import pickle
import socket
import struct
import tempfile
from array import array
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any, TypeAlias

Numbers: TypeAlias = Any  # a memoryview of float64, or a list of floats
ALIGNMENT = 64  # of buffers, in bytes
TABLE_BYTES = 4096  # for the sizes of the pickle and of its buffers
_SIZES = struct.Struct(f"={TABLE_BYTES // 8}Q")


def send_message(to: socket.socket, message: Any) -> None:
    """Send an object that can be pickled, copying NumPy arrays once. Raises OSError: no memory, or no receiver."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    file = _new_file()
    try:
        # Writing is faster than copying into mapped memory, each page of which faults.
        _write(file, memoryview(_SIZES.pack(len(sizes), *sizes, *[0] * (TABLE_BYTES // 8 - 1 - len(sizes)))), 0)
        start = TABLE_BYTES
        for part in parts:
            _write(file, part, start)
            start += _padded(part.nbytes)
        socket.send_fds(to, [b"m"], [file])
    finally:
        os.close(file)


def receive_message(source: socket.socket) -> Any:
    """Return the next message; its NumPy arrays are views of the memory. Raises EOFError, OSError: the sender ended."""
    memory = _receive_memory(source)
    count, *sizes = _SIZES.unpack_from(memory)
    start, parts = TABLE_BYTES, []
    for size in sizes[:count]:
        parts.append(memory[start : start + size])
        start += _padded(size)
    return pickle.loads(parts[0], buffers=parts[1:])


def share_numbers(to: socket.socket, values: Sequence[float]) -> Numbers:
    """Return numbers that this process shares with the one that calls receive_numbers; both may change them."""
    file = _new_file()
    try:
        _write(file, memoryview(array("d", values)).cast("B"), 0)
        numbers = memoryview(mmap.mmap(file, 0)).cast("d")
        socket.send_fds(to, [b"n"], [file])
    finally:
        os.close(file)
    return numbers


def receive_numbers(source: socket.socket) -> Numbers:
    """Return the numbers that the other process shares. Raises EOFError, OSError: it has ended."""
    return _receive_memory(source).cast("d")


def _receive_memory(source: socket.socket) -> memoryview:
    _, files, *_ = socket.recv_fds(source, 1, 1)
    if not files:
        raise EOFError("the sender has ended")
    try:
        return memoryview(mmap.mmap(files[0], 0))
    finally:
        os.close(files[0])


def is_waiting(source: socket.socket, timeout_s: float) -> bool:
    """Return True as soon as there is a message to receive, False after timeout_s seconds."""
    return bool(wait([source], timeout_s))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _new_file() -> int:
    """Return the descriptor of a new empty file without a name."""
    try:
        return os.memfd_create("worldmodel")
    except (AttributeError, OSError):  # another system, or a sandbox
        with tempfile.TemporaryFile() as temporary:
            return os.dup(temporary.fileno())


def _write(file: int, part: memoryview, start: int) -> None:
    """Write the whole part at byte `start` of the file. Raises OSError: there is no memory for it."""
    while part.nbytes:
        num_bytes = os.pwrite(file, part, start)
        part, start = part[num_bytes:], start + num_bytes
