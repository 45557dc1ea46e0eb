"""Messages between processes of a machine, passed through memory that both have mapped.

The sender writes a message into one of a few slots and names it through a socket. The receiver copies the message and
returns the slot. A slot is a file without a name, whose descriptor is sent with the first message in it. From then on
the system keeps it: the sender may be stopped or killed, and the memory is freed when no process uses it. On Linux the
file is a memfd, which is not part of /dev/shm and not limited by its size (64 MiB in many containers).
"""

import mmap
import os
import pickle
import socket
import struct
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from multiprocessing.connection import wait
from typing import Any, TypeAlias

import numpy as np

from data_pipelines.errors import UserError

Numbers: TypeAlias = Any  # a memoryview of float64, or a list of floats
ALIGNMENT = 64  # of buffers, in bytes
TABLE_BYTES = 4096  # for the sizes of the pickle and of its buffers
SLOT_BYTES = 2**16  # slots are multiples of it
MAX_PARTS = TABLE_BYTES // 8 - 1
_TABLE = struct.Struct(f"=Q{MAX_PARTS}Q")


class Outbox:
    """The end of a socket that sends messages. Slots are used again: new memory would be cleared page by page."""

    def __init__(self, to: socket.socket, num_slots: int) -> None:
        self._to = to
        self._memory: list[memoryview] = [memoryview(b"")] * num_slots
        self._free = list(range(num_slots))  # the last one first: it is in the cache

    def has_room(self, timeout_s: float) -> bool:
        """Return True as soon as a slot is free, False after timeout_s seconds."""
        if not self._free and is_waiting(self._to, timeout_s):
            self._free += self._to.recv(len(self._memory))
        return bool(self._free)

    def send(self, message: Any) -> None:
        """Send an object that can be pickled, if there is room. Raises OSError: no memory, or no receiver."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
        places = list(accumulate((_padded(part.nbytes) for part in parts), initial=TABLE_BYTES))
        slot = self._free.pop()
        file = None
        try:
            if len(self._memory[slot]) < places[-1]:
                file, self._memory[slot] = _new_memory(places[-1])
            memory = self._memory[slot]
            _TABLE.pack_into(memory, 0, len(parts), *(part.nbytes for part in parts), *[0] * (MAX_PARTS - len(parts)))
            for part, place in zip(parts, places, strict=False):
                memory[place : place + part.nbytes] = part
            socket.send_fds(self._to, [bytes([slot])], [] if file is None else [file])
        finally:
            if file is not None:
                os.close(file)


class Inbox:
    """The end of a socket that receives the messages of an `Outbox`."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._memory: dict[int, memoryview] = {}

    def receive(self) -> Any:
        """Return the next message.

        Raises EOFError, OSError: the sender has ended; UserError: too many files are open to map its memory.
        """
        name, files, flags, _ = socket.recv_fds(self._source, 1, 1)
        if not name:
            raise EOFError("the sender has ended")
        [slot] = name
        for file in files:
            self._memory[slot] = _mapped(file)
            os.close(file)
        if flags & socket.MSG_CTRUNC:
            raise UserError("too many open files: raise the limit of this process (ulimit -n), or lower num_workers")
        memory = self._memory[slot]
        count, *sizes = _TABLE.unpack_from(memory)
        places = list(accumulate(map(_padded, sizes[:count]), initial=0))
        copy = _aligned(places[-1])
        copy[:] = memory[TABLE_BYTES : TABLE_BYTES + places[-1]]
        with suppress(OSError):  # the sender has ended: the next call detects it
            self._source.send(name)
        first, *others = (copy[place : place + size] for place, size in zip(places, sizes, strict=False))
        return pickle.loads(first, buffers=others)


def share_numbers(to: socket.socket, values: Sequence[float]) -> Numbers:
    """Return numbers that this process shares with the one that calls receive_numbers; both may change them."""
    file = _new_file()
    try:
        _write(file, memoryview(array("d", values)).cast("B"))
        numbers = _mapped(file).cast("d")
        socket.send_fds(to, [b"n"], [file])
    finally:
        os.close(file)
    return numbers


def receive_numbers(source: socket.socket) -> Numbers:
    """Return the numbers that the other process shares. Raises EOFError, OSError: it has ended."""
    _, files, *_ = socket.recv_fds(source, 1, 1)
    if not files:
        raise EOFError("the sender has ended")
    try:
        return _mapped(files[0]).cast("d")
    finally:
        os.close(files[0])


def is_waiting(source: socket.socket, timeout_s: float) -> bool:
    """Return True as soon as there is a message to receive, False after timeout_s seconds."""
    return bool(wait([source], timeout_s))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _aligned(size: int) -> memoryview:
    """Return new memory of this size in bytes whose address is a multiple of ALIGNMENT."""
    space = np.empty(size + ALIGNMENT, dtype=np.uint8)
    first = -space.ctypes.data % ALIGNMENT
    return space.data[first : first + size]


def _new_memory(least: int) -> tuple[int, memoryview]:
    """Return the descriptor and the memory of a new file of at least this many bytes. Raises OSError: no memory."""
    file = _new_file()
    try:
        _write(file, memoryview(bytes(-(-least // SLOT_BYTES) * SLOT_BYTES)))
        return file, _mapped(file)
    except BaseException:
        os.close(file)
        raise


def _mapped(file: int) -> memoryview:
    return memoryview(mmap.mmap(file, 0))


def _new_file() -> int:
    """Return the descriptor of a new empty file without a name."""
    try:
        return os.memfd_create("worldmodel")
    except (AttributeError, OSError):  # another system, or a sandbox
        with tempfile.TemporaryFile() as temporary:
            return os.dup(temporary.fileno())


def _write(file: int, content: memoryview) -> None:
    """Write a file, which allocates the memory that is mapped later. Raises OSError: there is not enough memory."""
    start = 0
    while start < content.nbytes:
        start += os.pwrite(file, content[start:], start)
