"""The processes of one run, by accelerate: who writes, who takes which rows, and sums over all of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

T = TypeVar("T")


class Processes:
    """`size` processes, of which this is `rank`; rank 0 writes every file. One process needs no launcher and pays nothing."""

    def __init__(self, device: str) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(mixed_precision="no", cpu=device == "cpu")
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.rank == 0, self.accelerator.device

    def reduce(self, tensors: list[torch.Tensor]) -> None:
        """Sum `tensors` (one dtype) over the processes, in place, as one message."""
        flat = self.accelerator.reduce(torch.cat([t.flatten() for t in tensors]), reduction="sum")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, value: T) -> T:
        """Rank 0's `value` (anything small that pickles) on every process."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0] if self.size > 1 else value

    def check_alike(self, facts: Mapping[str, object]) -> None:
        """Raise ValueError on every process if not all see the same facts, by their repr: on another machine there may be other files."""
        if self.size == 1:
            return
        from accelerate.utils import gather_object

        mine = {name: hashlib.sha256(repr(fact).encode()).hexdigest() for name, fact in facts.items()}
        everyone = gather_object([mine])
        if differ := [name for name in mine if len({theirs[name] for theirs in everyone}) > 1]:
            raise ValueError(
                f"The {' and the '.join(differ)} of this run's {self.size} processes are not the same. On several machines, start each with the "
                "same configuration file, the same images and captions, and, with --resume, a run folder that all of them can read."
            )

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Part from the others; nothing is summed after it."""
        if self.size > 1:
            torch.distributed.destroy_process_group()

    def rows(self, batch: int, accumulation: int) -> list[tuple[list[int], list[float]]]:
        """This process's micro-batches of a step's `batch` rows: (row indices, 1 for a row and 0 for an empty slot).

        All micro-batches of a step have one size on every process; what does not divide is filled with empty slots.
        """
        parts = min(accumulation, -(-batch // self.size))
        size = -(-batch // (self.size * parts))
        start = self.rank * parts * size
        out = []
        for k in range(start, start + parts * size, size):
            index = range(k, k + size)
            out.append(([i if i < batch else 0 for i in index], [float(i < batch) for i in index]))
        return out


@contextlib.contextmanager
def ends_when_told(last_words: Callable[[], None], seconds: float = 15.0) -> Iterator[None]:
    """Within this block, SIGTERM or SIGINT ends the process after `seconds` if nothing else has, with `last_words` before.

    When one process of a run ends, the launcher tells the others to, and kills them half a minute later. Those wait for its part of a sum,
    NCCL's for ever, and a thread that waits in there runs no signal handler of Python's: another thread has to.
    """
    told, teller = socket.socketpair()
    teller.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while (number := told.recv(1)) and number[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        if number and not over.wait(seconds):
            try:
                last_words()
            finally:
                os._exit(1)

    try:
        before = signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        teller.close()
