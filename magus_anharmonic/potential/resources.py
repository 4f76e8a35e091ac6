"""What a batch may cost: memory per edge, threads.

How much memory an evaluation takes, how much there is, and what to do when it was not enough.

Batches side by side, one per thread, instead of several threads within one small matrix product.

The arrays of a batch are blocks that fit a core's cache; threads that share such a block wait for
each other after every operation, and where another program has one of the cores that wait takes
most of the time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from magus_anharmonic.errors import InputError

if TYPE_CHECKING:
    from magus_anharmonic.potential.m3gnet import FactorisedM3GNet


SHARE = 0.7
"""Of the free memory that one batch may take."""


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that an evaluation takes for each edge and for each atom."""

    per_edge: float
    per_atom: float

    def bytes(self, n_edges: int, n_atoms: int) -> float:
        """Of a batch."""
        return self.per_edge * n_edges + self.per_atom * n_atoms


def memory_model(model: FactorisedM3GNet, dtype: torch.dtype) -> MemoryModel:
    """An upper bound of what torch allocates, a fifth above it for usual models.

    Of each edge: what the backward pass needs of every block (`layers.TorchLayers.n_kept`, and what
    the compiled form keeps), a gradient, and the basis in float64 with its derivatives. Of each
    atom: tables and gradients of a block, and the sums of the basis in float64.
    """
    units, blocks = model.units, len(model.module.graph_conv)  # type: ignore[arg-type]
    per_edge = dtype.itemsize * (12 * blocks + 1) * units + 2800
    return MemoryModel(per_edge, dtype.itemsize * (20 * units + 64) + 900)


def chosen_device(asked: str | None) -> str:
    """``asked``, or cuda where there is one; raises ``InputError`` for a device that is not
    there."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(asked)
    except RuntimeError:
        raise InputError(f"device {asked}: must be cpu or cuda") from None
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device {asked}: this machine has no CUDA device, or torch was built without CUDA"
        )
    return asked


def available_bytes(device: str) -> float:
    """Free memory of the device; infinite where the system does not say."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return float(
            free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    return min(float(psutil.virtual_memory().available), _control_group_rest())


def _control_group_rest() -> float:
    """What a job of a queue or a container may still take."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            folder = Path("/sys/fs/cgroup")
            return float((folder / limit).read_text()) - float((folder / used).read_text())
        except (OSError, ValueError):
            continue  # another version of control groups, or "max"
    return float("inf")


SMALL = 128
"""Units; the products of a training step of a narrower model are too small to be shared by
threads."""


@contextlib.contextmanager
def threads_for_training(module: torch.nn.Module) -> Iterator[None]:
    """One thread while a small model is trained on the CPU: more gain little, and cost most of the
    time where others work."""
    before = torch.get_num_threads()
    small = int(module.model_args["units"]) < SMALL and not next(module.parameters()).is_cuda  # type: ignore[arg-type, index]
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_side_by_side(tasks: Iterator[Callable[[], None]], n_threads: int) -> None:
    """Run all tasks, each with a share of the ``n_threads`` that the caller may use; a task is
    drawn when a thread is free.

    One thread is the caller's own, with all its threads for torch. After an exception no further
    task begins, and it is raised here. Threads live as long as the call, so that a process may fork
    between calls.
    """
    if n_threads <= 1:
        for task in tasks:
            task()
        return
    lock, errors = threading.Lock(), []
    before = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(1)
        while True:
            try:
                with lock:
                    task = None if errors else next(tasks, None)
                if task is None:
                    return
                task()
            except BaseException as error:
                with lock:
                    errors.append(error)
                return

    threads = [
        threading.Thread(target=work, name=f"evaluation {index}", daemon=True)
        for index in range(n_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # what a thread sets is also the value of threads that begin later
    torch.set_num_threads(before)
    if errors:
        raise errors[0]
